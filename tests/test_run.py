"""A run and its folder: what it holds at any moment, and what accidents, bad gradients and small machines do to it."""

import errno
import json
import math
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from comparisons import same_weights, weights, without_clock
from diffusers import AutoencoderTiny
from PIL import Image
from processes import Child
from random_pipelines import stock_pipeline
from small_runs import PROMPTS, SMALL, first_gradient, learn, noisy_redness, redness, rolled, small_trainer

import sdpo_nb.run as run_module
from sdpo_nb.cli import sample_command, train_command
from sdpo_nb.config import TrainConfig, preset_config, resolve
from sdpo_nb.evaluate import step_generalization
from sdpo_nb.files import read_json, read_jsonl
from sdpo_nb.models import load_policy
from sdpo_nb.prompts import animals
from sdpo_nb.rewards import RewardError, checked
from sdpo_nb.run import Callback, _checkpoint_format, _most_skipped, _read_checkpoint, newest_checkpoint, run_config
from sdpo_nb.trainer import Trainer


@pytest.fixture
def make(pipeline, tmp_path):
    "Make a trainer of a small run"
    return partial(small_trainer, pipeline, tmp_path)


@pytest.fixture(scope="module")
def straight(pipeline, tmp_path_factory):
    "A finished run of four epochs that nothing has disturbed, with all its checkpoints; only read it"
    settings = dict(epochs=4, checkpoint_every=1, keep_checkpoints=9)
    trainer = small_trainer(pipeline, tmp_path_factory.mktemp("straight"), **settings)
    trainer.train()
    return trainer


@pytest.fixture
def resume(make, tmp_path):
    "Go on with what is in the folder `run`"
    return partial(make, resume=str(tmp_path / "run"))


def same(one, other):
    "Are two states equal, bit by bit?"
    if torch.is_tensor(one):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def is_intact(folder, straight, epoch):
    "Is the newest state in a folder that of the undisturbed run after this epoch?"
    found = newest_checkpoint(folder)
    expected = _read_checkpoint(straight.folder / f"checkpoints/epoch_{epoch:06d}.pt")
    assert found["counts"]["epoch"] == epoch
    return all(same(found[name], expected[name]) for name in ("weights", "optimizer", "scaler", "counts", "extra"))


def same_run(one, other):
    "Have two runs the same weights and the same log, bit by bit?"
    return same_weights(one, other) and without_clock(one.folder) == without_clock(other.folder)


# --- going on


@pytest.mark.parametrize(
    "settings",
    [
        dict(epochs=4, checkpoint_every=2),
        dict(epochs=2, micro_batch=1, pairs_per_epoch=2, reward_worker=True, anchor="random", num_steps=4),
        dict(epochs=2, precision="fp16"),
    ],
    ids=str,
)
def test_resume_is_exact(make, resume, tmp_path, settings):
    "With a reward that draws from the global generator"
    settings, epochs = dict(reward=noisy_redness, **settings), settings["epochs"]
    torch.manual_seed(5)
    whole = make(**settings, output_dir=str(tmp_path / "whole"))
    whole.train()
    torch.manual_seed(5)
    make(**{**settings, "epochs": epochs // 2}).train()
    torch.manual_seed(7)
    resumed = resume(**settings)
    assert resumed.train()["epoch"] == epochs
    assert same_run(whole, resumed) and resumed.counts == whole.counts
    assert same(resumed.normalizer.state_dict(), whole.normalizer.state_dict())
    assert resumed.scaler.state_dict() == whole.scaler.state_dict()
    assert read_json(tmp_path / "run/config.json")["epochs"] == epochs
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == [f"epoch_{epoch:06d}.pt" for epoch in (epochs // 2, epochs)]


class Evaluates(Callback):
    "Asks the reward about some pictures, as an evaluation does"

    def before_train(self, run):
        step_generalization(run.policy, run.reward, PROMPTS, steps=[1], samples=2)


def test_resume_is_exact_where_the_evaluation_draws_before_the_first_epoch(make, resume, tmp_path):
    "The first state is saved before the evaluation, whose reward draws from the same generator as the training's"
    settings = dict(reward=noisy_redness, epochs=2, callbacks=[Evaluates()])
    torch.manual_seed(5)
    whole = make(**settings, output_dir=str(tmp_path / "whole"))
    whole.train()
    torch.manual_seed(5)
    stopped = make(**settings)
    stopped.credit = lambda rollout: raises(Killed)(rollout, PROMPTS)  # in the first epoch
    with pytest.raises(Killed):
        stopped.train()
    torch.manual_seed(7)
    resumed = resume(**{**settings, "callbacks": []})  # the table of before is read, not made again
    resumed.train()
    assert same_run(whole, resumed)


@pytest.mark.parametrize("wanted", [False, True])
def test_deterministic_kernels_last_as_long_as_the_run(make, wanted):
    "Whatever the user has chosen before comes back, also after a failure"
    seen = []

    class Watch(Callback):
        def after_epoch(self, run, metrics):
            seen.append(torch.are_deterministic_algorithms_enabled())
            raise KeyError("an accident")

    for before in (False, True):
        torch.use_deterministic_algorithms(before)
        try:
            with pytest.raises(KeyError):
                make(deterministic=wanted, callbacks=[Watch()], overwrite=True).train()
            assert torch.are_deterministic_algorithms_enabled() == before
        finally:
            torch.use_deterministic_algorithms(False)
    assert seen == [wanted, True]


def test_settings_may_be_paths_and_numpy_numbers(make, tmp_path):
    "They must not make the checkpoint unreadable"
    make(output_dir=tmp_path / "run", learning_rate=np.float64(1e-3)).train()
    assert make(resume=tmp_path / "run", learning_rate=1e-3, epochs=2).train()["epoch"] == 2


def test_what_cannot_be_resumed(straight, resume, tmp_path):
    run = shutil.copytree(straight.folder, tmp_path / "run")
    newest = run / "checkpoints/epoch_000004.pt"
    state = _read_checkpoint(newest)
    with pytest.raises(ValueError, match="reward is 'noisy_redness', but the run"):
        resume(reward=noisy_redness).train()
    for damaged, sentence in [
        (state | {"random": 2 * state["random"]}, "The run was started on 2 processes, not 1; use as many"),
        (state | {"format": "sdpo_nb checkpoint 1"}, "was written by an older sdpo_nb; go on with that, or start anew"),
        ({"weights": torch.ones(2)}, "was not written by sdpo_nb; give the folder of one of its runs. Delete it to go"),
    ]:
        torch.save(damaged, newest)
        with pytest.raises(ValueError, match=sentence):
            resume().train()
    for path in newest.parent.glob("epoch_00000[0-3].pt"):
        path.unlink()
    newest.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read .*damaged. There is no earlier one; start the run anew"):
        resume().train()
    assert same(without_clock(run), without_clock(straight.folder)) and state["format"] == _checkpoint_format
    torch.save(state, newest)
    assert resume(epochs=5).train()["epoch"] == 5


def test_refusals_leave_nothing_on_disk(make, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for settings, sentence in [
        (dict(num_steps=1), "expected signal is zero"),
        (dict(prompts=[]), "at least one string"),
        (dict(reward="no_such_reward"), "no_such_reward"),
        (dict(push_to_hub="me/mine"), "nobody is logged in to the hub here; run `hf auth login` first"),
        (dict(policy=load_policy("tiny", device="cpu"), precision="bf16"), "policy was loaded in 'fp32'"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            make(**settings)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not the folder of a run; choose another"):
        make().train()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_settings_read_back(straight, make, pipeline, tmp_path):
    settings = json.loads((straight.folder / "config.json").read_text())
    assert settings["reward"] == "redness" and settings["policy"] == str(pipeline) and settings["prompts"] == PROMPTS
    assert {"sdpo_nb", "torch", "diffusers", "python"} <= settings["versions"].keys()
    config = run_config(straight.folder, TrainConfig)
    assert config == replace(straight.config, resume=None) and resolve(config) == config
    run = shutil.copytree(straight.folder, tmp_path / "run")
    changed = replace(config, resume=str(run), epochs=5)
    assert Trainer(load_policy(config.policy, device="cpu"), redness, config.prompts, changed, []).train()["epoch"] == 5
    for prompts in ("animals", list(animals)):
        assert make(prompts=prompts).config.prompts == "animals"
    (run / "config.json").write_text('{"policy": "tiny"}')
    with pytest.raises(ValueError, match="lacks recipe"):
        run_config(run)


def test_patience(make):
    level = [0.0]

    def falling(images, prompts):
        level[0] -= 1
        return redness(images, prompts) + level[0]

    trainer = make(reward=falling, epochs=20, patience=2, checkpoint_every=20)
    assert trainer.train()["epoch"] == 3
    assert newest_checkpoint(trainer.folder)["counts"]["stale_epochs"] == 2


def test_dry_run(make, tmp_path, capsys):
    assert make(dry_run=True).train() is None
    assert "trajectories per epoch" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_the_lora_of_a_run_loads_with_plain_diffusers(make, pipeline, tmp_path):
    trainer = make(learning_rate=1e-2, lora_rank=2, lora_alpha=8.0)
    trainer.train()
    plain = stock_pipeline(pipeline)
    plain.load_lora_weights(tmp_path / "run/lora")
    latents, embedding = torch.randn(2, 4, 8, 8), trainer.policy.embed(PROMPTS)
    with torch.no_grad():
        ours = trainer.policy.predict(latents, 500, embedding)
        with trainer.policy.without_lora():
            before = trainer.policy.predict(latents, 500, embedding)
        torch.testing.assert_close(plain.unet(latents, 500, embedding.prompt_embeds).sample, ours)
    assert (ours - before).abs().max() > 1e-4


# --- stops of every kind


class Killed(Exception):
    pass


class KillAfter(Callback):
    "The power fails after an epoch"

    def __init__(self, epoch):
        self.epoch = epoch

    def after_epoch(self, run, metrics):
        if metrics["epoch"] == self.epoch:
            raise Killed


def test_an_accident_costs_nothing_but_time(straight, make, resume, tmp_path):
    with pytest.raises(Killed):
        make(epochs=4, checkpoint_every=2, callbacks=[KillAfter(3)]).train()
    assert is_intact(tmp_path / "run", straight, 3)
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"epoch": 4, "samp')
    (tmp_path / "run/checkpoints/.epoch_000004.pt.0123").write_bytes(b"half a checkpoint")
    resumed = resume(epochs=4, checkpoint_every=2)
    resumed.train()
    assert same_run(straight, resumed)


def kill(*_):
    "No handler runs, nothing is flushed"
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in(place, name, calls):
    "At the start of a call, counted from 1"
    work, count = getattr(place, name), iter(range(1, 10**6))

    def counting(*args, **kwargs):
        if next(count) == calls:
            kill()
        return work(*args, **kwargs)

    setattr(place, name, counting)


class Clock(Callback):
    "Some seconds after the beginning"

    def __init__(self, seconds):
        self.seconds = seconds

    def before_train(self, run):
        threading.Timer(self.seconds, kill).start()


KILLED_IN = {  # the place, which of its calls (config and log are written, too), and the epoch that is on the disk
    "updating": (Trainer, "optimizer_step", 10, 2),
    "writing": (os, "replace", 5, 1),
    "sampling": (Trainer, "sample", 3, 2),
    "writing aside": (os, "fsync", 7, 1),
    "cleaning up": (Path, "unlink", 6, 2),
}


def train_until_killed(pipeline, folder, moment):
    "What the process does that is killed"
    settings = dict(epochs=4, checkpoint_every=1)
    if moment in KILLED_IN:
        kill_in(*KILLED_IN[moment][:3])
    else:
        settings |= dict(epochs=1000, callbacks=[Clock(moment)])
    small_trainer(pipeline, folder, **settings).train()


@pytest.mark.parametrize(
    "moment", ["updating", "writing", *(pytest.param(m, marks=pytest.mark.slow) for m in [*KILLED_IN][2:] + [0.3, 0.9])]
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(straight, make, resume, pipeline, tmp_path, moment):
    "SIGKILL: the resumed run has the weights and the log of an uninterrupted one, bit for bit"
    child = Child(train_until_killed, str(pipeline), str(tmp_path), moment, folder=tmp_path)
    assert child.wait(120) == -signal.SIGKILL, child.said
    reached = newest_checkpoint(tmp_path / "run")["counts"]["epoch"]
    if moment in KILLED_IN:
        assert reached == KILLED_IN[moment][3]
    resumed = resume(epochs=max(4, reached + 1), checkpoint_every=1)
    resumed.train()
    if resumed.epoch > 4:
        straight = make(epochs=resumed.epoch, output_dir=str(tmp_path / "straight"))
        straight.train()
    assert same_run(straight, resumed)


def command(words):
    "What a shell starts: `sdpo-train` with these words"
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # background jobs are deaf to it, and children inherit that
    raise SystemExit(train_command(words))


def wait_for_epochs(path, child, number=2):
    for _ in range(6000):
        if path.is_file() and len(read_jsonl(path)) >= number:
            return
        assert child.wait(0.02) is None, child.said


@pytest.mark.parametrize("number, status, word", [("SIGTERM", 143, "terminated"), ("SIGINT", 130, "interrupted")])
def test_signals_save_and_say_how_to_go_on(pipeline, tmp_path, monkeypatch, number, status, word):
    "checkpoint_every is out of reach: what is saved is saved because of the signal"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    settings = SMALL | dict(policy=pipeline, prompts=tmp_path / "prompts.txt", reward="warmth", checkpoint_every=10**5)
    settings |= dict(num_steps=2, pairs_per_epoch=2)
    words = ["tiny", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]
    child = Child(command, [*words, "--epochs", "100000", "--output_dir", "run"], folder=tmp_path)
    wait_for_epochs(tmp_path / "run/metrics.jsonl", child)
    os.kill(child.pid, getattr(signal, number))
    assert (child.wait(60), child.said) == (status, f"sdpo-train: {word}; go on with sdpo-train --resume run\n")
    done = newest_checkpoint(tmp_path / "run")["counts"]["epoch"]
    assert done >= 1  # the second epoch may have been about to be written
    assert train_command(["--resume", "run", "--epochs", str(done + 1)]) == 0
    assert train_command([*words, "--epochs", str(done + 1), "--output_dir", "straight"]) == 0
    assert without_clock(tmp_path / "run") == without_clock(tmp_path / "straight")
    assert same(*(newest_checkpoint(tmp_path / name)["weights"] for name in ("run", "straight")))


class Redness:
    "A reward that does something else from some call on; SMALL makes one call an epoch"

    name = "redness"

    def __init__(self, otherwise, after=0):
        self.otherwise, self.after, self.calls = otherwise, after, 0

    def __call__(self, images, prompts):
        self.calls += 1
        return redness(images, prompts) if self.calls <= self.after else self.otherwise(images, prompts)


def test_a_termination_in_the_middle_of_an_epoch(straight, make, resume, tmp_path):
    def stop(images, prompts):
        os.kill(os.getpid(), signal.SIGTERM)
        return redness(images, prompts)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="terminated"):
        make(reward=Redness(stop, after=2), epochs=4, checkpoint_every=100).train()
    assert signal.getsignal(signal.SIGTERM) == before
    written = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert written == ["epoch_000000.pt", "epoch_000002.pt"] and is_intact(tmp_path / "run", straight, 2)
    resumed = resume(epochs=4, checkpoint_every=100)
    resumed.reward_given_anew = True  # without the accident
    resumed.train()
    assert same_run(straight, resumed)


def test_a_full_disk_leaves_the_checkpoint_before(straight, make, resume, tmp_path, monkeypatch):
    real = run_module.atomic_write

    def write(path, data):
        if Path(path).name >= "epoch_000002.pt":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "atomic_write", write)
        with pytest.raises(OSError, match="No space left"):
            make(epochs=4, checkpoint_every=1).train()
    assert is_intact(tmp_path / "run", straight, 1) and not list((tmp_path / "run/checkpoints").glob(".*"))
    resumed = resume(epochs=4, checkpoint_every=1)
    resumed.train()
    assert same_run(straight, resumed)


def test_a_run_that_cannot_be_sent_is_finished_all_the_same(make, tmp_path, monkeypatch):
    def refuse(self, *args, **options):
        raise ConnectionError("offline")

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    sentence = "is finished, but could not be sent to 'me/mine' .ConnectionError: offline.; send it again with"
    with pytest.raises(OSError, match=sentence):
        make(push_to_hub="me/mine").train()
    assert (tmp_path / "run/lora").is_dir() and newest_checkpoint(tmp_path / "run")["counts"]["epoch"] == 1
    assert read_json(tmp_path / "run/config.json")["push_to_hub"] == "me/mine"


# --- rewards that fail


def raises(error):
    def misbehave(images, prompts):
        raise error

    return misbehave


def sleeps(images, prompts):
    time.sleep(3)


MISBEHAVIOUR = {
    "raises": (raises(KeyError("score")), r"failed: KeyError: 'score' \(in test_run.py, line \d+\)"),
    "no connection": (raises(ConnectionError("refused")), "failed, twice: ConnectionError: refused"),
    "hangs": (sleeps, "has not answered within 0.5 seconds"),
    "nan": (lambda images, prompts: redness(images, prompts) * math.nan, "returned nan for image 0"),
    "shape": (lambda images, prompts: redness(images, prompts)[1:], r"returned"),
    "text": (lambda images, prompts: ["good"] * len(images), "returned"),
}


@pytest.mark.parametrize("misbehaviour", MISBEHAVIOUR)
def test_a_reward_that_fails_stops_the_run_with_its_last_state_intact(
    straight, make, resume, tmp_path, monkeypatch, misbehaviour
):
    monkeypatch.setattr("sdpo_nb.rewards._retry_after", 0.0)
    misbehave, sentence = MISBEHAVIOUR[misbehaviour]
    with pytest.raises(RewardError, match=f"reward 'redness' {sentence}"):
        make(reward=Redness(misbehave, after=2), epochs=4, checkpoint_every=100, reward_timeout=0.5).train()
    assert is_intact(tmp_path / "run", straight, 2)
    if misbehaviour == "raises":  # what is done about an accident does not depend on its kind
        resumed = resume(epochs=4)
        with pytest.raises(ValueError, match="reward 'redness' computes something else than it did for the run"):
            resumed.train()
        resumed.reward_given_anew = True
        resumed.train()
        assert same_run(straight, resumed)


def test_what_may_pass_is_asked_once_more(monkeypatch):
    monkeypatch.setattr("sdpo_nb.rewards._retry_after", 0.0)
    images, read_timeout = torch.rand(2, 3, 4, 4), type("ReadTimeout", (Exception,), {})
    for error, calls in [(ConnectionError, 2), (OSError, 2), (TimeoutError, 2), (read_timeout, 2), (TypeError, 1)]:
        flaky = Redness(raises(error("x")))
        with pytest.raises(RewardError, match="reward 'redness' failed"):
            checked(flaky, images, PROMPTS)
        assert flaky.calls == calls
    once = Redness(lambda images, prompts: raises(OSError("x"))(0, 0) if once.calls == 1 else redness(images, prompts))
    assert torch.equal(checked(once, images, PROMPTS), redness(images, PROMPTS)) and once.calls == 2


def test_a_slow_reward_runs_without_gradient_and_a_fast_one_is_not_stopped():
    weight, images = torch.ones(1, requires_grad=True), torch.rand(2, 3, 4, 4)
    scores = checked(lambda images, prompts: weight * images.mean((1, 2, 3)), images, PROMPTS, timeout=30.0)
    assert scores.shape == (2,) and not scores.requires_grad


# --- gradients that are not finite, half precision


def test_gradients_that_are_not_finite(make):
    trainer, broken = make(kl_coefficient=1.0), []
    trainer.divergence = lambda rollout, part, output: output.mean() * (math.nan if broken else 0.0)
    rollout = rolled(trainer)
    learn(trainer, rollout)
    made, before = trainer.counts["optimizer_steps"], weights(trainer)
    broken.append(True)
    with pytest.raises(RuntimeError, match=f"infinite or NaN {_most_skipped} times in a row.*lower learning_rate"):
        for _ in range(9):
            learn(trainer, rollout)
    assert trainer.counts["skipped_updates"] == _most_skipped and trainer.counts["optimizer_steps"] == made
    assert same(weights(trainer), before)
    assert all(state["exp_avg"].isfinite().all() for state in trainer.optimizer.state.values())
    broken.clear()
    learn(trainer, rollout)
    assert trainer.counts["skipped_in_a_row"] == 0


def test_an_infinite_loss_is_skipped_even_where_its_gradient_is_flat(make):
    trainer = make(pairs_per_update=4)
    rollout, before, loss = rolled(trainer), weights(trainer), trainer.objective.loss
    infinite = lambda *args, **options: 0 * loss(*args, **options) + math.inf  # noqa: E731
    trainer.objective = replace(trainer.objective, loss=infinite)
    learn(trainer, rollout)
    assert trainer.counts["skipped_updates"] == 2 and trainer.counts["optimizer_steps"] == 0
    assert same(weights(trainer), before)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision(make, precision):
    "Weights in half precision, log-probabilities and LoRA in float32"
    trainer = make(precision=precision, epochs=2)
    start, metrics = weights(trainer), trainer.train()
    assert trainer.policy.dtype == trainer.last_rollout.latents.dtype != torch.float32
    assert metrics["log_ratio/max_before_update"] <= trainer.log_ratio_bound() and metrics["skipped_updates"] == 0
    assert math.isfinite(metrics["loss"]) and trainer.last_rollout.log_prob.dtype == torch.float32
    assert metrics.get("loss_scale") == (2.0**12 if precision == "fp16" else None)
    assert all(value.dtype == torch.float32 for value in weights(trainer).values()) and not same(
        weights(trainer), start
    )


def test_the_loss_scale_falls_and_rises(make, tmp_path):
    "The gradient does not depend on it, and a resumed run has it still"

    def step(trainer, size):
        loss = size * sum(parameter.sum() for parameter in trainer.parameters)
        trainer.accelerator.backward(trainer.scaler.scale(loss))
        return trainer.optimizer_step()

    trainer = make(precision="fp16")
    trainer.scaler.set_growth_interval(3)
    numbers, scales, norms = sum(parameter.numel() for parameter in trainer.parameters), [], []
    for finite in (True, True, False, True, True, True, True, True, True, False):
        norms.append(step(trainer, 1.0 if finite else math.inf))
        scales.append(trainer.scaler.get_scale() / 2**12)
    assert scales == [1, 1, 0.5, 0.5, 0.5, 1, 1, 1, 2, 1] and trainer.counts["skipped_updates"] == 2
    assert [norm for norm in norms if math.isfinite(norm)] == pytest.approx([numbers**0.5] * 8)
    step(trainer, math.inf)
    trainer.take_snapshot()
    trainer.write_snapshot()
    again = make(precision="fp16")
    again.load_checkpoint(newest_checkpoint(tmp_path / "run"))
    assert again.scaler.get_scale() == 2**11 and again.counts["skipped_in_a_row"] == 2
    exact = make()
    step(exact, math.inf)
    assert exact.scaler.get_scale() == 1 and exact.counts["skipped_updates"] == 1


# --- memory


def test_the_device_may_change_within_a_process(make):
    "After a trainer on a GPU, one on the CPU: accelerate refuses another device than the first of its process"
    Accelerator(cpu=True)
    gpu = torch.device("cuda", 0)
    PartialState._shared_state["device"] = AcceleratorState._shared_state["device"] = gpu
    trainer = make()
    assert trainer.accelerator.device.type == "cpu"
    trainer.train()
    run_module._forget_other_device(gpu)  # a trainer on a GPU after this one
    assert not PartialState._shared_state and not AcceleratorState._shared_state


def test_processes_that_train_together_keep_their_device():
    state = PartialState(cpu=True)
    state.num_processes = 2
    try:
        run_module._forget_other_device(torch.device("cuda", 0))
        assert PartialState._shared_state["device"].type == "cpu"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_smaller_gpu_may_go_on(make, resume, tmp_path):
    "Smaller pieces and recomputed activations: the same updates, up to rounding"
    make().train()
    resumed = resume(epochs=2, micro_batch=1, gradient_checkpointing=True)
    assert resumed.train()["epoch"] == 2 and run_config(tmp_path / "run").micro_batch == 1


def kept_bytes(trainer, rollout):
    "What one update stores for its backward pass, and its gradient"
    total = [0]

    def pack(tensor):
        total[0] += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradient = first_gradient(trainer, rollout)
    return total[0], gradient


def test_gradient_checkpointing_keeps_less_and_changes_nothing(make):
    plain, saving = make(), make(gradient_checkpointing=True)
    rollout = rolled(plain)
    (kept, gradient), (less, again) = (kept_bytes(trainer, rollout) for trainer in (plain, saving))
    assert less < 0.6 * kept and torch.equal(gradient, again) and gradient.abs().max() > 0
    rollout = rolled(saving)
    assert torch.equal(saving.all_log_probs(rollout)[..., :2], rollout.log_prob[..., :2])


def test_a_small_decoder_for_the_reward(make, tmp_path):
    widths, blocks = (("encoder_block_out_channels", "decoder_block_out_channels"), (8, 8)), (1, 1)
    sizes = {name: widths[1] for name in widths[0]} | dict(num_encoder_blocks=blocks, num_decoder_blocks=blocks)
    small = AutoencoderTiny(latent_channels=4, **sizes).eval()
    small.save_pretrained(tmp_path / "small")
    trainer = make(reward_vae=str(tmp_path / "small"))
    rollout = rolled(trainer)
    with torch.no_grad():
        images = (small.decode(rollout.pred_x0[1, :, -1]).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(rollout.rewards[1, :, -1], redness(images, None), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rollout.rewards, rolled(make()).rewards)
    assert not any(parameter.requires_grad for parameter in trainer.reward_vae.parameters())
    with pytest.raises(OSError, match="Could not load"):
        make(reward_vae=str(tmp_path / "nowhere"))


def test_large_pictures_are_decoded_few_at_a_time(make, monkeypatch):
    trainer, sizes = make(), []
    decode = trainer.policy.decode

    def noted(latents, batch_size, vae=None):
        sizes.append(batch_size)
        return decode(latents, batch_size, vae)

    monkeypatch.setattr(trainer.policy, "decode", noted)
    monkeypatch.setattr(run_module, "decoded_pixels", 3 * 16 * 16)  # three pictures of this model
    rolled(trainer)
    assert set(sizes) == {3}


# --- LoRAs of several runs, and the whole network instead of a LoRA


def picture(*words):
    "What `sdpo-sample` draws with one step"
    assert sample_command([*words, "--samples", "1", "--num_steps", "1", "--output", "p.png"]) == 0
    with Image.open("p.png") as image:
        return np.asarray(image).astype(int)


@pytest.fixture(scope="module")
def runs(pipeline, tmp_path_factory):
    "Two finished runs of the same model"
    root = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate("ab"):
        settings = dict(learning_rate=3e-2, seed=seed, guidance_scale=3.0, lora_rank=2 + seed, lora_alpha=4.0)
        small_trainer(pipeline, root, output_dir=str(root / name), **settings).train()
    return root


def test_effects_of_loras_add_up(pipeline, runs):
    latents, base = torch.randn(2, 4, 8, 8), load_policy(pipeline, device="cpu")
    embedding = base.embed(PROMPTS)

    def deltas(*loras):
        "What is added to each weight"
        policy, found = load_policy(pipeline, device="cpu"), {}
        for number, (name, scale) in enumerate(loras):
            policy.load_lora(runs / name / "lora", scale, f"lora_{number}" if number else "default")
        for name, module in policy.denoiser.named_modules():
            if hasattr(module, "get_delta_weight"):
                found[name] = sum(module.get_delta_weight(adapter) for adapter in module.active_adapters)
        return policy, found

    (_, a), (_, b), (both, sums) = deltas(("a", 1.0)), deltas(("b", 1.0)), deltas(("a", 0.7), ("b", -0.3))
    assert a.keys() == b.keys() == sums.keys() and max(value.abs().max() for value in a.values()) > 1e-3
    for name in sums:
        torch.testing.assert_close(sums[name], 0.7 * a[name] - 0.3 * b[name])
    with torch.no_grad():
        original = base.predict(latents, 500, embedding)
        with both.without_lora():
            torch.testing.assert_close(both.predict(latents, 500, embedding), original)
        assert (both.predict(latents, 500, embedding) - original).abs().max() > 1e-4
        both.remove_lora()
        assert torch.equal(both.predict(latents, 500, embedding), original)


def test_several_loras_and_guidance_on_the_command_line(runs, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = str(runs / "a"), str(runs / "b")
    whole, both = picture(a, "a cat"), f"{a},{b}"
    assert abs(picture(f"{a},{a}", "a cat", "--scale", "0.5,0.5") - whole).max() <= 1
    assert abs(picture(both, "a cat", "--scale", "1,0") - whole).max() <= 1 < abs(picture(both, "a cat") - whole).max()
    guided, plain = (picture(a, "a cat", "--guidance_scale", scale) for scale in "30")
    assert np.array_equal(guided, whole) and not np.array_equal(plain, whole)  # as in the run
    capfd.readouterr()
    assert sample_command([f"{a},nowhere", "a cat"]) == 2 and "RUN_OR_LORA is 'nowhere'" in capfd.readouterr().err


def test_the_whole_unet_is_trained_resumed_saved_and_drawn_with(pipeline, make, resume, tmp_path, monkeypatch):
    settings = dict(lora_rank=0, learning_rate=1e-3, checkpoint_every=1, kl_coefficient=0.1)
    whole = make(epochs=2, output_dir=str(tmp_path / "whole"), **settings)
    metrics = whole.train()
    make(**settings).train()
    resumed = resume(epochs=2, **settings)
    resumed.train()
    assert same_run(whole, resumed) and metrics["kl"] > 0 and metrics["log_ratio/max_before_update"] == 0
    base, latents = load_policy(pipeline, device="cpu"), torch.randn(2, 4, 8, 8)
    assert weights(whole).keys() == dict(base.denoiser.named_parameters()).keys()
    assert not (tmp_path / "run/lora").exists()
    embedding = base.embed(PROMPTS)
    with torch.no_grad():
        original, trained = (policy.predict(latents, 500, embedding) for policy in (base, whole.policy))
        with whole.policy.without_lora():
            assert torch.equal(whole.policy.predict(latents, 500, embedding), original)
        stock = type(base.denoiser).from_pretrained(tmp_path / "whole/unet")
        assert torch.equal(stock(latents, 500, embedding.prompt_embeds).sample, trained)
        assert (trained - original).abs().max() > 1e-3
        assert torch.equal(base.load_whole(tmp_path / "whole/unet").predict(latents, 500, embedding), trained)
    monkeypatch.chdir(tmp_path)
    drawn, once, nothing = (picture("whole", "a cat", *words) for words in ([], ["--scale", "1"], ["--scale", "0"]))
    assert np.array_equal(drawn, once) and not np.array_equal(drawn, nothing)


@pytest.mark.slow
def test_resume_is_exact_with_the_shipped_model_and_rewards(tmp_path):
    "Three epochs, and one that goes on after two: the caches of the rewards must not show"

    def run(folder, **settings):
        sizes = dict(num_steps=4, eval_samples=0, checkpoint_every=1)
        config = preset_config("tiny", output_dir=str(tmp_path / folder), **sizes, **settings)
        trainer = Trainer(load_policy("tiny"), config.reward, config.prompts, config, callbacks=[])
        trainer.train()
        return trainer

    whole = run("whole", epochs=3)
    run("parts", epochs=2)
    assert same_run(whole, run("parts", epochs=3, resume=str(tmp_path / "parts")))
