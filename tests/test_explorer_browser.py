"""Both explorers in a real browser, moved with the keyboard; skips say which program is missing."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch

from sdpo_nb.explorer import explore, save_explorer
from sdpo_nb.models import load_policy

ROOT = Path(__file__).resolve().parent.parent
PLAYWRIGHT = "playwright-core@1.65.1"
NOTEBOOK = """
import torch
from sdpo_nb.widget import TrajectoryExplorer
from sdpo_nb.models import load_policy

torch.set_num_threads(1)
policy = load_policy('tiny', device='cpu').add_lora()
for name, parameter in policy.trainable_parameters().items():
    if 'lora_B' in name: parameter.data.fill_(.05)
TrajectoryExplorer(policy, 'warmth', ['a circle', 'a green star'], num_steps=4)
"""


@pytest.fixture(scope="module")
def programs(request):
    "The browser, node and Playwright; skips where one of them is missing"
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    missing = [name for name in ("node", "npm") if not shutil.which(name)] + ["Chromium"] * (chromium is None)
    if missing:
        pytest.skip(f"the explorer is tested in a browser only where {' and '.join(missing)} can be found")
    folder = request.config.cache.mkdir("playwright")
    package = folder / "node_modules" / "playwright-core"
    if not package.is_dir():
        try:
            done = subprocess.run(
                ["npm", "install", "--no-audit", "--no-fund", "--prefix", folder, PLAYWRIGHT],
                capture_output=True,
                text=True,
                timeout=60,
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"npm did not install {PLAYWRIGHT} within a minute")
        if done.returncode:
            pytest.skip(f"npm could not install {PLAYWRIGHT}: {done.stderr.strip().splitlines()[-1:]}")
    return package, chromium


@pytest.fixture
def served(tmp_path):
    "The address of a notebook with a live explorer, served by voila"
    if importlib.util.find_spec("voila") is None:
        pytest.skip("the live explorer is tested only where voila is installed: pip install -e '.[dev]'")
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(NOTEBOOK)],
        metadata=dict(kernelspec=dict(name="python3", display_name="python3")),
    )
    nbformat.write(notebook, tmp_path / "explorer.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {
        name: str(tmp_path / name.lower()) for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR")
    }  # not the user's
    env = os.environ | own | dict(PYTHONPATH=str(ROOT))
    with open(tmp_path / "voila.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "voila", "explorer.ipynb", "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"],
            cwd=tmp_path,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for_port(server, port, tmp_path / "voila.log")
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()  # voila stops its kernels on the way out
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_for_port(server, port, log):
    "Return as soon as the server listens"
    end = time.monotonic() + 40
    while time.monotonic() < end:
        if server.poll() is not None:
            pytest.fail(f"voila stopped:\n{log.read_text()}")
        try:
            return socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"voila did not listen within 40 seconds:\n{log.read_text()}")


def drive(programs, address, form, folder):
    "What the browser saw; screenshots go to `folder`"
    package, chromium = programs
    done = subprocess.run(
        ["node", Path(__file__).with_name("drive_explorer.mjs"), package, chromium, address, form, folder],
        capture_output=True,
        text=True,
        timeout=75,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(seen):
    "The keyboard moves the pictures, their words and the readings, and nothing complained"
    assert seen["complaints"] == []
    for name, step in dict(start=0, right=1, further=2, back=1, other=1).items():
        look = seen[name]
        assert look["readings"].startswith(f"step {step} of 0 to 3"), name
        assert len(look["pictures"]) == 4 and all(
            picture["src"].startswith("data:image/png") and picture["width"] > 0 for picture in look["pictures"]
        )
        assert all(f"step {step}" in picture["alt"] for picture in look["pictures"][:3])

    def rewards(name):
        return seen[name]["readings"].splitlines()

    assert seen["right"] | dict(scheme="") == seen["back"] | dict(scheme="")
    for one, other in (("start", "right"), ("right", "further"), ("right", "other")):
        assert seen[one]["pictures"][2]["src"] != seen[other]["pictures"][2]["src"]
        assert [line for line in rewards(one) if "true reward" in line] != [
            line for line in rewards(other) if "true reward" in line
        ]


@pytest.mark.slow
def test_live_explorer(programs, served, tmp_path):
    check(drive(programs, served, "live", tmp_path))


@pytest.mark.slow
def test_static_explorer(programs, tmp_path):
    torch.manual_seed(0)
    policy = load_policy("tiny", device="cpu").add_lora()
    for name, parameter in policy.trainable_parameters().items():
        if "lora_B" in name:
            parameter.data.fill_(0.05)
    trajectories = [explore(policy, "warmth", "a circle", num_steps=4, when=when) for when in ("after", "before")]
    page = save_explorer(trajectories, tmp_path / "explorer.html")
    seen = drive(programs, page.as_uri(), "static", tmp_path)
    check(seen)
    assert seen["dark"]["scheme"] != seen["start"]["scheme"] and seen["dark"]["readings"] == seen["other"]["readings"]
