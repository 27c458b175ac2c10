// Votes in a headless Chromium, by mouse and keyboard, with a taste of its own: the redder picture; prints what it saw.
//   node drive_votes.mjs PLAYWRIGHT_CORE CHROMIUM ADDRESS live|static SCREENSHOTS
import { createRequire } from 'node:module';
import { join } from 'node:path';

const [playwright, executablePath, address, form, folder] = process.argv.slice(2);
const { chromium } = createRequire(import.meta.url)(playwright);
const args = ['--no-sandbox', '--headless', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
              '--disable-component-update', '--disable-sync'];
const live = form === 'live', status = live ? '[role=status]' : '.status';
const browser = await chromium.launch({ executablePath, args });
const page = await browser.newPage({ viewport: { width: 900, height: 760 } });
page.setDefaultTimeout(180000);
const complaints = [];
page.on('pageerror', error => complaints.push(String(error)));

const words = () => page.locator(status).innerText();
const alts = () => page.evaluate(() => [...document.querySelectorAll('img')].slice(0, 2).map(image => image.alt));
// Which of the two pictures is redder
const redder = () => page.evaluate(() => {
  const redness = [...document.querySelectorAll('img')].slice(0, 2).map(image => {
    const canvas = document.createElement('canvas'), size = canvas.width = canvas.height = 32, pen = canvas.getContext('2d');
    pen.drawImage(image, 0, 0, size, size);
    return pen.getImageData(0, 0, size, size).data.reduce((sum, value, i) => sum + (i % 4 === 0 ? value : i % 4 === 2 ? -value : 0), 0);
  });
  return redness[0] > redness[1] ? 'left' : 'right';
});
const count = n => page.waitForFunction(([status, n]) => document.querySelector(status)?.innerText.startsWith(`${n} `), [status, n]);
const settle = () => page.waitForTimeout(live ? 150 : 20); // longer than the widget waits
const act = async (what, n, byKey) => {
  await settle();
  if (byKey) await page.keyboard.press({ left: 'f', right: 'j', undo: live ? 'Backspace' : 'u' }[what]);
  else await page.getByRole('button', { name: new RegExp(what) }).click();
  await count(n);
};
const focus = () => live ? page.locator('input[type=text]').first().focus() : page.locator('[data-votes]').focus();

const seen = { complaints, words: [] };
try {
  await page.goto(address, { timeout: 180000, waitUntil: 'domcontentloaded' });
  await page.waitForSelector(status);
  await count(0);
  seen.alts = await alts();
  await page.screenshot({ path: join(folder, `${form}_start.png`) });
  for (let n = 1; n <= 30; n++) {
    const byKey = n % 2 === 0, choice = await redder();
    if (byKey) await focus();
    await act(choice, n, byKey);
    seen.words.push(await words());
  }
  await page.screenshot({ path: join(folder, `${form}_thirty.png`) });
  await focus();
  await act('undo', 29, true);
  seen.undone = await words();
  await act(await redder(), 30, false);
  if (live) { // another kernel, on the same file
    await page.reload({ timeout: 180000, waitUntil: 'domcontentloaded' });
    await page.waitForSelector(status);
    await count(30);
  }
  seen.end = await words();
} finally {
  await browser.close();
}
console.log(JSON.stringify(seen));
