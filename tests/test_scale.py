"""What long runs on large machines need: presets, prompts from datasets, trackers, stops of every kind, rewards that fail, memory, several LoRAs, the hub."""

import errno
import math
import os
import re
import signal
import subprocess
import sys
import time
import types
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from comparisons import same_weights, without_clock
from diffusers import AutoencoderTiny
from PIL import Image

import sdpo_nb.config as config_module
import sdpo_nb.rewards as rewards_module
import sdpo_nb.trainer as trainer_module
from sdpo_nb.cli import sample_command, train_command
from sdpo_nb.config import (
    TrainConfig,
    animals,
    batch_line,
    batch_plan,
    dataset_column,
    hardware,
    load_prompts,
    memory_estimate,
    model_sizes,
    preset_config,
    resolve,
    reward_settings,
)
from sdpo_nb.files import read_json, read_jsonl
from sdpo_nb.models import load_policy
from sdpo_nb.rewards import RewardError, checked
from sdpo_nb.trainer import Callback, ReportCallback, TrackerCallback, Trainer, newest_checkpoint
from sdpo_nb.figures import base_licence, loading_code, model_card, push_run

TESTS = Path(__file__).resolve().parent
PROMPTS = ["a red circle", "a cat"]
SMALL = dict(
    num_steps=3,
    epochs=1,
    pairs_per_epoch=4,
    pairs_per_update=2,
    micro_batch=2,
    eval_samples=0,
    buffer_size=8,
    min_count=4,
)


def redness(images, prompts):
    return (images[:, 0] - images[:, 2]).mean((1, 2))


@pytest.fixture
def make(pipeline, tmp_path):
    "Make a trainer of a small run"

    def make_trainer(*, reward=redness, callbacks=(), **settings):
        return Trainer(
            load_policy(pipeline, device="cpu"),
            reward,
            PROMPTS,
            TrainConfig(**{**SMALL, "output_dir": str(tmp_path / "run"), **settings}),
            callbacks,
        )

    return make_trainer


# --- presets and arithmetic


@pytest.mark.parametrize(
    "reward, epochs, rate, pairs, updates",
    [
        ("aesthetic", 100, 1e-4, 64, 100),
        ("imagereward", 200, 5e-5, 128, 50),
        ("hpsv2", 200, 5e-5, 128, 50),
        ("pickscore", 200, 6e-5, 64, 100),
    ],
)
@pytest.mark.parametrize("suffix, processes", [("", 1), ("_1x80gb", 1), ("_4x24gb", 4)])
def test_presets_have_the_numbers_of_the_reference(reward, epochs, rate, pairs, updates, suffix, processes):
    c = resolve(preset_config(f"sd_turbo_{reward}{suffix}"))
    assert (c.epochs, c.learning_rate, c.pairs_per_update, c.reward, c.policy) == (
        epochs,
        rate,
        pairs,
        reward,
        "stabilityai/sd-turbo",
    )
    assert (
        c.num_steps,
        c.clip_range,
        c.pairs_per_epoch,
        c.lora_rank,
        c.lora_alpha,
        c.precision,
        c.seed,
        c.eta,
        c.guidance_scale,
    ) == (50, 1e-4, 128, 4, 4, "fp16", 42, 1, 0)
    assert (
        c.gamma,
        c.step_weight,
        c.log_scale,
        c.advantage_clip,
        c.buffer_size,
        c.min_count,
        c.weight_decay,
        c.max_grad_norm,
    ) == (0.99, 0.99, 1, 5, 32, 16, 1e-4, 1)
    assert (c.anchor, c.queries, c.credit, c.train_last_step, c.order) == (
        "all",
        "3",
        "paper",
        True,
        "step_shuffled",
    ) and load_prompts(c.prompts) == list(animals)
    plan = batch_plan(c, processes)
    assert plan["optimizer steps per epoch"] == updates and plan["trajectories per epoch"] == 256
    assert plan["forward passes per optimizer step and process"] * c.micro_batch * processes == pairs
    assert f"{updates} updates an epoch, {updates * epochs:,} updates in all" in batch_line(c, processes)


def test_the_plan_is_said_before_anything_is_loaded(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("sdpo_nb.models.load_policy", None)
    monkeypatch.setattr("sdpo_nb.rewards.get_reward", None)
    assert train_command(["sd_turbo_aesthetic_4x24gb"]) == 2
    assert (
        "pairs_per_update is 64, which 3 processes cannot share in micro-batches of 4; choose a multiple of 12."
        in capfd.readouterr().err
    )
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert train_command(["sd_turbo_aesthetic_4x24gb", "--dry_run"]) == 0
    page = " ".join(capfd.readouterr().out.split())
    assert (
        "4 processes" in page
        and "4 forward passes per optimizer step and process" in page
        and re.search(r"[\d.]+ GB in all, estimated", page)
    )
    with pytest.raises(TypeError):
        train_command(["sd_turbo_aesthetic_4x24gb"])  # it gets as far as loading
    assert (
        "128 pairs an epoch; an update = 4 processes × 4 passes × 4 pairs; 100 updates an epoch, 10,000 updates in all"
        in capfd.readouterr().out
    )
    assert train_command(["tiny", "--policy", "./mine", "--dry_run"]) == 0
    page = " ".join(capfd.readouterr().out.split())
    assert (
        "not known for this policy" in page
        and "1 forward passes per optimizer step and process" in page
        and " 8 samples of a forward pass" in page
    )  # 16 pairs, four processes


def test_memory_grows_with_the_batch_and_shrinks_with_what_saves_it():
    def total(**changes):
        return memory_estimate(resolve(preset_config("sd_turbo_imagereward", **changes)))["in all, estimated"]

    assert total(micro_batch=16) - total(micro_batch=8) == pytest.approx(
        16 * model_sizes["stabilityai/sd-turbo"]["kept"][2]
    )
    assert (
        total(micro_batch=16, gradient_checkpointing=True)
        < total(micro_batch=16)
        < total(micro_batch=16, precision="fp32")
    )
    assert total(micro_batch=16, guidance_scale=5.0) > total(micro_batch=16) and total(reward="warmth") < total()
    assert (
        total(micro_batch=1, gradient_checkpointing=True)
        < total(micro_batch=2, gradient_checkpointing=True)
        < total(micro_batch=4, gradient_checkpointing=True)
    )  # fewer pictures are decoded at once
    assert (
        memory_estimate(resolve(TrainConfig())) == {}
        and {reward for reward in reward_settings} <= config_module.reward_sizes.keys()
        and "" in hardware
    )


def test_the_table_of_sizes_is_what_was_counted():
    rows = read_jsonl(TESTS.parent / "benchmarks" / "results" / "memory.jsonl")
    names = dict(
        sd_turbo="stabilityai/sd-turbo", sdxl_turbo="stabilityai/sdxl-turbo", lcm="SimianLuo/LCM_Dreamshaper_v7"
    )
    assert len(rows) == 6
    for row in rows:
        size, width = model_sizes[names[row["kind"]]], {"fp16": 2, "fp32": 4}[row["precision"]]
        assert abs(size["millions"] - sum(row["millions"].values())) <= 1
        assert (size["kept"][width], size["checkpointed"][width]) == (
            row["gb_per_sample"],
            row["gb_per_sample_checkpointed"],
        )


# --- prompts from a dataset


def test_prompts_from_a_csv_file(tmp_path):
    path = tmp_path / "my prompts.csv"
    path.write_text('id,caption\n1," a cat, sitting\non a mat "\n2,\n3,a dög\n', encoding="utf-8")
    assert load_prompts(f"dataset:{path}:caption") == ["a cat, sitting\non a mat", "a dög"]
    for source, sentence in [
        (f"dataset:{path}:text", "no column 'text'; choose one of id, caption"),
        (f"dataset:{path}", "names no column"),
        ("dataset:nowhere.csv:caption", "cannot be read as CSV"),
    ]:
        with pytest.raises(ValueError, match=f"^prompts is .*{sentence}"):
            load_prompts(source)
    path.write_text(
        "\ufeffcaption\na cat,one cell too many\na dog\n", encoding="utf-8"
    )  # as Excel saves it, and ragged
    assert load_prompts(f"dataset:{path}:caption") == ["a cat", "a dog"]
    with pytest.raises(ValueError, match="no column 'text'; choose one of caption"):
        load_prompts(f"dataset:{path}:text")


class Table:
    "What `datasets.load_dataset` returns, as far as we look"

    column_names = ["caption", "score"]

    def __getitem__(self, name):
        return {"caption": ["a cat ", "", None, "a dog"], "score": [1, 2, 3]}[name]


def test_prompts_from_a_dataset(monkeypatch):
    asked = []

    def load_dataset(place, split):
        asked.append((place, split))
        if place == "me/gone":
            raise ConnectionError("Couldn't reach the Hub\nmore")
        return Table()

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(config_module, "find_spec", lambda name: True)
    assert (
        load_prompts("dataset:me/pictures:caption")
        == load_prompts("dataset:me/pictures:caption:test")
        == ["a cat", "a dog"]
    )
    assert asked == [("me/pictures", "train"), ("me/pictures", "test")]
    for source, sentence in [
        ("me/pictures:title", "no column 'title'; choose one of caption, score"),
        ("me/pictures:score", "column 'score' does not hold texts alone"),
        ("me/gone:caption", r"cannot be loaded \(ConnectionError: Couldn't reach the Hub\); check name and split"),
    ]:
        with pytest.raises(ValueError, match=sentence) as caught:
            dataset_column(f"dataset:{source}")
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(config_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package datasets; install it with"):
        load_prompts("dataset:me/pictures:caption")


# --- trackers and pictures


def test_a_missing_tracker_is_named_before_the_work(monkeypatch):
    monkeypatch.setattr(config_module, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="tracker is 'wandb', but the package wandb is not installed; run `pip install wandb`"
    ):
        resolve(TrainConfig(tracker="wandb"))
    with pytest.raises(ValueError, match="tracker is 'tensorbord'.*did you mean 'tensorboard'"):
        resolve(TrainConfig(tracker="tensorbord"))
    assert resolve(TrainConfig()).tracker == "none"


def test_tensorboard_gets_numbers_and_pictures(make, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain = make(epochs=3, output_dir=str(tmp_path / "plain"))
    plain.train()
    watched = make(epochs=3, tracker="tensorboard", log_images_every=2)
    assert isinstance(watched.callbacks[0], TrackerCallback)
    watched.train()
    assert same_weights(plain, watched) and without_clock(plain.folder) == without_clock(
        watched.folder
    )  # looking changes nothing
    (events,) = (tmp_path / "run/tracker/sdpo_nb").glob("events*")
    log = EventAccumulator(str(events)).Reload()
    assert [(event.step, event.value) for event in log.Scalars("reward/mean")] == [
        (record["epoch"], pytest.approx(record["reward/mean"])) for record in read_jsonl(tmp_path / "run/metrics.jsonl")
    ]
    for name in ("samples", "film_strip"):
        files = sorted((tmp_path / "run/progress").glob(f"{name}_*.png"))
        assert [path.stem[-6:] for path in files] == ["000002", "000003"] and [
            event.step for event in log.Images(name)
        ] == [2, 3]
        with Image.open(files[0]) as picture:
            assert (log.Images(name)[0].width, log.Images(name)[0].height) == picture.size


def test_weights_and_biases_gets_the_same(make, monkeypatch, tmp_path):
    "By a stand-in for the package: accelerate calls its tracker with these arguments"
    monkeypatch.setattr(config_module, "find_spec", lambda name: True)
    monkeypatch.setattr(
        trainer_module.Accelerator,
        "__init__",
        lambda self, *args, log_with=None, real=trainer_module.Accelerator.__init__, **options: real(
            self, *args, **options
        ),
    )
    calls = []

    class Tracker:
        name = "wandb"

        def log_images(self, values, step):
            calls.append((step, {name: value.shape[-1] for name, value in values.items()}))

        def finish(self):
            calls.append("finished")

    def watched(**settings):
        trainer, started = make(tracker="wandb", log_images_every=1, **settings), []

        def start(project, settings, options):
            started.append(options["wandb"])
            trainer.accelerator.trackers = [Tracker()]

        monkeypatch.setattr(trainer.accelerator, "init_trackers", start)
        monkeypatch.setattr(trainer.accelerator, "log", lambda values, step: calls.append((step, set(values))))
        trainer.train()
        return started[0]

    first = watched(epochs=1)
    assert calls[0][0] == 1 and "reward/mean" in calls[0][1]
    assert calls[1:] == [(1, {"samples": 3}), (1, {"film_strip": 3}), "finished"]
    assert (
        watched(epochs=2, resume=str(tmp_path / "run")) == first
        and first["resume"] == "allow"
        and first["name"] == "run"
    )  # one curve, not two
    assert watched(epochs=1, output_dir=str(tmp_path / "other"))["id"] != first["id"]


# --- stops


def wait_for(path, process):
    "Until a run has written two epochs"
    for _ in range(600):
        if path.is_file() and len(read_jsonl(path)) >= 2:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


@pytest.mark.parametrize(
    "number, status, word", [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_signals_save_and_say_how_to_go_on(pipeline, tmp_path, monkeypatch, capfd, number, status, word):
    "checkpoint_every is out of reach: what is saved is saved because of the signal"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = [
        "tiny",
        "--policy",
        str(pipeline),
        "--prompts",
        "prompts.txt",
        "--reward",
        "warmth",
        "--num_steps",
        "3",
        "--pairs_per_epoch",
        "4",
        "--min_count",
        "4",
        "--buffer_size",
        "8",
        "--eval_samples",
        "0",
        "--checkpoint_every",
        "100000",
    ]
    hear = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a shell starts background jobs deaf to SIGINT, and children inherit that
    code = f"{hear}import sys; from sdpo_nb.cli import train_command; sys.exit(train_command({[*words, '--epochs', '100000', '--output_dir', 'run']}))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "run/metrics.jsonl", process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (status, f"sdpo-train: {word}; go on with sdpo-train --resume run\n")
    done = newest_checkpoint(tmp_path / "run")["counts"]["epoch"]
    assert done >= 1  # the second epoch may have been about to be written
    assert train_command(["--resume", "run", "--epochs", str(done + 1)]) == 0
    assert train_command([*words, "--epochs", str(done + 1), "--output_dir", "straight"]) == 0
    assert without_clock(tmp_path / "run") == without_clock(tmp_path / "straight")
    first, second = (newest_checkpoint(tmp_path / name)["lora"] for name in ("run", "straight"))
    assert all(torch.equal(first[name], second[name]) for name in first)


class Stop(Callback):
    "A signal in the middle of an epoch: when the reward is asked"

    def __init__(self, call):
        self.left = call

    def __call__(self, images, prompts):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGTERM)
        return redness(images, prompts)


def test_a_termination_in_the_middle_of_an_epoch(make, tmp_path):
    straight = make(epochs=4, checkpoint_every=100, output_dir=str(tmp_path / "straight"))
    straight.train()
    before = signal.getsignal(signal.SIGTERM)
    stopping = type("Redness", (), {"name": "redness", "__call__": Stop.__call__})()
    stopping.left = 3
    with pytest.raises(KeyboardInterrupt, match="terminated"):
        make(reward=stopping, epochs=4, checkpoint_every=100).train()
    assert signal.getsignal(signal.SIGTERM) == before
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == [
        "epoch_000000.pt",
        "epoch_000002.pt",
    ]
    resumed = make(epochs=4, checkpoint_every=100, resume=str(tmp_path / "run"))
    resumed.train()
    assert same_weights(straight, resumed) and without_clock(straight.folder) == without_clock(resumed.folder)


# --- rewards that fail, disks that are full, losses that are infinite


class Redness:
    "A reward that misbehaves from some call on"

    name = "redness"

    def __init__(self, misbehave, after=0):
        self.misbehave, self.left, self.calls = misbehave, after, 0

    def __call__(self, images, prompts):
        self.calls += 1
        return redness(images, prompts) if self.calls <= self.left else self.misbehave(self, images, prompts)


def raises(error):
    def misbehave(self, images, prompts):
        raise error

    return misbehave


def sleeps(self, images, prompts):
    time.sleep(3)


@pytest.mark.parametrize(
    "misbehave, sentence",
    [
        (raises(KeyError("score")), r"reward 'redness' failed: KeyError: 'score' \(in test_scale.py, line \d+\)"),
        (raises(ConnectionError("refused")), "reward 'redness' failed, twice: ConnectionError: refused"),
        (sleeps, "reward 'redness' has not answered within 0.5 seconds"),
        (
            lambda self, images, prompts: redness(images, prompts) * math.nan,
            "reward 'redness' returned nan for image 0",
        ),
        (
            lambda self, images, prompts: redness(images, prompts)[:, None],
            r"reward 'redness' returned shape \[\d+, 1\]",
        ),
        (lambda self, images, prompts: redness(images, prompts).long(), "reward 'redness' returned torch.int64 scores"),
    ],
    ids=["raises", "no connection", "hangs", "nan", "shape", "dtype"],
)
def test_a_reward_that_fails_stops_the_run_with_its_last_state_intact(make, tmp_path, monkeypatch, misbehave, sentence):
    monkeypatch.setattr(rewards_module, "retry_after", 0.0)
    with pytest.raises(RewardError, match=sentence):
        make(reward=Redness(misbehave, after=2), epochs=4, checkpoint_every=100, reward_timeout=0.5).train()
    assert newest_checkpoint(tmp_path / "run")["counts"]["epoch"] == 2
    straight, resumed = (
        make(epochs=4, output_dir=str(tmp_path / "straight")),
        make(epochs=4, checkpoint_every=100, resume=str(tmp_path / "run")),
    )
    straight.train(), resumed.train()
    assert same_weights(straight, resumed) and without_clock(straight.folder) == without_clock(resumed.folder)


def test_what_may_pass_is_asked_once_more(monkeypatch):
    monkeypatch.setattr(rewards_module, "retry_after", 0.0)
    images = torch.rand(2, 3, 4, 4)
    for error, calls in [
        (ConnectionError("x"), 2),
        (OSError("x"), 2),
        (TimeoutError("x"), 2),
        (type("ReadTimeout", (Exception,), {})("x"), 2),
        (TypeError("x"), 1),
    ]:
        flaky = Redness(raises(error))
        with pytest.raises(RewardError, match="reward 'redness' failed"):
            checked(flaky, images, PROMPTS)
        assert flaky.calls == calls
    once = Redness(None)
    once.misbehave = lambda self, images, prompts: (
        raises(OSError("x"))(self, images, prompts) if self.calls == 1 else redness(images, prompts)
    )
    assert torch.equal(checked(once, images, PROMPTS), redness(images, PROMPTS)) and once.calls == 2


def test_a_slow_reward_runs_without_gradient_and_a_fast_one_is_not_stopped():
    weight = torch.ones(1, requires_grad=True)
    scores = checked(
        lambda images, prompts: weight * images.mean((1, 2, 3)), torch.rand(2, 3, 4, 4), PROMPTS, timeout=30.0
    )
    assert scores.shape == (2,) and not scores.requires_grad


def test_a_full_disk_leaves_the_checkpoint_before(make, tmp_path, monkeypatch):
    real, written = trainer_module.atomic_write, []

    def write(path, data):
        if Path(path).suffix == ".pt" and written:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        return real(path, data)

    monkeypatch.setattr(
        trainer_module,
        "atomic_write",
        lambda path, data: write(path, data) if "epoch_000000" not in str(path) else real(path, data),
    )
    straight = make(epochs=3, checkpoint_every=1, output_dir=str(tmp_path / "straight"))
    with pytest.raises(OSError, match="No space left"):
        make(epochs=3, checkpoint_every=1).train()
    assert newest_checkpoint(tmp_path / "run")["counts"]["epoch"] == 1 and not list(
        (tmp_path / "run/checkpoints").glob(".*")
    )
    monkeypatch.setattr(trainer_module, "atomic_write", real)
    resumed = make(epochs=3, checkpoint_every=1, resume=str(tmp_path / "run"))
    straight.train(), resumed.train()
    assert same_weights(straight, resumed)


def test_an_infinite_loss_is_skipped_even_where_its_gradient_is_flat(make, monkeypatch):
    trainer = make(pairs_per_update=4)
    rollout, weights, real = trainer.rollout(0), trainer.policy.lora_state(), trainer.cell_loss

    def infinite(*args):
        loss, log = real(*args)
        return 0 * loss + math.inf, log

    monkeypatch.setattr(trainer, "cell_loss", infinite)
    trainer.update(rollout, 0)
    assert trainer.counts["skipped_updates"] == 2 and trainer.counts["optimizer_steps"] == 0
    assert all(torch.equal(value, weights[name]) for name, value in trainer.policy.lora_state().items())


# --- memory


def kept_bytes(trainer, rollout, update):
    "What one update stores for its backward pass, and its gradient"
    total = [0]

    def pack(tensor):
        total[0] += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.apply_update(rollout, update)
    return total[0], torch.cat([parameter.grad.flatten() for parameter in trainer.parameters])


def test_gradient_checkpointing_keeps_less_and_changes_nothing(make, monkeypatch):
    plain, saving = make(), make(gradient_checkpointing=True)
    rollout = plain.rollout(0)
    update = plain.epoch_updates(rollout, 0)[0]
    (kept, gradient), (less, same) = (kept_bytes(trainer, rollout, update) for trainer in (plain, saving))
    assert less < 0.6 * kept and torch.equal(gradient, same) and gradient.abs().max() > 0
    rollout = saving.rollout(0)
    assert torch.equal(saving.policy_log_prob(rollout)[..., :2], rollout.log_prob[..., :2])


def tiny_autoencoder(channels=4, levels=2):
    return AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=(8,) * levels,
        decoder_block_out_channels=(8,) * levels,
        num_encoder_blocks=(1,) * levels,
        num_decoder_blocks=(1,) * levels,
    )


def test_a_small_decoder_for_the_reward(make, tmp_path):
    small = tiny_autoencoder().eval()
    small.save_pretrained(tmp_path / "small")
    trainer = make(reward_vae=str(tmp_path / "small"))
    rollout = trainer.rollout(0)
    with torch.no_grad():
        images = (small.decode(rollout.pred_x0[1, :, -1]).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(rollout.rewards[1, :, -1], redness(images, None), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rollout.rewards, make().rollout(0).rewards) and not any(
        parameter.requires_grad for parameter in trainer.reward_vae.parameters()
    )
    tiny_autoencoder(channels=16).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="decodes other latents than those of .*4 channels and 2 pixels"):
        make(reward_vae=str(tmp_path / "other"))
    with pytest.raises(OSError, match="Could not load"):
        make(reward_vae=str(tmp_path / "nowhere"))


def test_large_pictures_are_decoded_few_at_a_time(make, monkeypatch):
    trainer, sizes = make(), []
    real = trainer.policy.decode
    monkeypatch.setattr(
        trainer.policy,
        "decode",
        lambda latents, batch_size, vae=None: sizes.append(batch_size) or real(latents, batch_size, vae),
    )
    monkeypatch.setattr(trainer_module, "decoded_pixels", 3 * 16 * 16)  # three pictures of this model
    trainer.rollout(0)
    assert set(sizes) == {3}


# --- LoRAs


@pytest.fixture(scope="module")
def runs(pipeline, tmp_path_factory):
    "Two finished runs of the same model"
    root = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate("ab"):
        trainer = Trainer(
            load_policy(pipeline, device="cpu"),
            redness,
            PROMPTS,
            TrainConfig(
                **SMALL
                | dict(
                    learning_rate=3e-2,
                    seed=seed,
                    guidance_scale=3.0,
                    lora_rank=2 + seed,
                    lora_alpha=4.0,
                    output_dir=str(root / name),
                )
            ),
            [ReportCallback()],
        )
        trainer.train()
    return root


def test_effects_of_loras_add_up(pipeline, runs):
    latents, base = torch.randn(2, 4, 8, 8), load_policy(pipeline, device="cpu")
    embedding = base.embed(PROMPTS)

    def deltas(*loras):
        "What is added to each weight"
        policy, found = load_policy(pipeline, device="cpu"), {}
        for number, (name, scale) in enumerate(loras):
            policy.load_lora(runs / name / "lora", scale, f"lora_{number}" if number else "default")
        for name, module in policy.unet.named_modules():
            if hasattr(module, "get_delta_weight"):
                found[name] = sum(module.get_delta_weight(adapter) for adapter in module.active_adapters)
        return policy, found

    (_, a), (_, b), (both, sums) = deltas(("a", 1.0)), deltas(("b", 1.0)), deltas(("a", 0.7), ("b", -0.3))
    assert a.keys() == b.keys() == sums.keys() and max(value.abs().max() for value in a.values()) > 1e-3
    for name in sums:
        torch.testing.assert_close(sums[name], 0.7 * a[name] - 0.3 * b[name])
    with torch.no_grad():
        with both.without_lora():
            torch.testing.assert_close(both.predict(latents, 500, embedding), base.predict(latents, 500, embedding))
        assert (both.predict(latents, 500, embedding) - base.predict(latents, 500, embedding)).abs().max() > 1e-4
    both.remove_lora()
    with torch.no_grad():
        assert torch.equal(both.predict(latents, 500, embedding), base.predict(latents, 500, embedding))


def test_several_loras_and_guidance_on_the_command_line(runs, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def picture(source, *words):
        assert sample_command([source, "a cat", "--samples", "1", "--num_steps", "2", *words, "--output", "p.png"]) == 0
        with Image.open("p.png") as image:
            return np.asarray(image).astype(int)

    a, b = str(runs / "a"), str(runs / "b")
    whole = picture(a)
    assert abs(picture(f"{a},{a}", "--scale", "0.5,0.5") - whole).max() <= 1
    assert abs(picture(f"{a},{b}", "--scale", "1,0") - whole).max() <= 1 and abs(picture(f"{a},{b}") - whole).max() > 1
    assert np.array_equal(picture(a, "--guidance_scale", "3"), whole) and not np.array_equal(
        picture(a, "--guidance_scale", "0"), whole
    )  # as in the run
    capfd.readouterr()
    for words, part in [
        ((a, "--scale", "1,2"), "scale is '1,2' for 1 LoRAs"),
        ((f"{a},nowhere",), "RUN_OR_LORA is 'nowhere'"),
        ((a, "--guidance_scale", "-1"), "guidance_scale is -1"),
    ]:
        assert sample_command([words[0], "a cat", *words[1:]]) == 2 and part in capfd.readouterr().err


# --- the whole UNet instead of a LoRA


def test_the_whole_unet_is_trained_resumed_saved_and_drawn_with(pipeline, make, tmp_path, monkeypatch, capfd):
    settings = dict(lora_rank=0, learning_rate=1e-3, checkpoint_every=1, kl_coefficient=0.1)
    straight = make(epochs=2, output_dir=str(tmp_path / "straight"), callbacks=[ReportCallback()], **settings)
    metrics = straight.train()
    make(epochs=1, **settings).train()
    resumed = make(epochs=2, resume=str(tmp_path / "run"), **settings)
    resumed.train()
    assert same_weights(straight, resumed) and metrics["kl"] > 0 and metrics["log_ratio/max_before_update"] == 0
    base, latents = load_policy(pipeline, device="cpu"), torch.randn(2, 4, 8, 8)
    assert (
        straight.policy.lora_state().keys() == dict(base.unet.named_parameters()).keys()
        and not (tmp_path / "run/lora").exists()
    )
    embedding = base.embed(PROMPTS)
    with torch.no_grad():
        with straight.policy.without_lora():
            assert torch.equal(straight.policy.predict(latents, 500, embedding), base.predict(latents, 500, embedding))
        trained = straight.policy.predict(latents, 500, embedding)
        stock = type(base.unet).from_pretrained(tmp_path / "straight/unet")
        assert (
            torch.equal(stock(latents, 500, embedding.prompt_embeds).sample, trained)
            and (trained - base.predict(latents, 500, embedding)).abs().max() > 1e-3
        )
        assert torch.equal(base.load_whole(tmp_path / "straight/unet").predict(latents, 500, embedding), trained)
    monkeypatch.chdir(tmp_path)

    def picture(*words):
        assert (
            sample_command(["straight", "a cat", "--samples", "1", "--num_steps", "1", *words, "--output", "p.png"])
            == 0
        )
        return Path("p.png").read_bytes()

    assert picture("--scale", "0") != picture() == picture("--scale", "1")
    assert (
        'from_pretrained("unet")' in (tmp_path / "straight/README.md").read_text()
        and "UNet2DConditionModel" in (tmp_path / "straight/README.md").read_text()
    )


def test_preferences_need_the_first_policy_and_find_it(make):
    trainer = make(recipe="d3po", lora_rank=0, epochs=2, learning_rate=1e-3)
    trainer.train()
    rollout = trainer.last_rollout
    with trainer.policy.without_lora():
        assert torch.equal(rollout.reference_log_prob, trainer.policy_log_prob(rollout))
    assert not torch.equal(rollout.reference_log_prob, rollout.log_prob)


def test_the_whole_unet_in_half_precision_is_refused():
    with pytest.raises(ValueError, match="precision is 'fp16' with lora_rank 0"):
        resolve(TrainConfig(lora_rank=0, precision="fp16"))

    def total(**changes):
        return memory_estimate(resolve(preset_config("sd_turbo_aesthetic", precision="fp32", **changes)))[
            "in all, estimated"
        ]

    assert total(lora_rank=0) - total() == pytest.approx(866 * 12 / 1e3)


# --- the card and the hub


def test_the_card_carries_licence_guidance_and_place(runs, tmp_path):
    model, run = tmp_path / "model", tmp_path / "run"
    model.mkdir(), run.mkdir()
    settings = (runs / "a" / "config.json").read_text()
    (run / "config.json").write_text(re.sub(r'"policy": ".*?"', f'"policy": "{model}"', settings))
    assert base_licence(str(model)) == {} and "(unknown here" in model_card(run)
    (model / "README.md").write_text(
        "---\nlicense: other\nlicense_name: sai-nc\nlicense_link: https://example.org/l\ntags:\n- x\n---\n# Model\n"
    )
    card = model_card(run)
    assert (
        card.startswith(
            "---\nlicense: other\nlicense_name: sai-nc\nlicense_link: https://example.org/l\nlibrary_name: diffusers\n"
        )
        and "licence (`sai-nc`)" in card
    )
    assert "guidance_scale=3.0" in card and 'load_lora_weights("lora")' in card
    (run / "config.json").write_text(settings.replace('"push_to_hub": null', '"push_to_hub": "me/mine"'))
    assert 'pipe.load_lora_weights("me/mine")\n' in model_card(run)
    compile(loading_code("x/y", 4, 2.0, "me/mine"), "card", "exec"), compile(loading_code("x/y", 4), "card", "exec")


def test_the_licence_of_a_model_on_the_hub(monkeypatch):
    asked = []

    def urlopen(address, timeout):
        asked.append(address)
        if "gone" in address:
            raise OSError("offline")
        return BytesIO(b"---\nlicense: openrail++\n---\n")

    monkeypatch.setattr("sdpo_nb.figures.urlopen", urlopen)
    assert base_licence("me/model") == {"license": "openrail++"} and base_licence("me/gone") == {}
    assert asked[0] == "https://huggingface.co/me/model/resolve/main/README.md"


class Hub:
    "Remembers what it was asked for"

    calls = []

    def create_repo(self, name, **options):
        self.calls.append(("create", name))

    def upload_folder(self, *, repo_id, folder_path, allow_patterns=None, **options):
        self.calls.append(
            (
                "upload",
                repo_id,
                sorted(
                    path.name
                    for path in Path(folder_path).iterdir()
                    if path.is_file() and (not allow_patterns or any(path.match(p) for p in allow_patterns))
                ),
            )
        )


def test_a_run_goes_to_the_hub_when_it_is_asked_to(make, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    monkeypatch.setattr(Hub, "calls", [])
    make(output_dir=str(tmp_path / "quiet")).train()
    assert Hub.calls == []
    make(push_to_hub="me/mine", callbacks=[ReportCallback()]).train()
    assert Hub.calls[0] == ("create", "me/mine") and Hub.calls[1] == (
        "upload",
        "me/mine",
        ["pytorch_lora_weights.safetensors"],
    )
    assert {"README.md", "config.json", "metrics.jsonl", "report.html"} <= set(Hub.calls[2][2])

    def refuse(self, *args, **options):
        raise ConnectionError("offline")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    with pytest.raises(
        OSError, match="is finished, but could not be sent to 'me/mine' .ConnectionError: offline.; send it again with"
    ):
        push_run(tmp_path / "run", "me/mine")
    assert (tmp_path / "run/lora").is_dir() and read_json(tmp_path / "run/config.json")["push_to_hub"] == "me/mine"


def test_what_cannot_be_pushed_is_refused_before_the_work(monkeypatch):
    with pytest.raises(ValueError, match="push_to_hub is 'mine'; give owner/name"):
        resolve(TrainConfig(push_to_hub="mine"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="nobody is logged in to the hub here; run `hf auth login` first"):
        resolve(TrainConfig(push_to_hub="me/mine"))
