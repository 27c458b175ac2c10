"""Random command lines, settings, prompts and files: each ends in a plan, a run or one sentence, and leaves nothing."""

import io
import json
import random
import re
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields

import pytest

import sdpo_nb.callbacks  # noqa: F401  (what plans import: seconds that are not the test's)
import sdpo_nb.lasro  # noqa: F401
import sdpo_nb.spo  # noqa: F401
from sdpo_nb.cli import main
from sdpo_nb.commands import flags_of
from sdpo_nb.config import TrainConfig, presets
from sdpo_nb.recipes import recipes

FLAGS = flags_of(TrainConfig)
JUNK = [
    "",
    " ",
    "x",
    "none",
    "nan",
    "-1",
    "0",
    "1e999",
    "½",
    "a\0b",
    "a\nb",
    "\udcff",
    "𝒳" * 40,
    "x" * 400,
    "--",
    "~",
    "[]",
]
VALUES = {
    int: ["1", "2", "3", "4", "8", "16", "1000", "10" * 12, "1.5", "１２"],
    float: ["0.5", "1", "0", "1e-3", "1e-320", "5e-4", "inf", "2"],
    bool: ["true", "false", "True", "maybe", "1"],
}
TEXTS = {
    "recipe": [*recipes, "SDPO"],
    "precision": ["fp32", "bf16", "fp16"],
    "policy": ["tiny", "./nowhere", "nobody/nothing/here"],
    "output_dir": ["run", "new/run/", "file", "file/run", "filled", ".", "a b", "ünï", "run\udcff"],
    "resume": ["empty", "filled", "file", "nowhere", "odd", "list"],
    "config": ["good.yaml", "twice.yaml", "broken.yaml", "list.yaml", "bytes", "nowhere.yaml", "deep.yaml"],
    "prompts": [
        "animals",
        "shapes",
        "nowhere.txt",
        "filled",
        "dataset:p.csv:caption",
        "dataset:p.csv:nothing",
        "dataset:p.csv",
    ],
    "reward": [
        "warmth",
        "0.5*warmth-colorfulness",
        "warmth+",
        "2*",
        "beauty",
        "mine.py:good",
        "0.5*mine.py:good+warmth",
    ],
    "push_to_hub": ["me", "me/lora"],
    "tracker": ["none", "tensorboard", "paper"],
    "reward_vae": ["./nowhere", "empty"],
}
TEXTS["reward"] += ["mine.py:missing", "broken.py:f", "bytes:f", "no_such_module:f", "mine.py:good*2", "a.py:b:c"]
PROMPTS = {
    "p.txt": "a red circle\n\n a cat\r\n$$ \\frac{ %d {} \u2028 x\n".encode(),
    "p.csv": b"id,caption\n1,a red circle\n2,\n",
    "two.csv": b"a,b\nx,y\n",
    "p.json": json.dumps(["a red circle", "a blue ring"]).encode(),
    "deep.json": b"[" * 5000,
    "numbers.json": b"[1, 2]",
    "p.jsonl": b'{"caption": "a red circle"}\n{"caption": null}\n',
    "utf16.txt": "a red circle".encode("utf-16"),
    "empty.txt": b"",
    "nothing.csv": b"caption\n",
    "bytes": bytes(range(256)),
    "long.txt": b"a " * 10_000,
}
TEXTS["prompts"] += [*PROMPTS]
CODE = """
def good(images, prompts):
    return [float(image.mean()) for image in images]

def lists(images, prompts):
    return [[1.0, 2.0]] * len(images)

def fails(images, prompts):
    prompts.sort()
    raise RuntimeError("so what\\n  two lines")
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A working folder with all kinds of files, and the home folder in it"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, data in PROMPTS.items():
        (tmp_path / name).write_bytes(data)
    for folder in ("home", "empty", "filled", "odd", "list"):
        (tmp_path / folder).mkdir()
    texts = {
        "mine.py": CODE,
        "broken.py": "1 / 0",
        "file": "precious",
        "filled/file": "precious",
        "odd/config.json": '{"recipe": ["sdpo"], "epochs": {}}',
        "list/config.json": "[]",
        "good.yaml": "epochs: 2\nseed: 7\n",
        "twice.yaml": "seed: 1\nseed: 2\n",
        "broken.yaml": "a: [",
        "list.yaml": "- 1\n",
        "deep.yaml": "[" * 5000,
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def value_of(name, draw):
    "Something sensible, or rubbish"
    flag = FLAGS.get(name)
    usual = TEXTS.get(name) or VALUES.get(flag.kind if flag else str, [])
    return draw.choice(JUNK) if not usual or draw.random() < 0.15 else draw.choice(usual)


def flags(draw, names, most=3):
    words = []
    for name in draw.sample(names, draw.randint(0, most)):
        value = value_of(name, draw)
        words += [f"--{name}={value}"] if draw.random() < 0.5 else [f"--{name}", value]
    return words


def training_line(draw, words=()):
    "Mostly right, with a few flags that may be anything"
    names = [*FLAGS, *TEXTS, *TEXTS, "config", "epoch"]  # those with files twice
    names = [name for name in dict.fromkeys(names) if name != "dry_run"]
    preset = draw.choices([["tiny"], [draw.choice([*presets])], [], ["tinny"], ["tiny", "more"]], [8, 2, 1, 1, 1])[0]
    return ["train", *preset, *words, *flags(draw, names)]


def run_line(draw, runs):
    "A command line of sdpo-eval or sdpo-sample, for a run or for something else"
    source = draw.choice([*runs, *runs, "empty", "filled", "file", "odd", "list", "nowhere", "", "a\0b", "p.csv,file"])
    if draw.random() < 0.5:
        names = (
            "policy reward prompts steps samples seed eta guidance_scale scale own_scheduler precision output".split()
        )
        extra = dict(
            steps=["1", "1,2", "0", "1,,2"], output=["e.json", "e.txt", "file", "file/e.json"], scale=["1", "1,2"]
        )
        words = ["eval", source, "--steps", "1", "--samples", "2"]
    else:
        names = "policy num_steps samples seed scale guidance_scale eta own_scheduler precision output".split()
        extra = dict(output=["s.png", "s.jpg", "empty", "file/s.png"], scale=["0", "x"], num_steps=["1", "0"])
        words = ["sample", source, draw.choice(["a red circle", "", "\U0001f600 \u2028 $$", "x " * 500, "\udcff"])]
        words += ["--samples", "1", "--num_steps", "1"]
    for name in draw.sample(names, draw.randint(0, 3)):
        words += [f"--{name}={draw.choice(extra[name]) if name in extra else value_of(name, draw)}"]
    return words


def content(folder):
    places = [path for path in folder.rglob("*") if not {".cache", ".config"} & {*path.parts}]  # matplotlib
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in places}


def outcome(words, place):
    "The exit status; fails unless the command has finished, or has said in one line what is wrong and left nothing"
    before = content(place)
    with redirect_stdout(io.StringIO()) as output, redirect_stderr(io.StringIO()) as errors:
        status = main(words)
    lines = [line for line in errors.getvalue().splitlines(keepends=True) if ": note: " not in line]
    if status == 0:
        assert lines == [] and output.getvalue(), (words, lines)
        return status
    (line,) = lines
    assert status in (1, 2) and re.fullmatch(r"sdpo-(train|eval|sample): .{10,1500}[.?)]\n", line), (words, line)
    assert not re.search(r"object at 0x|Errno", line), (words, line)
    assert content(place) == before, words
    return status


def play(cases, place):
    "How many ended how"
    found = {0: 0, 1: 0, 2: 0}
    for words in cases:
        try:
            found[outcome(words, place)] += 1
        except Exception as error:
            raise AssertionError(f"{words!r}: {type(error).__name__}: {error}") from error
    return found


def test_sixty_lines(place):
    "Plans, and whatever is refused before a policy is loaded"
    draw = random.Random(60)
    cases = [training_line(draw, ["--dry_run"]) for _ in range(48)]
    cases += [run_line(draw, ["nowhere"]) for _ in range(12)]
    found = play(cases, place)
    assert found[0] >= 5 and found[2] >= 20


@pytest.mark.slow
def test_five_hundred_lines(place, finished_run, monkeypatch):
    "A few of them with whole runs, an epoch long, and with pictures of a finished one"
    monkeypatch.setattr("sdpo_nb.rewards._retry_after", 0.0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    draw, sizes = random.Random(500), "--num_steps 2 --pairs_per_epoch 2 --micro_batch 1 --epochs 1 --eval_samples 0"
    cases = [training_line(draw, ["--dry_run"]) for _ in range(400)]
    names = [
        name for name in FLAGS if name not in ("dry_run", "epochs", "num_steps", "eval_samples", "pairs_per_epoch")
    ]
    for number in range(30):
        reward = draw.choice(["warmth", "mine.py:good", "mine.py:lists", "mine.py:fails"])
        words = ["tiny", *sizes.split(), "--output_dir", f"runs/{number}", "--reward", reward]
        cases.append([*words, *flags(draw, [name for name in names if name != "reward"], 2)])
    for number in range(70):
        cases.append(run_line(draw, [str(finished_run), str(finished_run / "lora")]))
    found = play(cases, place)
    assert found[0] >= 60 and found[2] >= 150
    shutil.rmtree(place / "runs", ignore_errors=True)
    assert [f.name for f in fields(TrainConfig)] == [*FLAGS]
