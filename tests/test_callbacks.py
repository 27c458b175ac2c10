"""Whoever watches a run changes nothing in it, sees what it says, and leaves a folder that holds together."""

import json
import re
from dataclasses import replace
from functools import partial
from io import BytesIO, StringIO
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from accelerate.tracking import GeneralTracker
from comparisons import same_weights, without_clock
from diffusers import LCMScheduler, StableDiffusionPipeline
from matplotlib.figure import Figure
from nbclient import NotebookClient
from PIL import Image

from sdpo_nb import callbacks as module
from sdpo_nb.callbacks import (
    EvaluationCallback,
    HubCallback,
    LiveCallback,
    PictureCallback,
    ProgressCallback,
    ReportCallback,
    Tracker,
    TrackerCallback,
    default_callbacks,
    evaluation_figures,
    in_notebook,
    read_evaluations,
    rollout_figures,
    rollout_strip,
    show_in_place,
    tracker_names,
    trackers,
    with_configured,
)
from sdpo_nb.config import TrainConfig
from sdpo_nb.evaluate import step_generalization
from sdpo_nb.files import read_json, read_jsonl
from sdpo_nb.mdp import random_states
from sdpo_nb.models import load_policy
from sdpo_nb.rewards import FunctionReward, get_reward
from sdpo_nb.run import newest_checkpoint
from sdpo_nb.trainer import Trainer

TESTS = Path(__file__).resolve().parent
PROMPTS = ["a red circle", "a cat"]
SIZES = dict(num_steps=5, epochs=1, pairs_per_epoch=4, pairs_per_update=2, micro_batch=2, buffer_size=8, min_count=4)


def redness(images, prompts):
    return (images[:, 0] - images[:, 2]).mean((1, 2))


def noisy_redness(images, prompts):
    "A reward that draws from torch's global generator, whose state a resumed run has to find again"
    return redness(images, prompts) + 0.01 * torch.rand(len(images))


@pytest.fixture
def make(pipeline, tmp_path):
    "Make a trainer of a small run"

    def make_trainer(*, reward=redness, callbacks=(), **settings):
        config = TrainConfig(**{**SIZES, "eval_samples": 0, "output_dir": str(tmp_path / "run"), **settings})
        return Trainer(load_policy(pipeline, device="cpu"), reward, PROMPTS, config, callbacks)

    return make_trainer


@pytest.fixture
def run(pipeline, tmp_path):
    "What a callback may read of a run, without any training: its LoRA is random numbers already"
    policy = load_policy(pipeline, device="cpu").add_lora(rank=2)
    for name, parameter in policy.trainable_parameters().items():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    (tmp_path / "run").mkdir()
    return SimpleNamespace(
        policy=policy,
        config=TrainConfig(**{**SIZES, "epochs": 3, "eval_samples": 5, "output_dir": str(tmp_path / "run")}),
        folder=tmp_path / "run",
        counts=dict(epoch=0),
        accelerator=SimpleNamespace(is_main_process=True, trackers=[]),
        prompts=PROMPTS,
        reward=FunctionReward(redness, "redness"),
        finished=lambda: False,
    )


def watch(callback, run, epochs=3):
    "Every hook, as a run of so many epochs calls them"
    callback.before_train(run)
    for epoch in range(1, epochs + 1):
        callback.after_epoch(run, {"epoch": epoch, "reward/mean": epoch / 8, "loss": 0.5})
    callback.after_train(run)


# --- who watches


def test_default_callbacks(monkeypatch):
    "Pictures in place only where a kernel runs, not in any other IPython"
    plain = [EvaluationCallback, ProgressCallback, ReportCallback]  # the clock starts behind the evaluation
    assert [type(callback) for callback in default_callbacks()] == plain
    for kernel, expected in ((False, plain), (True, [EvaluationCallback, LiveCallback, *plain[1:]])):
        shell = type("Shell", (), {"kernel": None} if kernel else {})()
        monkeypatch.setattr("IPython.get_ipython", lambda: shell)
        assert in_notebook() == kernel and [type(callback) for callback in default_callbacks()] == expected


def test_the_settings_may_ask_for_more():
    report, asked = ReportCallback(), TrainConfig(tracker="wandb", log_images_every=3, push_to_hub="me/mine")
    kinds = [TrackerCallback, PictureCallback, ReportCallback, HubCallback]
    assert [type(callback) for callback in with_configured(asked, [report])] == kinds
    assert with_configured(TrainConfig(), [report]) == [report]


def test_the_upload_comes_with_the_run(run, monkeypatch):
    sent = []
    monkeypatch.setattr(module, "push_run", lambda *arguments: sent.append(arguments))
    watch(HubCallback("me/mine"), run)
    run.accelerator.is_main_process = False
    watch(HubCallback("me/mine"), run)
    assert sent == [(run.folder, "me/mine")]


# --- progress


class Screen(StringIO):
    "What stdout is where a person sits in front of it"

    def isatty(self):
        return True


def test_progress_in_a_terminal(run, monkeypatch):
    "One line that is written over: epochs, time gone and left, reward"
    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(module, "tqdm", partial(module.tqdm, mininterval=0))
    watch(ProgressCallback(), run)
    frames = screen.getvalue().split("\r")
    assert screen.getvalue().count("\n") == 1 and len(frames) > 3
    assert re.search(r"training:\s+33%.* 1/3 \[\d+:\d+<.*, .*reward 0\.125 ▁\]", " ".join(frames))
    assert "3/3" in frames[-1] and "reward 0.375 ▁▅█" in frames[-1]


def test_progress_in_a_file_is_a_line_an_epoch(run, capsys):
    watch(ProgressCallback(), run)
    out, err = capsys.readouterr()
    assert out.splitlines()[2] == "epoch 3/3 reward 0.375 loss 0.5"
    assert len(out.splitlines()) == 3 and "\r" not in out + err and "training" not in err


class Clock:
    "A time that only work moves"

    def __init__(self, monkeypatch):
        self.now = 1000.0
        for name in ("time", "perf_counter"):
            monkeypatch.setattr(module.time, name, lambda: self.now)
        monkeypatch.setattr("tqdm.std.time", lambda: self.now)


def test_the_time_left_is_that_of_the_training(run, few_steps, monkeypatch):
    "Evaluations of an hour, before and after epochs of a minute: the bar knows only the minutes, and ends with them"
    screen, clock = Screen(), Clock(monkeypatch)
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(module, "tqdm", partial(module.tqdm, mininterval=0))
    watchers = default_callbacks()[:2]
    evaluate = watchers[0].evaluate

    def an_hour(run, own):
        clock.now += 1800
        return evaluate(run, own)

    monkeypatch.setattr(watchers[0], "evaluate", an_hour)
    for watcher in watchers:
        watcher.before_train(run)
    screen.truncate(0)
    for epoch in (1, 2, 3):
        clock.now += 60
        run.finished = lambda: epoch == 3
        for watcher in watchers:
            watcher.after_epoch(run, {"epoch": epoch, "reward/mean": 0.5, "loss": 0.5})
    assert "1/3 [01:00<02:00" in screen.getvalue() and screen.getvalue()[-1] == "\n"  # closed: it stands nowhere
    for watcher in watchers:
        watcher.after_train(run)
    assert "evaluation after" in screen.getvalue().rpartition("3/3")[2]


# --- the evaluation


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(module, "step_generalization", partial(step_generalization, steps=(1, 3)))


def test_evaluation_compares_with_the_policy_before_training(run, few_steps):
    watcher, later = EvaluationCallback(), EvaluationCallback()
    watch(watcher, run)
    result = read_json(run.folder / "evaluation.json")
    assert result["before"]["mean"] != result["after"]["mean"] and result["own_scheduler"]["n"] == 1
    # after a resume the policy has learnt already, and still "before" is the policy without LoRA
    (run.folder / "evaluation_before.pt").unlink()
    later.before_train(run)
    assert all(torch.equal(later.before[own].rewards, watcher.before[own].rewards) for own in (False, True))


@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: b"", lambda data: b"something else"])
def test_a_damaged_evaluation_is_made_again(run, few_steps, monkeypatch, damage):
    whole, repaired, path = EvaluationCallback(), EvaluationCallback(), run.folder / "evaluation_before.pt"
    whole.before_train(run)
    path.write_bytes(damage(path.read_bytes()))
    assert read_evaluations(path) is None
    repaired.before_train(run)
    assert all(torch.equal(repaired.before[own].rewards, whole.before[own].rewards) for own in (False, True))
    again = EvaluationCallback()
    monkeypatch.setattr(again, "evaluate", None)  # from the file, not evaluated
    again.before_train(run)
    assert torch.equal(again.before[False].rewards, whole.before[False].rewards)


def test_an_evaluation_of_other_pairs_is_made_again(run, few_steps):
    "Of an earlier version, or of other prompts"
    first, again, path = EvaluationCallback(), EvaluationCallback(), run.folder / "evaluation_before.pt"
    first.before_train(run)
    run.prompts = ["a dog", "a fox"]
    again.before_train(run)
    assert again.before[False].prompts == ["a dog", "a fox", "a dog", "a fox", "a dog"]
    assert read_evaluations(path)[False].prompts == again.before[False].prompts


@pytest.fixture
def cache(monkeypatch, tmp_path):
    "A cache folder of the user's, not made yet"
    monkeypatch.setenv("SDPO_NB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def begun(run, tmp_path, name):
    "The evaluation before training of the same run in another folder, and whether it had to be made"
    made, watcher, run.folder = [], EvaluationCallback(), tmp_path / name
    run.folder.mkdir()
    evaluate = watcher.evaluate
    watcher.evaluate = lambda *arguments: made.append(1) or evaluate(*arguments)
    watcher.before_train(run)
    return watcher.before, bool(made)


def test_the_evaluation_before_is_kept_for_the_next_run(run, few_steps, cache, tmp_path, capsys):
    run.reward = get_reward("2*warmth-0.1*colorfulness")
    (first, made), (again, made_again) = begun(run, tmp_path, "first"), begun(run, tmp_path, "again")
    assert made and not made_again and "evaluation before: known already" in capsys.readouterr().out
    for own in (False, True):
        assert torch.equal(first[own].rewards, again[own].rewards) and first[own].steps == again[own].steps
        assert (first[own].images - again[own].images).abs().max() < 0.01  # eight bits
    assert read_evaluations(tmp_path / "again" / "evaluation_before.pt")[True].pairs == again[True].pairs
    run.prompts = ["a dog", "a cat"]
    assert begun(run, tmp_path, "others")[1]
    (path,) = set(cache.glob("*")) - {module._users_copy(module._evaluation_key(run, EvaluationCallback().pairs(run)))}
    path.write_bytes(path.read_bytes()[:100])
    run.prompts = PROMPTS
    assert begun(run, tmp_path, "damaged")[1] and not begun(run, tmp_path, "mended")[1]


def test_a_reward_of_the_users_is_asked_every_time(run, few_steps, cache, tmp_path):
    assert all(begun(run, tmp_path, name)[1] for name in ("first", "again"))
    run.reward = get_reward(lambda images, prompts: redness(images, prompts))
    assert begun(run, tmp_path, "lambda")[1] and not cache.exists()


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(run, few_steps, cache, tmp_path, monkeypatch):
    run.reward = get_reward("warmth")
    cache.write_text("a file where the folder should be")
    assert all(begun(run, tmp_path, name)[1] for name in ("first", "again"))
    monkeypatch.setenv("SDPO_NB_CACHE", "")
    assert begun(run, tmp_path, "nowhere")[1]


def test_half_the_pairs_at_fifty_steps(run):
    run.config = replace(run.config, eval_samples=256)
    pairs = EvaluationCallback().pairs(run)
    assert pairs[False] == {1: 256, 2: 256, 4: 256, 8: 256, 16: 256, 50: 128}
    assert pairs[True] == {1: 64, 2: 64, 4: 64, 8: 64, 16: 64, 50: 32}


def test_both_tables_speak_of_the_same_pairs(run, monkeypatch):
    "16 pairs of 40 prompts, 4 of them with the pipeline's own scheduler; drawn, not the head of the list"
    monkeypatch.setattr(module, "step_generalization", partial(step_generalization, steps=(1,)))
    run.prompts, run.config = [f"cat {index}" for index in range(40)], replace(run.config, eval_samples=16)
    watcher = EvaluationCallback()
    watcher.before_train(run)
    trained, own = (watcher.before[own] for own in (False, True))
    assert len(trained.prompts) == 16 and len(own.prompts) == 4 and set(own.prompts) < set(trained.prompts)
    assert sorted(int(prompt[4:]) // 10 for prompt in own.prompts) == [0, 1, 2, 3]


def test_the_evaluation_says_how_far_it_is(run, few_steps, capsys, monkeypatch):
    "In a file a line for each step count; on a screen a bar that is closed"
    monkeypatch.setattr(module, "possible_steps", lambda policy: [1, 3])
    monkeypatch.setattr(module, "usual_steps", [1, 3])
    watch(EvaluationCallback(), run)
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(",")[0] for line in lines[:4]] == [
        "evaluation before: 1 step, 21%",
        "evaluation before: 3 steps, 83%",
        "evaluation before: 1 step, 88%",
        "evaluation before: 3 steps, 100%",
    ]
    assert all(re.search(r", \d\d:\d\d left$", line) for line in lines[:4]) and "evaluation after: 1 step" in lines[-4]
    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    watcher = EvaluationCallback()
    watcher.before_train(run)
    assert screen.getvalue() == ""  # the file is there: nothing to be done
    watcher.after_train(run)
    assert "evaluation after" in screen.getvalue() and "24/24" in screen.getvalue() and screen.getvalue()[-1] == "\n"


def test_step_counts_that_a_model_cannot_do_are_left_out(make, random_folder, tmp_path, capsys):
    "A consistency model that was distilled for 25 timesteps: trained, evaluated and reported, with one note"
    policy = load_policy(consistency_folder(random_folder), device="cpu")
    config = TrainConfig(**SIZES | dict(num_steps=2, eval_samples=2, output_dir=str(tmp_path / "lcm")))
    Trainer(policy, redness, PROMPTS, config, [EvaluationCallback(), ReportCallback()]).train()
    found, out = read_json(tmp_path / "lcm/evaluation.json"), capsys.readouterr().out
    assert found["steps"] == found["own_scheduler"]["steps"] == [1, 2, 4, 8, 16]
    assert out.count("cannot do 50 steps") == 1


def consistency_folder(random_folder):
    "A random pipeline with the scheduler of a consistency model that knows 25 timesteps"
    folder = random_folder()
    scheduler = LCMScheduler(original_inference_steps=25, beta_schedule="scaled_linear")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = scheduler
    pipeline.save_pretrained(folder)
    return folder


# --- pictures in place


@pytest.fixture
def shown(monkeypatch):
    "Every picture that a notebook would be sent, by the place where it stands"
    places = []

    class Place(list):
        def update(self, picture):
            self.append(picture)

    def display(picture, display_id):
        assert display_id is True
        places.append(Place([picture]))
        return places[-1]

    monkeypatch.setattr("IPython.display.display", display)
    return places


def test_a_figure_takes_the_place_of_its_predecessor(shown):
    first, second = Figure(figsize=(2, 1)), Figure(figsize=(2, 1))
    second.add_subplot()
    assert show_in_place(show_in_place(None, first), second) is shown[0]
    assert [(picture.width, picture.height) for picture in shown[0]] == [(160, 80)] * 2
    assert shown[0][0].data != shown[0][1].data


def same_generators(first, second):
    "Are the random states of two checkpoints, or of this process at two times, equal?"
    python = first["python"] == second["python"] and first["numpy"] == second["numpy"]
    return python and first["torch"].equal(second["torch"])


def equal(first, second):
    "Are two states equal, tensors bit by bit?"
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[name], second[name]) for name in first)
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def test_watching_changes_nothing(make, tmp_path, shown):
    "Weights, log, and every random generator, straight on and after a resume that is watched too"
    settings = dict(reward=noisy_redness, epochs=4, checkpoint_every=2, num_steps=3, kl_coefficient=0.1)
    torch.manual_seed(5)
    blind = make(**settings, output_dir=str(tmp_path / "blind"))
    blind.train()
    torch.manual_seed(5)
    watched = make(**settings, output_dir=str(tmp_path / "watched"), callbacks=[LiveCallback()])
    watched.train()
    assert len(shown) == 2
    states = random_states()
    torch.manual_seed(5)
    make(**{**settings, "epochs": 2}, callbacks=[LiveCallback()]).train()
    torch.manual_seed(7)
    resumed = make(**settings, resume=str(tmp_path / "run"), callbacks=[LiveCallback()])
    resumed.train()
    for other in (watched, resumed):
        assert same_weights(blind, other) and other.policy.denoiser.training == blind.policy.denoiser.training
        assert without_clock(other.folder) == without_clock(blind.folder)
        (mine,), (its,) = (newest_checkpoint(folder)["random"] for folder in (blind.folder, other.folder))
        assert mine["torch"].equal(its["torch"])
        assert equal(other.normalizer.state_dict(), blind.normalizer.state_dict())
    assert same_generators(states, random_states())


class EveryEpoch(LiveCallback):
    "Draws without regard to the time it takes"

    def after_epoch(self, run, metrics):
        self.due = 0.0
        super().after_epoch(run, metrics)


def test_pictures_stay_in_their_places_and_keep_their_size(make, shown):
    watcher = EveryEpoch()
    trainer = make(epochs=4, learning_rate=1e-2, callbacks=[watcher])
    trainer.train()
    curves, grids = shown
    assert len(curves) == len(grids) == 4
    for place in shown:
        sizes = {Image.open(BytesIO(picture.data)).size for picture in place}
        assert sizes == {(2 * place[0].width, 2 * place[0].height)} and len({picture.data for picture in place}) == 4
    # four pairs at one step and as trained: before, the policy without its LoRA; now, the one that was trained
    assert watcher.steps == [1, 5] and watcher.before.shape[:2] == (2, 4) and watcher.pairs[0] == PROMPTS * 2
    with trainer.policy.without_lora():
        assert torch.equal(watcher.pictures(trainer), watcher.before)
    assert not torch.equal(watcher.pictures(trainer), watcher.before)


def test_looking_costs_a_twentieth_of_the_time(run, monkeypatch):
    clock, drawn = [0.0], []
    watcher = LiveCallback()
    watcher.before_train(run)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(watcher, "pictures", lambda run: watcher.before)

    def show(handle, figure):
        clock[0] += 1.5
        drawn.append(clock[0])  # two figures: three seconds

    monkeypatch.setattr(module, "show_in_place", show)
    metrics = {"epoch": 1, "samples": 8, "reward/mean": 0.0, "reward/std": 1.0}
    (run.folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    for _ in range(40):
        clock[0] += 15
        watcher.after_epoch(run, metrics)
    assert 0.04 < 1.5 * len(drawn) / clock[0] <= 0.055
    run.finished, before = (lambda: True), len(drawn)
    watcher.after_epoch(run, metrics)
    assert len(drawn) == before + 2  # the last epoch is always drawn


@pytest.mark.slow
def test_live_pictures_in_a_kernel(pipeline, tmp_path):
    "The default callbacks in a real kernel: two pictures, each sent once and replaced after that"
    code = f"""
import sys; sys.path.insert(0, {str(TESTS)!r})
from test_callbacks import *
module.LiveCallback = EveryEpoch
small = {{**SIZES, "num_steps": 3, "epochs": 3, "eval_samples": 0}}
config = TrainConfig(**small, output_dir={str(tmp_path / "run")!r})
Trainer(load_policy({str(pipeline)!r}, device='cpu'), redness, PROMPTS, config).train()"""
    sent = []

    class Watching(NotebookClient):
        def process_message(self, message, cell, index):
            if "display_id" in message["content"].get("transient", {}) and "image/png" in message["content"]["data"]:
                sent.append(message)
            return super().process_message(message, cell, index)

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    Watching(notebook, timeout=300, kernel_name="python3").execute()
    kinds = [message["msg_type"] for message in sent]
    assert kinds == ["display_data"] * 2 + ["update_display_data"] * 4
    outputs = [output for output in notebook.cells[0].outputs if "image/png" in output.get("data", {})]
    last = [message["content"]["data"] for message in sent[-2:]]
    assert [output["data"] for output in outputs] == last  # what is saved is the last one
    assert all(output["metadata"]["image/png"].keys() == {"width", "height"} for output in outputs)


# --- the report


def test_a_finished_run_is_a_folder(finished_run):
    files = "README.md checkpoints config.json evaluation.json lora metrics.jsonl pictures report.html"
    assert set(files.split()) <= {path.name for path in finished_run.iterdir()}
    result = read_json(finished_run / "evaluation.json")
    assert result["steps"] == [1, 2, 4, 8, 16, 50] and result["n"] == 4 and result["reward"] == "colorfulness"
    assert result["own_scheduler"]["steps"] == result["steps"] and set(result["gain"]) == {"mean", "se"}
    maps = "film_strip similarity_map reward_map advantage_map anchor_histogram"
    kept = {path.stem for path in (finished_run / "pictures").iterdir()}
    assert kept == {"step_grid", "step_grid_own", *maps.split()}
    assert "Not available" not in (finished_run / "report.html").read_text()
    assert "load_lora_weights" in (finished_run / "README.md").read_text()


def test_a_prompt_may_hold_anything(pipeline, tmp_path, capsys, few_steps):
    "Trained, drawn at each epoch, reported, resumed: `$$` used to end a run in its report, and again when resumed"
    prompts, name = ["$$", "price tag $20 #1 $30", r"\frac{1}{2} | `x` <b>", "# _a_\tcat"], "$$ | <i> `x`"
    where = dict(eval_samples=2, log_images_every=1)

    def trained(epochs, **settings):
        config = TrainConfig(**{**SIZES, **where, "epochs": epochs, **settings})
        reward = FunctionReward(redness, name)
        Trainer(load_policy(pipeline, device="cpu"), reward, prompts, config).train()

    trained(1, output_dir=str(tmp_path / "run"))
    trained(2, resume=str(tmp_path / "run"))
    text = (tmp_path / "run/report.html").read_text()
    assert "$$ | &lt;i&gt; `x`" in text and "<i>" not in text and "Not available" not in text
    assert r"\$\$ \| \<i> \`x\`" in (tmp_path / "run/README.md").read_text()
    assert len(list((tmp_path / "run/progress").glob("*.png"))) == 4
    lines = capsys.readouterr().out.splitlines()
    names = {"run folder": "", "LoRA": "lora", "pictures": "pictures", "look at": "report.html"}
    assert lines[-4:] == [f"{name:<12}{tmp_path / 'run' / place}" for name, place in names.items()]


@pytest.mark.parametrize("settings", [dict(recipe="ddpo"), dict(num_steps=2, queries="terminal")], ids=str)
def test_reports_of_other_recipes(make, tmp_path, settings):
    make(**settings, callbacks=[EvaluationCallback(), ReportCallback()]).train()
    pictures = {path.stem for path in (tmp_path / "run/pictures").iterdir()}
    assert {"film_strip", "advantage_map"} <= pictures and "step_grid" not in pictures


def made_up_rollout(trajectories, queries, latent=(4, 8, 8)):
    "A rollout of two groups of five steps, as any method leaves it"
    sizes = trajectories, 2, 5
    indices = torch.arange(queries).expand(*sizes[:2], queries).clone()
    return SimpleNamespace(
        pred_x0=torch.randn(*sizes, *latent),
        indices=indices,
        rewards=torch.rand(indices.shape),
        dense=torch.rand(sizes) if queries else None,
        advantages=torch.rand(sizes),
    )


@pytest.mark.parametrize("trajectories", [1, 2, 4])
@pytest.mark.parametrize("queries", [0, 1, 3, 5])
def test_figures_of_any_rollout(trajectories, queries):
    policy = SimpleNamespace(decode=lambda latents, batch_size: latents[:, :3].sigmoid())
    run = SimpleNamespace(policy=policy, last_rollout=made_up_rollout(trajectories, queries))
    figures = rollout_figures(run)
    maps = {"film_strip", "similarity_map", "advantage_map"} | ({"reward_map"} if queries else set())
    assert set(figures) == maps | ({"anchor_histogram"} if queries == 3 else set())
    assert len(rollout_strip(run).axes[0].get_yticks()) == trajectories


def test_figures_of_an_evaluation(run, few_steps):
    watch(EvaluationCallback(), run)
    grid, own = evaluation_figures(run).values()
    assert len(grid.axes) == len(own.axes) == 2


# --- trackers and pictures


def test_tensorboard_gets_numbers_and_pictures(make, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain = make(epochs=3, output_dir=str(tmp_path / "plain"))
    plain.train()
    watched = make(epochs=3, tracker="tensorboard", log_images_every=2)
    watched.train()
    assert same_weights(plain, watched) and without_clock(plain.folder) == without_clock(watched.folder)
    (events,) = (tmp_path / "run/tracker/sdpo_nb").glob("events*")
    log = EventAccumulator(str(events)).Reload()
    noted = [
        (record["epoch"], pytest.approx(record["reward/mean"]))
        for record in read_jsonl(watched.folder / "metrics.jsonl")
    ]
    assert [(event.step, event.value) for event in log.Scalars("reward/mean")] == noted
    for name in ("samples", "film_strip"):
        files = sorted((tmp_path / "run/progress").glob(f"{name}_*.png"))
        assert [path.stem[-6:] for path in files] == ["000002", "000003"]
        assert [event.step for event in log.Images(name)] == [2, 3]
        with Image.open(files[0]) as picture:
            assert (log.Images(name)[0].width, log.Images(name)[0].height) == picture.size


class Notebook(GeneralTracker):
    "A tracker that remembers what it is told; it goes by the name of another, to stand in for it"

    requires_logging_directory = False

    def __init__(self, name, calls):
        self.name, self.calls = name, calls
        super().__init__()

    @property
    def tracker(self):
        return self.calls

    def store_init_configuration(self, values):
        self.calls.append(("settings", values["num_steps"]))

    def log(self, values, step=None, **options):
        self.calls.append((step, set(values)))

    def log_images(self, values, step=None, **options):
        self.calls.append((step, {name: value.shape[-1] for name, value in values.items()}))

    def finish(self):
        self.calls.append("finished")


@pytest.fixture
def notebook(monkeypatch):
    "The tracker `notebook`, added in the one place where trackers are known; the calls it gets"
    calls = []
    entry = Tracker("accelerate", make=lambda run: Notebook("notebook", calls))
    monkeypatch.setitem(trackers, "notebook", entry)
    return calls


def test_a_tracker_is_added_in_one_place(make, notebook):
    assert tracker_names() == ["none", "tensorboard", "wandb", "notebook"]
    make(tracker="notebook", log_images_every=1).train()
    settings, numbers, *pictures = notebook
    assert settings == ("settings", 5) and numbers[0] == 1 and {"reward/mean", "loss", "samples"} <= numbers[1]
    assert pictures == [(1, {"samples": 3}), (1, {"film_strip": 3}), "finished"]


def test_a_resumed_run_stays_one_curve_for_weights_and_biases(make, monkeypatch, tmp_path):
    "By a stand-in for the package: accelerate starts its tracker with these arguments"
    stand_in = Tracker("accelerate", make=lambda run: Notebook("wandb", []), options=trackers["wandb"].options)
    monkeypatch.setitem(trackers, "wandb", stand_in)

    def started(**settings):
        trainer, told = make(tracker="wandb", **settings), []
        start = trainer.accelerator.init_trackers
        monkeypatch.setattr(
            trainer.accelerator, "init_trackers", lambda *given: (told.append(given[-1]), start(*given))
        )
        trainer.train()
        return told[0]["wandb"]

    first = started(epochs=1)
    assert first["resume"] == "allow" and first["name"] == "run" and first["dir"] == str(tmp_path / "run")
    assert started(epochs=2, resume=str(tmp_path / "run")) == first  # one curve, not two
