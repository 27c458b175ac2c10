"""The demo's bar, held against the committed results of all seeds and, in the slow run, against a fresh one."""

from dataclasses import asdict
from pathlib import Path

import pytest
from experiments import key_of

from sdpo_nb.config import preset_config
from sdpo_nb.files import read_json

RESULTS = sorted((Path(__file__).parent.parent / "benchmarks" / "results" / "demo").glob("seed_*.json"))


def check_bar(evaluation):
    "Every step count: a paired gain of more than five standard errors, and no more than five points of agreement lost"
    assert evaluation["steps"] == [1, 2, 4, 8, 16, 50] and evaluation["n"] == 256
    for i, steps in enumerate(evaluation["steps"]):
        gain, error = evaluation["gain"]["mean"][i], evaluation["gain"]["se"][i]
        lost = evaluation["agreement"]["before"][i] - evaluation["agreement"]["after"][i]
        assert gain > 5 * error, f"{steps} steps: gain {gain} with a standard error of {error}"
        assert lost <= 0.05, f"{steps} steps: agreement fell by {lost}"


def test_three_seeds_were_run():
    assert len(RESULTS) >= 3


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_runs_are_of_this_preset_and_hold_the_bar(path):
    found = read_json(path)
    assert key_of({**found["config"], "seed": 0}) == key_of(asdict(preset_config("tiny", seed=0)))
    check_bar(found["evaluation"])


@pytest.mark.slow
def test_a_fresh_demo_holds_the_bar(tmp_path):
    from sdpo_nb.cli import train_command

    assert train_command(["tiny", "--output_dir", str(tmp_path / "run")]) == 0
    check_bar(read_json(tmp_path / "run" / "evaluation.json"))
    assert (tmp_path / "run" / "report.html").is_file() and (tmp_path / "run" / "lora").is_dir()
