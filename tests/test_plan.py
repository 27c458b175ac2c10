"""Counts and gigabytes that follow from settings; `tests/test_cli.py` compares a finished run with its plan."""

import math
from pathlib import Path

import pytest
import torch

from sdpo_nb.config import TrainConfig, hardware, preset_config, presets, resolve, reward_settings
from sdpo_nb.files import read_jsonl
from sdpo_nb.plan import (
    batch_line,
    batch_plan,
    check_processes,
    launch_hint,
    memory_estimate,
    model_sizes,
    plan_text,
    queries_per_epoch,
    reward_sizes,
)

ROOT = Path(__file__).resolve().parent.parent
SIZES = dict(num_steps=10, pairs_per_epoch=32, pairs_per_update=16, micro_batch=8, epochs=3)


def test_batch_plan():
    plan = batch_plan(TrainConfig(**SIZES))
    assert plan["trajectories per epoch"] == 64 and plan["trajectories in total"] == 192
    assert plan["trained steps per trajectory"] == 9 and plan["optimizer steps per epoch"] == 2 * 9
    assert plan["forward passes per optimizer step and process"] == 2
    accumulated = batch_plan(TrainConfig(order="step_accumulated", **SIZES), processes=2)
    assert accumulated["optimizer steps per epoch"] == 2
    assert accumulated["forward passes per optimizer step and process"] == 9


@pytest.mark.parametrize("order", ["step_shuffled", "step_accumulated"])
@pytest.mark.parametrize("steps, last, pairs, update", [(1, True, 4, 2), (7, False, 12, 3), (10, True, 9, 9)])
def test_every_transition_is_used_once(order, steps, last, pairs, update):
    sizes = dict(num_steps=steps, train_last_step=last, pairs_per_epoch=pairs, pairs_per_update=update)
    plan = batch_plan(TrainConfig(order=order, credit="reward_to_go", **sizes))
    used = plan["optimizer steps per epoch"] * plan["(pair, step) transitions per optimizer step"]
    assert used == pairs * (steps - (not last)) == pairs * plan["trained steps per trajectory"]


@pytest.mark.parametrize(
    "settings, per_pair",
    [
        ({}, 5),
        (dict(queries="5"), 9),
        (dict(queries="all"), 19),
        (dict(queries="terminal"), 2),
        (dict(sampling="independent_pair"), 6),
        (dict(credit="causal"), 5),
        (dict(credit="reward_to_go", train_last_step=True), 7),
        (dict(recipe="ddpo"), 2),
        (dict(num_steps=2), 3),
        (dict(num_steps=1, credit="causal", train_last_step=True, queries="terminal"), 3),
    ],
)
def test_queries(settings, per_pair):
    config = resolve(TrainConfig(**{"num_steps": 10, "pairs_per_epoch": 32, **settings}))
    assert queries_per_epoch(config) == 32 * per_pair


@pytest.mark.parametrize(
    "reward, updates", [("aesthetic", 100), ("imagereward", 50), ("hpsv2", 50), ("pickscore", 100)]
)
@pytest.mark.parametrize("suffix, processes", [("", 1), ("_1x80gb", 1), ("_4x24gb", 4), ("_1x141gb", 1)])
def test_presets_make_the_updates_of_the_reference(reward, updates, suffix, processes):
    c = resolve(preset_config(f"sd_turbo_{reward}{suffix}"))
    plan = batch_plan(c, processes)
    assert plan["optimizer steps per epoch"] == updates and plan["trajectories per epoch"] == 256
    passes = plan["forward passes per optimizer step and process"]
    assert passes * c.micro_batch * processes == c.pairs_per_update
    line = batch_line(c, processes)
    assert f"{updates} updates an epoch, {updates * c.epochs:,} updates in all" in line


def test_what_processes_cannot_share():
    with pytest.raises(ValueError, match="which 3 processes cannot share in micro-batches of 16; choose a multiple of"):
        check_processes(resolve(TrainConfig()), 3)
    with pytest.raises(ValueError, match="reward_worker is true, but a process samples its 8 pairs in one batch"):
        check_processes(resolve(TrainConfig(reward_worker=True, micro_batch=8)), 2)
    check_processes(resolve(TrainConfig(reward_worker=True, micro_batch=4)), 2)
    with pytest.raises(ValueError, match="choose a smaller micro_batch or sampling_batch, or false"):
        check_processes(resolve(TrainConfig(reward_worker=True, micro_batch=4, sampling_batch=8)), 2)


@pytest.mark.parametrize("name", presets)
def test_every_preset_has_a_page(name):
    page = plan_text(resolve(preset_config(name)), ["a cat"])
    unit = "MB" if name.startswith("tiny") else "GB"
    assert "optimizer steps in total" in page and f"{unit} in all, estimated" in page
    assert plan_text(resolve(preset_config(name, policy="./mine")), ["a cat"]).endswith("try a small micro_batch first")
    hint = launch_hint(name, 1)
    assert ("accelerate launch --num_processes 4" in hint) == name.endswith("_4x24gb") and not launch_hint(name, 4)


def total(**changes):
    return memory_estimate(resolve(preset_config("sd_turbo_imagereward", **changes)))["in all, estimated"]


def test_memory_grows_with_the_batch():
    kept, part = model_sizes["stabilityai/sd-turbo"]["kept"][2], "a training pass, or decoding"
    larger, smaller = (memory_estimate(resolve(preset_config("sd_turbo_imagereward", micro_batch=n))) for n in (16, 8))
    assert larger[part] - smaller[part] == pytest.approx(16 * kept)
    joined = 16 * 4 * 64 * 64 * 101 * 2 / 1e9  # a batch is there twice while it is copied to its place
    assert larger["rollout"] - smaller["rollout"] == pytest.approx(joined)
    saved = [total(micro_batch=size, gradient_checkpointing=True) for size in (1, 2, 4)]
    assert saved == sorted(set(saved))  # fewer pictures are decoded at once
    large = memory_estimate(resolve(preset_config("sd_turbo_imagereward", sampling_batch=64)))
    checkpointed = model_sizes["stabilityai/sd-turbo"]["checkpointed"][2]  # sampling keeps no more
    few, none = (memory_estimate(resolve(preset_config("sd_turbo_imagereward", sampling_batch=n))) for n in (16, 0))
    assert large[part] == pytest.approx(128 * checkpointed) and few[part] == none[part]
    for reward in reward_settings:
        assert 40 < memory_estimate(resolve(preset_config(f"sd_turbo_{reward}_1x141gb")))["in all, estimated"] < 141
    assert {*reward_settings} <= reward_sizes.keys() and "" in hardware


@pytest.mark.parametrize("policy", ["stabilityai/sd-turbo", "stabilityai/sdxl-turbo", "SimianLuo/LCM_Dreamshaper_v7"])
def test_in_fp16_the_autoencoder_is_float32(policy):
    "Their configurations say `force_upcast`; bf16 has float32's range and needs none"

    def parts(precision):
        return memory_estimate(resolve(preset_config("sd_turbo_imagereward", policy=policy, precision=precision)))

    half, brain, full = map(parts, ("fp16", "bf16", "fp32"))
    size = model_sizes[policy]
    assert half["weights of the policy"] - brain["weights of the policy"] == pytest.approx(size["vae"] * 2 / 1e3)
    assert half["a training pass, or decoding"] == max(10.0, 8 * size["kept"][2])  # eight pictures, 8 samples
    assert brain["a training pass, or decoding"] == max(5.0, 8 * size["kept"][2])
    assert full["a training pass, or decoding"] == max(10.0, 8 * size["kept"][4])


def test_memory_shrinks_with_what_saves_it():
    whole = total(micro_batch=16)
    assert total(micro_batch=16, gradient_checkpointing=True) < whole < total(micro_batch=16, precision="fp32")
    assert total(micro_batch=16, guidance_scale=5.0) > whole and total(reward="warmth") < total()
    full = dict(precision="fp32", lora_rank=0)
    assert total(**full) - total(precision="fp32") == pytest.approx(866 * 12 / 1e3)


@pytest.mark.parametrize(
    "kind, policy",
    [
        ("sd_turbo", "stabilityai/sd-turbo"),
        ("sdxl_turbo", "stabilityai/sdxl-turbo"),
        ("lcm", "SimianLuo/LCM_Dreamshaper_v7"),
    ],
)
def test_the_table_of_sizes_is_what_was_counted(kind, policy):
    rows = [row for row in read_jsonl(ROOT / "benchmarks" / "results" / "memory.jsonl") if row["kind"] == kind]
    assert len(rows) == 2
    for row in rows:
        size, width = model_sizes[policy], {"fp16": 2, "fp32": 4}[row["precision"]]
        assert abs(size["millions"] - sum(row["millions"].values())) <= 1 and size["vae"] == row["millions"]["vae"]
        counted = (row["gb_per_sample"], row["gb_per_sample_checkpointed"])
        assert (size["kept"][width], size["checkpointed"][width]) == counted


def test_the_size_of_the_embedded_model_is_what_it_has():
    from sdpo_nb.models import load_policy

    policy, size = load_policy("tiny"), model_sizes["tiny"]
    modules = [part for part in policy.pipeline.components.values() if hasattr(part, "parameters")]
    counted = [sum(p.numel() for p in module.parameters()) / 1e6 for module in modules]
    assert abs(sum(counted) - size["millions"]) < 0.1 and any(abs(n - size["unet"]) < 0.1 for n in counted)
    assert math.prod(policy.latent_shape) == size["latent"]
    stored = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: stored.setdefault(x.untyped_storage()._cdata, x), lambda x: x
    ):
        policy.add_lora(4, 4.0, seed=0)
        embedding = policy.embed(["a red circle"] * 4)
        policy.predict(torch.zeros(4, *policy.latent_shape), 500, embedding)
    weights = {p.untyped_storage()._cdata for p in policy.denoiser.parameters()}
    kept = sum(x.untyped_storage().nbytes() for place, x in stored.items() if place not in weights) / 4 / 1e9
    assert 0.7 * size["kept"][4] < kept < 1.5 * size["kept"][4]
