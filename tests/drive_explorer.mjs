// Drives the explorers in a headless Chromium with the keyboard; prints what it saw as JSON.
//   node drive_explorer.mjs PLAYWRIGHT_CORE CHROMIUM ADDRESS live|static SCREENSHOTS
import { createRequire } from 'node:module';
import { join } from 'node:path';

const [playwright, executablePath, address, form, folder] = process.argv.slice(2);
const { chromium } = createRequire(import.meta.url)(playwright);
const args = ['--no-sandbox', '--headless', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
              '--disable-component-update', '--disable-sync'];

const browser = await chromium.launch({ executablePath, args });
const page = await browser.newPage({ viewport: { width: 900, height: 760 } });
const complaints = [];
page.on('pageerror', error => complaints.push(String(error)));

// The source and the words of every picture, and the readings beside them
const look = () => page.evaluate(() => ({
  pictures: [...document.querySelectorAll('figure img')].map(image => ({ src: image.src, alt: image.alt, width: image.naturalWidth })),
  readings: document.querySelector('.readings').innerText,
  scheme: getComputedStyle(document.body).color + ' on ' + getComputedStyle(document.body).backgroundColor,
}));

// Press a key and wait until the readings name another step
const press = async (key, step) => {
  await page.keyboard.press(key);
  await page.waitForFunction(step => document.querySelector('.readings').innerText.startsWith(`step ${step} `), step, { timeout: 15000 });
  return look();
};

const shoot = name => page.screenshot({ path: join(folder, `${form}_${name}.png`) });
const seen = { complaints };
try {
  await page.goto(address, { timeout: 40000, waitUntil: 'domcontentloaded' });
  await page.waitForSelector('.readings', { timeout: 40000 });
  const slider = page.locator(form === 'live' ? '.noUi-handle, [role=slider]' : 'input[type=range]').first();
  await slider.focus();
  seen.start = await look();
  await shoot('start');
  seen.right = await press('ArrowRight', 1);
  seen.further = await press('ArrowRight', 2);
  seen.back = await press('ArrowLeft', 1);
  await shoot('back');
  // The other policy, at the same step
  const before = await page.locator('figure img').nth(2).getAttribute('src');
  if (form === 'live') await page.getByRole('button', { name: 'before training' }).click();
  else await page.locator('select').selectOption({ index: 1 });
  await page.waitForFunction(src => document.querySelectorAll('figure img')[2].src !== src, before, { timeout: 20000 });
  seen.other = await look();
  await page.emulateMedia({ colorScheme: 'dark' });
  seen.dark = await look();
  await shoot('dark');
} finally {
  await browser.close();
}
console.log(JSON.stringify(seen));
