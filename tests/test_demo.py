"""The demo's bar, held against the committed results of all seeds and, in the slow run, against a fresh one."""

from dataclasses import asdict
from pathlib import Path
from statistics import mean

import pytest
import torch
from experiments import key_of

from sdpo_nb import callbacks
from sdpo_nb.callbacks import EvaluationCallback
from sdpo_nb.config import preset_config
from sdpo_nb.evaluate import step_generalization
from sdpo_nb.files import read_json
from sdpo_nb.models import load_policy
from sdpo_nb.trainer import Trainer

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "benchmarks" / "results" / "demo").glob("seed_*.json"))
FLOW_RESULTS = sorted((ROOT / "benchmarks" / "results" / "flow" / "demo").glob("seed_*.json"))


def gains_and_losses(evaluation):
    "By step count: the gain in standard deviations of the reward before training, and the points of agreement lost"
    assert evaluation["steps"] == [1, 2, 4, 8, 16, 50] and evaluation["n"] == 160
    assert evaluation["pairs"] == [160] * 5 + [80]
    agreement = zip(evaluation["agreement"]["before"], evaluation["agreement"]["after"])
    gains = [gain / std for gain, std in zip(evaluation["gain"]["mean"], evaluation["before"]["std"])]
    return gains, [100 * (before - after) for before, after in agreement]


def test_three_seeds_were_run():
    assert len(RESULTS) >= 3


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_runs_are_of_this_preset_and_hold_the_bar(path):
    "A gain of a standard deviation at each step count"
    found = read_json(path)
    assert key_of({**found["config"], "seed": 0}) == key_of(asdict(preset_config("tiny", seed=0)))
    gains, lost = gains_and_losses(found["evaluation"])
    assert min(gains) >= 1, gains
    assert round(max(lost), 3) <= 5, lost  # of a single run, whose 80 or 160 pairs leave an error of 1 to 2


def test_at_most_three_points_of_agreement_are_lost_over_the_seeds():
    "At 50 steps, of which there are half as many pictures, up to four"
    losses = [gains_and_losses(read_json(path)["evaluation"])[1] for path in RESULTS]
    *usual, most_steps = map(mean, zip(*losses))
    assert max(usual) <= 3 and most_steps <= 4 and mean([*usual, most_steps]) <= 2, losses


def test_the_front_page_tells_these_numbers():
    "Its sentence about the least gain and the lost agreement is typed by hand"
    found = [gains_and_losses(read_json(path)["evaluation"]) for path in RESULTS]
    least, lost = min(min(gains) for gains, _ in found), [losses for _, losses in found]
    means = [-mean(losses) for losses in zip(*lost)]
    page = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert f"at least {least:.2f} standard deviations at every number of steps" in page
    assert f"Agreement changes by −{-min(means):.1f} to +{max(means):.1f} points in the mean of the three" in page
    assert f"the largest loss in a single run is {max(map(max, lost)):.0f} points" in page


def test_the_evaluation_that_comes_with_the_package_is_that_of_the_demo(tmp_path):
    "It is found for the demo's settings, and what it says is what the model does: 24 pairs at one step"
    config = preset_config("tiny", output_dir=str(tmp_path))
    trainer = Trainer(load_policy("tiny", device="cpu"), config.reward, config.prompts, config, callbacks=[])
    key = callbacks._evaluation_key(trainer, EvaluationCallback().pairs(trainer))
    kept = callbacks._read_copy(callbacks._shipped, key)
    assert kept is not None, "run python benchmarks/demo.py --base"
    with trainer.policy.without_lora():
        settings = dict(steps=[1], samples=24, seed=config.eval_seed)
        now = step_generalization(trainer.policy, trainer.reward, trainer.prompts, **settings)
    torch.testing.assert_close(now.rewards[0], kept[False].rewards[0, :24], atol=0.02, rtol=0)
    torch.testing.assert_close(now.images[0], kept[False].images[0], atol=0.01, rtol=0)


def test_the_chapter_tells_what_the_flow_models_preset_does():
    "Six seeds, of which it names the means; they do not reach the bar above"
    runs = [read_json(path) for path in FLOW_RESULTS]
    assert {run["seed"] for run in runs} == {0, 1, 2, 3, 4, 42}
    preset = key_of(asdict(preset_config("tiny_flow", seed=0)))
    assert {key_of({**run["config"], "seed": 0}) for run in runs} == {preset}
    found = [gains_and_losses(run["evaluation"]) for run in runs]
    gains, lost = ([mean(column) for column in zip(*values)] for values in zip(*found))
    page = (ROOT / "nbs" / "57_tiny_flow.ipynb").read_text(encoding="utf-8")
    assert f"a run gains {min(gains):.2f} to {max(gains):.2f} standard deviations" in page
    assert f"loses up to {max(lost):.1f} points of agreement" in page
    seconds = [run["cpu_seconds"] for run in runs]
    assert f"takes {min(seconds):.0f} to {max(seconds):.0f} processor seconds" in page


@pytest.mark.slow
def test_a_fresh_demo_holds_the_bar(tmp_path):
    from sdpo_nb.cli import train_command

    assert train_command(["tiny", "--output_dir", str(tmp_path / "run")]) == 0
    gains, lost = gains_and_losses(read_json(tmp_path / "run" / "evaluation.json"))
    assert min(gains) >= 1 and max(lost) <= 5, (gains, lost)
    assert (tmp_path / "run" / "report.html").is_file() and (tmp_path / "run" / "lora").is_dir()
