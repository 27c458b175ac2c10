"""Thirty votes in a real browser, by mouse and keyboard; the reward that they teach trains a model."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from test_explorer_browser import programs, wait_for_port  # noqa: F401, a fixture and a function

from sdpo_nb.config import preset_config
from sdpo_nb.models import load_policy
from sdpo_nb.prompts import prompt_lists
from sdpo_nb.taste import train_taste
from sdpo_nb.trainer import Trainer
from sdpo_nb.votes import read_votes
from sdpo_nb.voting import static_votes

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = """
import torch
from sdpo_nb.models import load_policy
from sdpo_nb.voting import PreferenceVote

torch.set_num_threads(1)
PreferenceVote(load_policy('tiny', device='cpu'), 'shapes_open', 'my_taste', goal=40)
"""


@pytest.fixture
def served(tmp_path):
    "The address of a notebook with a place to vote, served by voila; every visit starts a kernel of its own"
    if importlib.util.find_spec("voila") is None:
        pytest.skip("votes in a notebook are tested only where voila is installed: pip install -e '.[dev]'")
    kernel = dict(kernelspec=dict(name="python3", display_name="python3"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)], metadata=kernel)
    nbformat.write(notebook, tmp_path / "votes.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR")
    env = os.environ | {name: str(tmp_path / name.lower()) for name in names} | dict(PYTHONPATH=str(ROOT))
    words = ["-m", "voila", "votes.ipynb", "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"]
    with open(tmp_path / "voila.log", "w") as log:
        server = subprocess.Popen([sys.executable, *words], cwd=tmp_path, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for_port(server, port, tmp_path / "voila.log")
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()


def drive(programs, address, form, folder):  # noqa: F811
    "What the browser saw; screenshots go to `folder`"
    script = Path(__file__).with_name("drive_votes.mjs")
    command = ["node", script, *programs, address, form, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(seen):
    "Every vote was counted, and the line that says how well clicks are predicted moves"
    assert seen["complaints"] == []
    assert [int(words.split()[0]) for words in seen["words"]] == [*range(1, 31)]
    assert seen["alts"][0].startswith("Left picture") and seen["alts"][1].startswith("Right picture")
    predicted = [words.partition("clicked: ")[2] for words in seen["words"]]
    assert not predicted[0] and predicted[-1] and len({*predicted}) > 8


@pytest.mark.slow
def test_votes_in_a_notebook(programs, served, tmp_path):  # noqa: F811
    seen = drive(programs, served, "live", tmp_path)
    check(seen)
    assert seen["undone"].startswith("29 of 40 votes") and seen["end"].startswith("30 of 40 votes")  # after a restart
    folder = tmp_path / "my_taste"
    votes = read_votes(folder)
    assert len(votes) == 30 == len((folder / "votes.jsonl").read_text().splitlines())
    assert {vote.how for vote in votes} == {"random", "active"}
    taste = train_taste(folder)
    assert taste.facts["accuracy"] > 0.5
    changes = dict(reward=taste.name, epochs=2, pairs_per_epoch=8, eval_samples=0, output_dir=str(tmp_path / "run"))
    config = preset_config("tiny", **changes)
    Trainer(load_policy("tiny", device="cpu"), config.reward, config.prompts, config, []).train()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_votes_on_a_page_without_python(programs, tmp_path):  # noqa: F811
    prompts = [prompt for prompt in prompt_lists["shapes_open"][:4] for _ in range(6)]
    images = load_policy("tiny", device="cpu").sample(prompts, 2, seeds=[*range(len(prompts))])
    body = f"<body>{static_votes(images, prompts, pairs=60)}</body>"
    (tmp_path / "page.html").write_text(f'<!doctype html><meta charset="utf-8">{body}')
    seen = drive(programs, (tmp_path / "page.html").as_uri(), "static", tmp_path)
    check(seen)
    hits, known = map(int, seen["words"][-1].rstrip(".").partition("clicked: ")[2].split(" of "))
    assert hits / known > 0.6  # what is fitted in the page is right more often than not
