"""The training loop, on a random pipeline: counts, resume, the losses in place, and what a run folder holds at any moment."""

import json
import math
import re
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from functools import partial
from io import BytesIO, StringIO
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from comparisons import same_learning, same_weights, weights, without_clock
from nbclient import NotebookClient
from PIL import Image
from random_pipelines import random_stable_diffusion

from sdpo_nb.config import TrainConfig, animals, batch_line, queries_per_epoch, resolve
from sdpo_nb.evaluate import step_generalization
from sdpo_nb.files import read_json, read_jsonl
from sdpo_nb.mdp import ddim_step
from sdpo_nb.models import load_policy
from sdpo_nb.recipes import recipes
from sdpo_nb.trainer import (
    Callback,
    EvaluationCallback,
    LiveCallback,
    ProgressCallback,
    ReportCallback,
    Trainer,
    default_callbacks,
    most_skipped,
    newest_checkpoint,
    pair_diversity,
    random_states,
    run_config,
)

TESTS = Path(__file__).resolve().parent
PROMPTS = ["a red circle", "a cat"]


def redness(images, prompts):
    return (images[:, 0] - images[:, 2]).mean((1, 2))


def noisy_redness(images, prompts):
    "A reward that draws from torch's global generator, whose state a resumed run has to find again"
    return redness(images, prompts) + 0.01 * torch.rand(len(images))


@pytest.fixture
def make(pipeline, tmp_path):
    "Make a trainer of a small run"

    def make_trainer(*, reward=redness, callbacks=(), prompts=PROMPTS, policy=None, **settings):
        small = dict(
            num_steps=5,
            epochs=1,
            pairs_per_epoch=4,
            pairs_per_update=2,
            micro_batch=2,
            eval_samples=0,
            buffer_size=8,
            min_count=4,
            output_dir=str(tmp_path / "run"),
        )
        return Trainer(
            policy or load_policy(pipeline, device="cpu"),
            reward,
            prompts,
            TrainConfig(**{**small, **settings}),
            callbacks,
        )

    return make_trainer


# --- sampling, queries, credit


@pytest.mark.parametrize("name", [name for name, recipe in recipes.items() if recipe.settings == "TrainConfig"])
def test_every_recipe_trains(make, name):
    trainer = make(recipe=name)
    start = trainer.policy.lora_state()
    metrics = trainer.train()
    end = trainer.policy.lora_state()
    assert any(not torch.equal(start[name], end[name]) for name in start)
    assert metrics["log_ratio/max_before_update"] == 0 and metrics["log_ratio/recomputed"] == 0
    assert metrics["samples"] == 8 and metrics["reward_queries"] <= queries_per_epoch(trainer.config)
    assert metrics["optimizer_steps"] == (
        2 * len(trainer.trained_steps) if trainer.config.order == "step_shuffled" else 2
    )
    needed = (
        "epoch samples reward_queries optimizer_steps reward/mean reward/std loss log_ratio/max_before_update clip_fraction grad_norm diversity "
        "seconds/sample seconds/reward seconds/train"
    ).split()
    assert set(needed) <= metrics.keys() and all(math.isfinite(metrics[name]) for name in needed)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(queries="5"),
        dict(queries="all"),
        dict(queries="terminal"),
        dict(sampling="independent_pair"),
        dict(credit="causal"),
        dict(credit="causal", train_last_step=True),
        dict(credit="gain", train_last_step=True),
        dict(recipe="ddpo"),
        dict(recipe="rebel"),
        dict(num_steps=1, credit="causal", train_last_step=True),
        dict(num_steps=2),
        dict(num_steps=2, credit="gain"),
        dict(anchor="random"),
        dict(num_steps=1, credit="gain", train_last_step=True),
        dict(num_steps=4, queries="5"),
        dict(recipe="ddpo", num_steps=1),
    ],
    ids=str,
)
def test_every_picture_is_queried_once(make, settings):
    asked = []

    def counting(images, prompts):
        asked.append(len(images))
        return redness(images, prompts)

    trainer = make(reward=counting, **settings)
    rollout = trainer.rollout(0)
    # the expected number: pairs that share their first noise share one query
    assert sum(asked) == rollout.queries == trainer.counts["reward_queries"] == queries_per_epoch(trainer.config)
    assert rollout.advantages.isfinite().all() and rollout.advantages.shape == rollout.log_prob.shape
    assert (rollout.final_reward is None) == (not trainer.needs_final)
    assert math.isfinite(trainer.update(rollout, 0)["loss"])


def test_the_reference_asks_less_where_anchors_lie_at_the_ends(make):
    rollout = make(recipe="sdpo_reference").rollout(0)
    assert rollout.queries <= 4 * 5
    assert rollout.indices[..., 0].eq(0).all() and rollout.indices[..., 2].eq(4).all()


def test_pairs_share_prompt_first_noise_and_first_reward(make):
    rollout = make(pairs_per_epoch=6, epochs=1).rollout(0)
    latents, rewards = rollout.latents, rollout.rewards
    assert torch.equal(latents[0, :, 0], latents[1, :, 0]) and not torch.equal(latents[0, :, 1], latents[1, :, 1])
    assert torch.equal(rewards[0, :, 0], rewards[1, :, 0]) and not torch.equal(rewards[0, :, -1], rewards[1, :, -1])
    assert rollout.prompts == make(pairs_per_epoch=6).rollout(0).prompts != make(pairs_per_epoch=6).rollout(1).prompts


def test_rewards_belong_to_their_pictures_and_prompts(make):
    "The layout [K,B,Q] survives flattening and deduplication: each reward is that of its own picture and prompt"

    def named(images, prompts):
        return redness(images, prompts) + torch.tensor([100.0 * PROMPTS.index(prompt) for prompt in prompts])

    trainer = make(reward=named)
    rollout = trainer.rollout(0)
    for k in range(2):
        for unit, prompt in enumerate(rollout.prompts):
            for query, step in enumerate(rollout.indices[k, unit].tolist()):
                image = trainer.policy.decode(rollout.pred_x0[k, unit, step][None])
                torch.testing.assert_close(
                    rollout.rewards[k, unit, query], named(image, [prompt])[0], rtol=1e-5, atol=1e-4
                )
                torch.testing.assert_close(rollout.dense[k, unit, step], rollout.rewards[k, unit, query])


def test_finished_samples_are_scored_where_the_recipe_says(make):
    trainer = make(recipe="ddpo")
    rollout = trainer.rollout(0)
    expected = redness(trainer.policy.decode(rollout.latents[0, :, -1]), rollout.prompts)
    torch.testing.assert_close(rollout.final_reward[0], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(rollout.outcome, rollout.final_reward)
    assert rollout.advantages[0].std(1).max() < 1e-5  # one reward a trajectory, undiscounted


def test_a_step_without_density_is_left_out(tmp_path, make):
    random_stable_diffusion(tmp_path / "one", set_alpha_to_one=True)
    trainer = make(policy=load_policy(tmp_path / "one", device="cpu"), credit="causal", train_last_step=True)
    assert trainer.trained_steps == [0, 1, 2, 3] and not trainer.needs_final
    assert math.isfinite(trainer.train()["loss"])


# --- the update


def perturb(trainer, size=0.1):
    "Move the LoRA away from zero, so that log-ratios are not"
    generator = torch.Generator().manual_seed(1)
    for parameter in trainer.parameters:
        parameter.data += size * torch.randn(parameter.shape, generator=generator)


def test_loss_of_one_cell_by_hand(make):
    trainer = make(clip_range=1e-4, step_weight=0.9, log_scale=2.0)
    rollout = trainer.rollout(0)
    perturb(trainer)
    unit, step = 1, 3
    _, log = trainer.cell_loss(rollout, torch.tensor([unit]), torch.tensor([step]))
    ratio = []
    for k in range(2):
        state, action = rollout.latents[k, unit, step][None], rollout.latents[k, unit, step + 1][None]
        timestep = trainer.scheduler.timesteps[step].item()
        with torch.no_grad():
            output = trainer.policy.predict(state, timestep, trainer.policy.embed([rollout.prompts[unit]]))
        log_prob = ddim_step(trainer.scheduler, output, timestep, state, prev_sample=action).log_prob
        ratio.append((trainer.scales[step] * (log_prob - rollout.log_prob[k, unit, step])).item())
    held = [max(-1e-4, min(1e-4, r)) for r in ratio]
    target = (rollout.advantages[0, unit, step].clamp(-5, 5) - rollout.advantages[1, unit, step].clamp(-5, 5)).item()
    weight = 0.9**step / 2
    expected = max((weight * (r[0] - r[1]) - target) ** 2 for r in (ratio, held))
    assert log["loss"].item() == pytest.approx(expected, rel=1e-4)
    assert log["log_ratio"].item() == pytest.approx(max(map(abs, ratio)), rel=1e-3) and log["log_ratio"] > 1e-3
    assert log["clip_fraction"] == 1


def gradients(trainer, rollout, update):
    "Of one update"
    trainer.apply_update(rollout, update)
    found = torch.cat([parameter.grad.flatten() for parameter in trainer.parameters])
    trainer.optimizer.zero_grad()
    return found


@pytest.mark.parametrize("recipe", ["sdpo", "ddpo", "d3po", "prdp"])
def test_micro_batches_do_not_change_the_gradient(make, recipe):
    whole = make(recipe=recipe, kl_coefficient=0.1, num_steps=3, pairs_per_epoch=2, micro_batch=2)
    rollout = whole.rollout(0)
    rollout.reference_log_prob = rollout.log_prob
    perturb(whole)
    update = whole.epoch_updates(rollout, 0)[0]
    expected = gradients(whole, rollout, update)
    whole.micro_units = 1
    torch.testing.assert_close(
        gradients(whole, rollout, update), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()
    )


def test_two_passes_give_the_gradient_of_the_full_graph(make):
    trainer = make(recipe="prdp", pairs_per_update=4, clip_range=1e-2)
    rollout = trainer.rollout(0)
    perturb(trainer)
    units, steps = trainer.epoch_updates(rollout, 0)[0]
    log_prob = torch.zeros_like(rollout.log_prob)
    log_prob[:, units, steps] = trainer.action_log_prob(rollout, units, steps)[0]
    ratio = log_prob - rollout.log_prob
    target = (rollout.advantages[0] - rollout.advantages[1]).mean(1)
    squares = [((r[0] - r[1]).sum(1) - target).square() for r in (ratio, ratio.clamp(-1e-2, 1e-2))]
    loss = torch.maximum(*squares).mean()
    loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in trainer.parameters])
    trainer.optimizer.zero_grad()
    torch.testing.assert_close(
        gradients(trainer, rollout, (units, steps)), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()
    )
    log = trainer.apply_update(rollout, (units, steps))[0][1]
    assert log["loss"].item() == pytest.approx(loss.item(), rel=1e-4)


def test_an_update_lowers_its_loss(make):
    trainer = make(learning_rate=1e-5, clip_range=0, pairs_per_update=4, pairs_per_epoch=4)
    rollout = trainer.rollout(0)
    update = trainer.epoch_updates(rollout, 0)[0]

    def loss():
        return sum(share * log["loss"].item() for share, log in trainer.apply_update(rollout, update))

    before = loss()
    trainer.optimizer_step()
    assert loss() < before


def test_log_ratio_is_zero_before_and_noise_is_repaired(make):
    trainer = make(micro_batch=1, clip_range=1e-4)
    rollout = trainer.rollout(0)
    assert torch.equal(trainer.policy_log_prob(rollout)[..., :4], rollout.log_prob[..., :4])
    trainer.micro_units = 2  # other kernels: at most a hundredth of the clip
    assert (trainer.policy_log_prob(rollout) - rollout.log_prob)[..., :4].abs().max() <= 1e-6
    trainer.micro_units = 1
    rollout.log_prob += 1e-5
    log = trainer.update(rollout, 0)
    assert log["log_ratio/recomputed"] == 1 and log["log_ratio/max_before_update"] == 0


def test_reference_log_probs_stay_those_of_the_first_policy(make):
    trainer = make(recipe="d3po", epochs=2)
    trainer.train()
    rollout = trainer.last_rollout
    with trainer.policy.without_lora():
        expected = trainer.policy_log_prob(rollout)
    assert torch.equal(rollout.reference_log_prob, expected) and not torch.equal(
        rollout.reference_log_prob, rollout.log_prob
    )


def test_divergence_is_zero_at_the_start(make):
    trainer = make(kl_coefficient=1.0)
    rollout, cells = trainer.rollout(0), (torch.tensor([0, 1]), torch.tensor([1, 2]))
    assert trainer.cell_loss(rollout, *cells)[1]["kl"] == 0
    perturb(trainer)
    _, log = trainer.cell_loss(rollout, *cells)
    # by hand: the means of the two steps, half the squared distance in units of σ
    _, output = trainer.action_log_prob(rollout, *cells)
    with trainer.policy.without_lora():
        _, reference = trainer.action_log_prob(rollout, *cells)
    state, timestep = (
        rollout.latents[:, cells[0], cells[1]].flatten(0, 1),
        trainer.scheduler.timesteps[cells[1]].repeat(2),
    )
    noise = torch.zeros_like(state)
    mean, other = (
        ddim_step(trainer.scheduler, x, timestep, state, noise=noise).prev_sample for x in (output, reference)
    )
    one = ddim_step(trainer.scheduler, output, timestep, state, noise=torch.ones_like(state)).prev_sample
    expected = ((mean - other) / (one - mean)).square().mean() / 2
    assert log["kl"].item() == pytest.approx(expected.item(), rel=1e-2) and log["kl"] > 0
    assert all(parameter.requires_grad for parameter in trainer.parameters)


def test_last_step_is_left_out_and_scales_average_one(make):
    trainer = make()
    assert trainer.trained_steps == [0, 1, 2, 3]
    assert trainer.scales[trainer.trained_steps].mean().item() == pytest.approx(1)
    steps = torch.cat([steps for _, steps in trainer.epoch_updates(trainer.rollout(0), 0)])
    assert steps.bincount().tolist() == [4, 4, 4, 4]
    assert make(recipe="sdpo_reference").scales.tolist() == [1] * 5


def test_gradients_that_are_not_finite(make, monkeypatch):
    trainer = make(kl_coefficient=1.0, epochs=9)
    broken = []

    def divergence(rollout, units, steps, output):
        return output.mean() * (math.nan if broken else 0.0)

    monkeypatch.setattr(trainer, "divergence", divergence)
    rollout = trainer.rollout(0)
    trainer.update(rollout, 0)
    made, weights = trainer.counts["optimizer_steps"], trainer.policy.lora_state()
    broken.append(True)
    with pytest.raises(RuntimeError, match=f"infinite or NaN {most_skipped} times in a row.*lower learning_rate"):
        for _ in range(9):
            trainer.update(rollout, 1)
    assert trainer.counts["skipped_updates"] == most_skipped and trainer.counts["optimizer_steps"] == made
    assert all(torch.equal(value, weights[name]) for name, value in trainer.policy.lora_state().items())
    assert all(state["exp_avg"].isfinite().all() for state in trainer.optimizer.state.values())
    broken.clear()
    trainer.update(rollout, 2)
    assert trainer.counts["skipped_in_a_row"] == 0


# --- the run and its folder


def test_resume_is_exact(make, tmp_path):
    settings = dict(reward=noisy_redness, epochs=4, checkpoint_every=2, num_steps=3)
    torch.manual_seed(5)
    straight = make(**settings, output_dir=str(tmp_path / "straight"))
    straight.train()
    torch.manual_seed(5)
    make(**{**settings, "epochs": 2}).train()
    torch.manual_seed(7)
    resumed = make(**settings, resume=str(tmp_path / "run"))
    last = resumed.train()
    assert same_weights(straight, resumed)
    assert without_clock(tmp_path / "run") == without_clock(tmp_path / "straight")
    assert last["epoch"] == 4 and resumed.counts == straight.counts
    assert resumed.normalizer.state_dict() == straight.normalizer.state_dict()
    assert read_json(tmp_path / "run/config.json")["epochs"] == 4
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["epoch_000002.pt", "epoch_000004.pt"]


def test_settings_may_be_paths_and_numpy_numbers(make, tmp_path):
    "They must not make the checkpoint unreadable"
    make(output_dir=tmp_path / "run", learning_rate=np.float64(1e-3)).train()
    assert make(resume=tmp_path / "run", learning_rate=1e-3, epochs=2).train()["epoch"] == 2


class Killed(Exception):
    pass


class KillAfter(Callback):
    "The power fails after an epoch"

    def __init__(self, epoch):
        self.epoch = epoch

    def after_epoch(self, trainer, metrics):
        if metrics["epoch"] == self.epoch:
            raise Killed


def test_an_accident_costs_nothing_but_time(make, tmp_path):
    settings = dict(epochs=4, checkpoint_every=2, num_steps=3)
    straight = make(**settings, output_dir=str(tmp_path / "straight"))
    straight.train()
    with pytest.raises(Killed):
        make(**settings, callbacks=[KillAfter(3)]).train()
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"epoch": 4, "samp')
    (tmp_path / "run/checkpoints/.epoch_000004.pt.0123").write_bytes(b"half a checkpoint")
    resumed = make(**settings, resume=str(tmp_path / "run"))
    resumed.train()
    assert same_weights(straight, resumed)
    assert without_clock(tmp_path / "run") == without_clock(tmp_path / "straight")


killed_at = {  # where a process kills itself: no handler runs, nothing is flushed
    "sampling": "kill_in(Trainer, 'sample', calls=3)",
    "updating": "kill_in(Trainer, 'apply_update', calls=14)",
    "writing": "kill_in(os, 'replace', calls=6)",
    "after writing aside": "kill_in(os, 'fsync', calls=9)",
    "some moment": "kill_after(.35)",
    "another moment": "kill_after(.8)",
}
killing = """
import os, signal, sys, threading; sys.path.insert(0, {tests!r})
from test_trainer import *
def kill(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
def kill_in(place, name, calls):
    "At the start of a call, counted from 1"
    work, count = getattr(place, name), iter(range(1, 10**6))
    def counting(*args, **kwargs):
        if next(count) == calls: kill()
        return work(*args, **kwargs)
    setattr(place, name, counting)
def kill_after(seconds):
    class Clock(Callback):
        def before_train(self, trainer): threading.Timer(seconds, kill).start()
    trainer.callbacks.append(Clock())
trainer = Trainer(load_policy({pipeline!r}, device='cpu'), redness, PROMPTS, TrainConfig(**{settings!r}), [])
{moment}
trainer.train()
"""


@pytest.mark.parametrize("moment", killed_at)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(make, pipeline, tmp_path, moment):
    "SIGKILL: the resumed run has the weights and the log of an uninterrupted one, bit for bit"
    settings = dict(
        num_steps=5,
        epochs=6,
        pairs_per_epoch=4,
        pairs_per_update=2,
        micro_batch=2,
        eval_samples=0,
        buffer_size=8,
        min_count=4,
        checkpoint_every=1,
    )
    straight = make(**settings, output_dir=str(tmp_path / "straight"))
    straight.train()
    program = killing.format(
        tests=str(TESTS),
        pipeline=str(pipeline),
        settings={**settings, "epochs": 1000 if "moment" in moment else 6, "output_dir": str(tmp_path / "run")},
        moment=killed_at[moment],
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr[-2000:]
    reached = newest_checkpoint(tmp_path / "run")["counts"]["epoch"]
    resumed = make(**{**settings, "epochs": max(6, reached)}, resume=str(tmp_path / "run"))
    resumed.train()
    if reached > 6:
        straight = make(**{**settings, "epochs": reached}, resume=str(tmp_path / "straight"))
        straight.train()
    assert same_weights(straight, resumed) and without_clock(tmp_path / "run") == without_clock(tmp_path / "straight")


def test_what_cannot_be_resumed(make, tmp_path):
    run = tmp_path / "run"
    make(epochs=1).train()
    again = dict(resume=str(run), epochs=2)
    for settings, sentence in [
        (dict(learning_rate=1e-2), "learning_rate is 0.01, but the run"),
        (dict(prompts=["a dog"]), "prompts are not the 2"),
        (dict(reward=noisy_redness), "reward is 'noisy_redness', but the run"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            make(**again, **settings).train()
    newest = run / "checkpoints/epoch_000001.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read .*damaged. Delete it to go on from epoch_000000.pt"):
        make(**again).train()
    torch.save({"weights": torch.ones(2)}, newest)
    with pytest.raises(ValueError, match="was not written by sdpo_nb"):
        make(**again).train()
    with pytest.raises(ValueError, match="holds no checkpoints"):
        make(resume=str(tmp_path / "nowhere")).train()
    newest.unlink()
    assert make(**again).train()["epoch"] == 2


def test_refusals_leave_nothing_on_disk(make, pipeline, tmp_path):
    for settings, sentence in [
        (dict(num_steps=1), "expected signal is zero"),
        (dict(clip_range=-1), "clip_range is -1"),
        (dict(prompts=[]), "at least one string"),
        (dict(reward="no_such_reward"), "no_such_reward"),
        (dict(precision="bf16"), "precision is 'bf16', but the policy was loaded in 'fp32'"),
        (dict(recipe="prdp", sampling="single"), "compares pairs"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            make(**settings)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        make().train()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_broken_reward_is_named(make):
    with pytest.raises(ValueError, match="reward 'broken' returned nan"):
        make(
            reward=type(
                "Broken",
                (),
                {"name": "broken", "__call__": lambda self, images, prompts: torch.full((len(images),), torch.nan)},
            )()
        ).train()


def test_settings_read_back(make, pipeline, tmp_path):
    trainer = make(epochs=2)
    trainer.train()
    settings = json.loads((tmp_path / "run/config.json").read_text())
    assert settings["reward"] == "redness" and settings["policy"] == str(pipeline) and settings["prompts"] == PROMPTS
    assert {"sdpo_nb", "torch", "diffusers", "python"} <= settings["versions"].keys()
    config = run_config(tmp_path / "run")
    assert config == replace(trainer.config, resume=None) and resolve(config) == config
    resumed = Trainer(
        load_policy(config.policy, device="cpu"),
        redness,
        config.prompts,
        replace(config, resume=str(tmp_path / "run"), epochs=3),
        [],
    )
    assert resumed.train()["epoch"] == 3
    assert make(prompts="animals").config.prompts == "animals"
    assert make(prompts=list(animals)).config.prompts == "animals"
    (tmp_path / "run/config.json").write_text('{"policy": "tiny"}')
    with pytest.raises(ValueError, match="lacks recipe"):
        run_config(tmp_path / "run")


def test_lora_loads_with_plain_diffusers(make, pipeline, tmp_path):
    from diffusers import StableDiffusionPipeline

    trainer = make(learning_rate=1e-2, lora_alpha=8.0)
    trainer.train()
    plain = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None, requires_safety_checker=False)
    plain.load_lora_weights(tmp_path / "run/lora")
    latents, embedding = torch.randn(2, 4, 8, 8), trainer.policy.embed(PROMPTS)
    with torch.no_grad():
        ours, theirs = (
            trainer.policy.predict(latents, 500, embedding),
            plain.unet(latents, 500, embedding.prompt_embeds).sample,
        )
        with trainer.policy.without_lora():
            before = trainer.policy.predict(latents, 500, embedding)
    torch.testing.assert_close(theirs, ours)
    assert (ours - before).abs().max() > 1e-4


def test_patience(make):
    level = [0.0]

    def falling(images, prompts):
        level[0] -= 1
        return redness(images, prompts) + level[0]

    trainer = make(reward=falling, epochs=20, patience=2)
    assert trainer.train()["epoch"] == 3
    assert newest_checkpoint(trainer.folder)["counts"]["stale_epochs"] == 2


def test_dry_run(make, tmp_path, capsys):
    assert make(dry_run=True).train() is None
    assert "trajectories per epoch" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_diversity():
    apart = torch.zeros(2, 1, 1, 2, 2)
    apart[1] = 3
    assert pair_diversity(["x"], apart) == pytest.approx(3)
    assert pair_diversity(["x", "y"], torch.zeros(1, 2, 1, 2, 2)) is None


# --- callbacks


def test_evaluation_compares_with_the_policy_before_training(make, tmp_path, monkeypatch):
    monkeypatch.setattr("sdpo_nb.trainer.step_generalization", partial(step_generalization, steps=(1, 3)))
    settings = dict(eval_samples=5, learning_rate=1e-2)
    watcher = EvaluationCallback()
    make(**settings, callbacks=[watcher]).train()
    result = read_json(tmp_path / "run/evaluation.json")
    assert result["before"]["mean"] != result["after"]["mean"]
    # after a resume the policy has learnt already, and still "before" is the policy without LoRA
    (tmp_path / "run/evaluation_before.pt").unlink()
    later = EvaluationCallback()
    make(**settings, resume=str(tmp_path / "run"), callbacks=[later]).train()
    assert all(torch.equal(later.before[own].rewards, watcher.before[own].rewards) for own in (False, True))


@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: b"", lambda data: b"something else"])
def test_a_damaged_evaluation_is_made_again(make, tmp_path, monkeypatch, damage):
    monkeypatch.setattr("sdpo_nb.trainer.step_generalization", partial(step_generalization, steps=(1, 3)))
    settings = dict(eval_samples=5, learning_rate=1e-2)
    whole, repaired, path = EvaluationCallback(), EvaluationCallback(), tmp_path / "run/evaluation_before.pt"
    make(**settings, callbacks=[whole]).train()
    path.write_bytes(damage(path.read_bytes()))
    make(**settings, resume=str(tmp_path / "run"), callbacks=[repaired]).train()
    assert all(torch.equal(repaired.before[own].rewards, whole.before[own].rewards) for own in (False, True))
    again = EvaluationCallback()
    monkeypatch.setattr(again, "evaluate", lambda trainer, own: repaired.after[own])  # from the file, not evaluated
    make(**settings, resume=str(tmp_path / "run"), callbacks=[again]).train()
    assert torch.equal(again.before[False].rewards, whole.before[False].rewards)


def test_default_callbacks(monkeypatch):
    "Pictures in place only where a kernel runs, not in any other IPython"
    plain = [ProgressCallback, EvaluationCallback, ReportCallback]
    assert [type(callback) for callback in default_callbacks()] == plain
    for kernel in (False, True):
        shell = type("Shell", (), {"kernel": None} if kernel else {})()
        monkeypatch.setattr("IPython.get_ipython", lambda: shell)
        assert [type(callback) for callback in default_callbacks()] == (
            plain[:1] + [LiveCallback] + plain[1:] if kernel else plain
        )


class Screen(StringIO):
    "What stdout is where a person sits in front of it"

    def isatty(self):
        return True


def test_progress_in_a_terminal(make, monkeypatch):
    "One line that is written over: epochs, time gone and left, reward"
    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    metrics = make(epochs=3, num_steps=3, callbacks=[ProgressCallback()]).train()
    frames = screen.getvalue().split("\r")
    assert screen.getvalue().count("\n") == 1 and len(frames) > 3
    assert re.search(r"training:\s+33%.* 1/3 \[\d+:\d+<\d+:\d+, .*reward -?\d\.\d{3}\]", " ".join(frames))
    assert "3/3" in frames[-1] and f"reward {metrics['reward/mean']:.3f}" in frames[-1]


def test_progress_in_a_file_is_a_line_an_epoch(make, capsys):
    make(epochs=3, num_steps=3, callbacks=[ProgressCallback()]).train()
    out, err = capsys.readouterr()
    assert (
        re.fullmatch(r"(epoch \d/3 reward -?\d+\.\d{3} loss \S+\n){3}", out)
        and "\r" not in out + err
        and "training" not in err
    )


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
        assert same_weights(blind, other) and other.policy.unet.training == blind.policy.unet.training
        assert without_clock(other.folder) == without_clock(blind.folder)
        assert newest_checkpoint(other.folder)["random"][0]["torch"].equal(
            newest_checkpoint(blind.folder)["random"][0]["torch"]
        )
        assert other.normalizer.state_dict() == blind.normalizer.state_dict()
    assert (
        states["torch"].equal(random_states()["torch"])
        and states["python"] == random_states()["python"]
        and states["numpy"] == random_states()["numpy"]
    )


class EveryEpoch(LiveCallback):
    "Draws without regard to the time it takes"

    def after_epoch(self, trainer, metrics):
        self.due = 0.0
        super().after_epoch(trainer, metrics)


def test_pictures_stay_in_their_places_and_keep_their_size(make, shown):
    watcher = EveryEpoch()
    trainer = make(epochs=4, learning_rate=1e-2, callbacks=[watcher])
    trainer.train()
    curves, grids = shown
    assert len(curves) == len(grids) == 4
    for place in shown:
        sizes = {Image.open(BytesIO(picture.data)).size for picture in place}
        assert sizes == {(place[0].width, place[0].height)} and len({picture.data for picture in place}) == 4
    # the pictures: four pairs at one step and as trained, before from the policy without its LoRA, now from the one that was trained
    assert watcher.steps == [1, 5] and watcher.before.shape[:2] == (2, 4) and watcher.pairs[0] == PROMPTS * 2
    with trainer.policy.without_lora():
        assert torch.equal(watcher.pictures(trainer), watcher.before)
    assert not torch.equal(watcher.pictures(trainer), watcher.before)


def test_looking_costs_a_twentieth_of_the_time(make, shown, monkeypatch):
    clock = [0.0]

    def tick():
        return clock[0]

    watcher = LiveCallback()
    trainer = make(epochs=200)
    watcher.before_train(trainer)
    monkeypatch.setattr("sdpo_nb.trainer.time.perf_counter", tick)

    def show(handle, figure):
        clock[0] += 1.5
        shown.append(clock[0])  # two figures: three seconds

    monkeypatch.setattr("sdpo_nb.trainer.show_in_place", show)
    trainer.folder.mkdir()
    metrics = {"epoch": 1, "samples": 8, "reward/mean": 0.0, "reward/std": 1.0}
    (trainer.folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    for _ in range(100):
        clock[0] += 6
        watcher.after_epoch(trainer, metrics)
    assert 0.04 < 1.5 * len(shown) / clock[0] <= 0.055
    drawn = len(shown)
    trainer.counts["epoch"] = 200
    watcher.after_epoch(trainer, metrics)
    assert len(shown) == drawn + 2  # the last epoch is always drawn


def test_live_pictures_in_a_kernel(pipeline, tmp_path):
    "The default callbacks in a real kernel: two pictures, each sent once and replaced after that"
    code = f"""
import sys; sys.path.insert(0, {str(TESTS)!r})
import sdpo_nb.trainer
from test_trainer import *
sdpo_nb.trainer.LiveCallback = EveryEpoch
config = TrainConfig(num_steps=3, epochs=3, pairs_per_epoch=4, pairs_per_update=2, micro_batch=2, eval_samples=0, buffer_size=8, min_count=4, output_dir={str(tmp_path / "run")!r})
trainer = Trainer(load_policy({str(pipeline)!r}, device='cpu'), redness, PROMPTS, config)
trainer.train()"""
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
    assert [output["data"] for output in outputs] == [
        message["content"]["data"] for message in sent[-2:]
    ]  # what is saved is the last one
    assert all(output["metadata"]["image/png"].keys() == {"width", "height"} for output in outputs)


def test_a_finished_run_is_a_folder(make, tmp_path):
    make(eval_samples=2, callbacks=[EvaluationCallback(), ReportCallback()]).train()
    run = tmp_path / "run"
    assert {
        "README.md",
        "checkpoints",
        "config.json",
        "evaluation.json",
        "lora",
        "metrics.jsonl",
        "pictures",
        "report.html",
    } <= {path.name for path in run.iterdir()}
    result = read_json(run / "evaluation.json")
    assert result["steps"] == [1, 2, 4, 8, 16, 50] and result["n"] == 2 and result["reward"] == "redness"
    assert result["own_scheduler"]["steps"] == result["steps"] and set(result["gain"]) == {"mean", "se"}
    assert {path.stem for path in (run / "pictures").iterdir()} == {
        "step_grid",
        "step_grid_own",
        "film_strip",
        "similarity_map",
        "reward_map",
        "advantage_map",
        "anchor_histogram",
    }
    assert (
        "Not available" not in (run / "report.html").read_text()
        and "load_lora_weights" in (run / "README.md").read_text()
    )


@pytest.mark.parametrize("settings", [dict(recipe="ddpo"), dict(num_steps=2, queries="terminal")], ids=str)
def test_reports_of_other_recipes(make, tmp_path, settings):
    make(**settings, callbacks=[EvaluationCallback(), ReportCallback()]).train()
    pictures = {path.stem for path in (tmp_path / "run/pictures").iterdir()}
    assert {"film_strip", "advantage_map"} <= pictures and "step_grid" not in pictures


# --- the reward in a thread


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(queries="all", sampling="independent_pair"),
        dict(queries="terminal", credit="causal", train_last_step=True),
        dict(recipe="ddpo"),
    ],
    ids=str,
)
def test_the_reward_may_work_while_sampling_goes_on(make, settings):
    "The same scores as one after the other, up to the rounding of decoding in other batches, for the same pictures"
    plain, meanwhile = (make(micro_batch=1, reward_worker=worker, **settings).rollout(0) for worker in (False, True))
    assert (
        meanwhile.prompts == plain.prompts
        and meanwhile.queries == plain.queries
        and torch.equal(meanwhile.embedding.prompt_embeds, plain.embedding.prompt_embeds)
    )
    for name in ("latents", "pred_x0", "log_prob", "indices", "states", "actions"):
        assert torch.equal(getattr(meanwhile, name), getattr(plain, name)), name
    for name in ("rewards", "final_reward", "dense", "advantages"):
        one, other = getattr(plain, name), getattr(meanwhile, name)
        assert other is None if one is None else torch.allclose(other, one, rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_random_anchors_do_not_depend_on_batches(make, micro_batch):
    settings = dict(anchor="random", num_steps=20, pairs_per_epoch=8)
    plain, meanwhile = (
        make(**settings).rollout(0),
        make(**settings, micro_batch=micro_batch, reward_worker=True).rollout(0),
    )
    assert torch.equal(plain.indices, meanwhile.indices) and plain.indices[..., 1].unique().numel() > 4


def watch_batches(monkeypatch, before):
    "Call `before(number)` when a batch of trajectories begins; the numbers so far"
    from sdpo_nb import trainer as module

    seen, sample = [], module.sample_trajectories

    def watched(*args, **options):
        seen.append(len(seen))
        before(seen[-1])
        return sample(*args, **options)

    monkeypatch.setattr(module, "sample_trajectories", watched)
    return seen


def test_sampling_does_go_on(make, monkeypatch):
    "A reward that answers for the first batch only when the second is being sampled"
    begun, threads = threading.Event(), []

    def patient(images, prompts):
        threads.append(threading.current_thread().name)
        assert begun.wait(60)
        return redness(images, prompts)

    watch_batches(monkeypatch, lambda number: begun.set() if number else None)
    make(reward=patient, micro_batch=2, reward_worker=True).rollout(0)
    assert threads == ["reward"] * 2


def test_calls_do_not_become_small(make):
    "Batches are put together up to 64 pictures, as long as two groups are left"

    def groups(**settings):
        return [len(units) for units in make(reward_worker=True, **settings).scoring_groups()]

    assert groups(micro_batch=1) == [2, 2] and groups(micro_batch=1, pairs_per_epoch=6, pairs_per_update=6) == [3, 3]
    assert groups(micro_batch=1, pairs_per_epoch=40) == [12, 12, 12, 4] and groups(
        micro_batch=2, pairs_per_epoch=40
    ) == [12, 12, 12, 4]  # five pictures a pair
    assert groups(micro_batch=2, pairs_per_epoch=8, queries="all", num_steps=50) == [2] * 4 and groups(
        micro_batch=1, recipe="ddpo"
    ) == [4, 4]


def test_a_reward_that_fails_in_the_thread_ends_the_epoch(make, tmp_path, monkeypatch):
    calls, asked = [], threading.Event()

    def failing(images, prompts):
        calls.append(len(images))
        asked.set()
        raise RuntimeError("out of ideas")

    def after_the_failure(number):
        if number < 12:
            return
        assert asked.wait(60)
        while any(thread.name == "reward" for thread in threading.enumerate()):
            pass

    sampled = watch_batches(monkeypatch, after_the_failure)
    trainer = make(reward=failing, micro_batch=1, pairs_per_epoch=40, reward_worker=True)
    with pytest.raises(ValueError, match="reward 'failing' failed: RuntimeError: out of ideas"):
        trainer.train()
    assert (
        newest_checkpoint(tmp_path / "run")["counts"]["epoch"] == 0 and len(calls) == 1 and len(sampled) <= 24
    )  # of 40: the group of twelve that was asked for, and the one after it


def test_a_hanging_reward_does_not_keep_an_interrupted_run_alive(pipeline, tmp_path):
    code = f"""
import os, signal, sys, threading, time; sys.path.insert(0, {str(TESTS)!r})
from test_trainer import *
def hanging(images, prompts):
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    time.sleep(10000)
config = TrainConfig(num_steps=3, pairs_per_epoch=4, pairs_per_update=2, micro_batch=1, eval_samples=0, buffer_size=8, min_count=4, reward_worker=True, output_dir={str(tmp_path / "run")!r})
try: Trainer(load_policy({str(pipeline)!r}, device='cpu'), hanging, PROMPTS, config, []).train()
except KeyboardInterrupt: print('interrupted')"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "interrupted" and newest_checkpoint(tmp_path / "run")["counts"]["epoch"] == 0


def test_an_accident_of_the_thread_itself_is_not_overlooked(make, monkeypatch):
    "Out of memory while batches are put together, say: an epoch with trajectories missing must not go on"
    from sdpo_nb import trainer as module

    def no_memory(parts, real=module.join_rollouts):
        if threading.current_thread().name == "reward":
            raise MemoryError("no room")
        return real(parts)

    monkeypatch.setattr(module, "join_rollouts", no_memory)
    with pytest.raises(MemoryError, match="no room"):
        make(micro_batch=1, reward_worker=True).rollout(0)


def test_resume_is_exact_with_the_reward_in_a_thread(make, tmp_path):
    settings = dict(reward=noisy_redness, micro_batch=1, reward_worker=True, anchor="random", num_steps=6)
    torch.manual_seed(5)
    straight = make(**settings, epochs=2, output_dir=str(tmp_path / "straight"))
    straight.train()
    torch.manual_seed(5)
    make(**settings, epochs=1).train()
    torch.manual_seed(99)
    resumed = make(**settings, epochs=2, resume=str(tmp_path / "run"))
    resumed.train()
    assert same_weights(straight, resumed) and without_clock(tmp_path / "straight") == without_clock(tmp_path / "run")


def test_a_thread_without_anything_to_do_is_refused(make):
    with pytest.raises(ValueError, match="reward_worker is true, but a process samples its 4 pairs in one batch"):
        make(pairs_per_update=4, micro_batch=4, reward_worker=True)


# --- several processes


def test_two_processes_learn_what_one_does(make, pipeline, two_processes, tmp_path):
    "One update of the whole epoch: then the order does not matter, and the gradient is the mean over processes"
    settings = dict(num_steps=2, pairs_per_epoch=4, pairs_per_update=4, micro_batch=1, epochs=2, normalizer="step")
    alone = make(**settings, output_dir=str(tmp_path / "alone"))
    alone.train()
    first, second = two_processes(f"""
        from test_trainer import *
        config = TrainConfig(eval_samples=0, buffer_size=8, min_count=4, output_dir={str(tmp_path / "two")!r}, **{settings!r})
        trainer = Trainer(load_policy({str(pipeline)!r}, device='cpu'), redness, PROMPTS, config, [])""")
    same_learning(first, second, weights(alone), weights(make(**settings)))
    one, two = (without_clock(tmp_path / name) for name in ("alone", "two"))
    for name in ("samples", "reward_queries", "optimizer_steps"):
        assert [record[name] for record in one] == [record[name] for record in two]
    for name in ("reward/mean", "loss"):
        assert [record[name] for record in two] == pytest.approx([record[name] for record in one], rel=1e-3)
    assert len(newest_checkpoint(tmp_path / "two")["random"]) == 2


def test_two_processes_sample_and_follow_what_one_does(make, pipeline, two_processes, tmp_path):
    "Trajectories, advantages and the gradient of an update, where the statistics of earlier epochs have begun to be forgotten"
    settings = dict(
        num_steps=3,
        pairs_per_epoch=8,
        pairs_per_update=8,
        micro_batch=2,
        order="step_accumulated",
        buffer_size=6,
        min_count=4,
    )

    def look(trainer):
        for epoch in range(3):
            rollout = trainer.rollout(epoch)
        trainer.apply_update(rollout, trainer.epoch_updates(rollout, 2)[0])
        return dict(
            latents=rollout.latents,
            advantages=rollout.advantages,
            gradient=torch.cat([parameter.grad.flatten() for parameter in trainer.parameters]),
        )

    alone = look(make(**settings))
    two = two_processes(
        f"""
        from test_trainer import *
        config = TrainConfig(eval_samples=0, output_dir={str(tmp_path / "two")!r}, **{settings!r})
        trainer = Trainer(load_policy({str(pipeline)!r}, device='cpu'), redness, PROMPTS, config, [])
        for epoch in range(3): rollout = trainer.rollout(epoch)
        trainer.apply_update(rollout, trainer.epoch_updates(rollout, 2)[0])""",
        "dict(latents=rollout.latents, advantages=rollout.advantages, gradient=torch.cat([parameter.grad.flatten() for parameter in trainer.parameters]))",
    )

    def difference(a, b):
        return ((a - b).norm() / b.norm()).item()

    for name in ("latents", "advantages"):
        assert difference(torch.cat([part[name] for part in two], 1), alone[name]) < 1e-6
    assert (
        torch.equal(two[0]["gradient"], two[1]["gradient"]) and difference(two[0]["gradient"], alone["gradient"]) < 1e-6
    )


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision(make, pipeline, precision):
    "Weights in half precision, log-probabilities and LoRA in float32"
    trainer = make(
        policy=load_policy(pipeline, device="cpu", precision=precision), precision=precision, num_steps=3, epochs=2
    )
    start, metrics = weights(trainer), trainer.train()
    assert (
        metrics["log_ratio/max_before_update"] <= trainer.log_ratio_bound()
        and metrics["skipped_updates"] == 0
        and math.isfinite(metrics["loss"])
    )
    assert metrics.get("loss_scale") == (2.0**12 if precision == "fp16" else None)
    assert all(value.dtype == torch.float32 for value in weights(trainer).values()) and any(
        not torch.equal(value, start[name]) for name, value in weights(trainer).items()
    )


def test_the_loss_scale_falls_and_rises(make, pipeline, monkeypatch):
    monkeypatch.setattr("sdpo_nb.trainer.loss_scale_growth", 3)
    trainer = make(policy=load_policy(pipeline, device="cpu", precision="fp16"), precision="fp16")
    scales = []
    for finite in (True, True, False, True, True, True, True, True, True, False):
        trainer.note_gradient(finite)
        scales.append(trainer.counts["loss_scale"] / 2**12)
    assert scales == [1, 1, 0.5, 0.5, 0.5, 1, 1, 1, 2, 1]
    for _ in range(100):
        trainer.note_gradient(True)
    assert trainer.counts["loss_scale"] == 2**16
    exact = make()
    for _ in range(10):
        exact.note_gradient(True)
    assert exact.counts["loss_scale"] == 1


def test_a_smaller_gpu_may_go_on(make, tmp_path):
    "Smaller pieces and recomputed activations: the same updates, up to rounding"
    make(epochs=1).train()
    resumed = make(epochs=2, micro_batch=1, gradient_checkpointing=True, resume=str(tmp_path / "run"))
    assert resumed.train()["epoch"] == 2 and run_config(tmp_path / "run").micro_batch == 1


@pytest.mark.parametrize("name", ["DEEPSPEED", "MEGATRON_LM"])
def test_loops_of_others_are_refused(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(
        ValueError,
        match=f"ACCELERATE_USE_{name} is true, but it steps and scales gradients in a loop of its own; .* choose multi-GPU, or FSDP version 2",
    ):
        batch_line(resolve(TrainConfig()))


@pytest.mark.parametrize("version", [None, "1"])
def test_only_the_second_version_of_sharing(monkeypatch, version):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False) if version is None else monkeypatch.setenv(
        "FSDP_VERSION", version
    )
    with pytest.raises(ValueError, match="FSDP_VERSION is 1, .* --fsdp_version 2"):
        batch_line(resolve(TrainConfig()))
    monkeypatch.setenv("FSDP_VERSION", "2")
    batch_line(resolve(TrainConfig()))


SHARED = """
    from test_trainer import *
    from sdpo_nb.trainer import PictureCallback
    def shared(output, callbacks=(), **settings):
        config = TrainConfig(eval_samples=2, log_images_every=2, buffer_size=8, min_count=4, output_dir=output, **settings)
        return Trainer(load_policy({pipeline!r}, device='cpu'), redness, PROMPTS, config, list(callbacks))
"""


@pytest.mark.parametrize(
    "settings",
    [
        dict(kl_coefficient=0.1, gradient_checkpointing=True),
        dict(recipe="d3po"),
        dict(lora_rank=0, kl_coefficient=0.1, learning_rate=1e-4),
    ],
    ids=str,
)
def test_processes_that_share_the_weights(make, pipeline, two_processes, tmp_path, settings):
    "The same learning as in one process, with evaluation, pictures and report by the first of the two alone"
    settings = dict(
        num_steps=2, pairs_per_epoch=4, pairs_per_update=4, micro_batch=1, epochs=2, normalizer="step", **settings
    )
    alone = make(**settings, output_dir=str(tmp_path / "alone"), eval_samples=2, callbacks=[EvaluationCallback()])
    alone.train()
    first, second = two_processes(
        textwrap.dedent(SHARED.format(pipeline=str(pipeline)))
        + f"trainer = shared({str(tmp_path / 'two')!r}, [EvaluationCallback(), ReportCallback()], **{settings!r})",
        sharing=True,
    )
    same_learning(first, second, weights(alone), weights(make(**settings)))
    one, two = (without_clock(tmp_path / name) for name in ("alone", "two"))
    for name in ("reward/mean", "loss", "grad_norm"):
        assert [record[name] for record in two] == pytest.approx([record[name] for record in one], rel=1e-3)
    assert (
        read_json(tmp_path / "two/evaluation.json")["before"] == read_json(tmp_path / "alone/evaluation.json")["before"]
    )
    assert {"README.md", "lora" if settings.get("lora_rank", 4) else "unet", "report.html", "progress"} <= {
        path.name for path in (tmp_path / "two").iterdir()
    }
    policy = load_policy(pipeline, device="cpu")
    policy.load_lora(tmp_path / "two/lora") if settings.get("lora_rank", 4) else policy.load_whole(
        tmp_path / "two/unet"
    )
    saved = policy.lora_state()
    assert saved.keys() == first.keys() and all(torch.equal(saved[name], first[name]) for name in first)


@pytest.mark.parametrize(
    "name, value",
    [
        ("FSDP_ACTIVATION_CHECKPOINTING", "true"),
        ("FSDP_OFFLOAD_PARAMS", "true"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP"),
    ],
)
def test_ways_of_sharing_that_do_not_work(monkeypatch, name, value):
    for variable, setting in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2"), (name, value)):
        monkeypatch.setenv(variable, setting)
    with pytest.raises(ValueError, match=f"{name} is {value}, which does not work here; "):
        batch_line(resolve(TrainConfig()))


def test_sharing_without_gpus_is_refused(make, monkeypatch):
    for variable, setting in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2")):
        monkeypatch.setenv(variable, setting)
    with pytest.raises(ValueError, match="accelerate splits weights among GPUs only, and there are none here"):
        make()


def test_what_would_go_wrong_where_weights_are_shared(pipeline, two_processes, tmp_path):
    "Each in one sentence: saving a part, loading what would be lost, a second trainer"
    answers, other = two_processes(
        textwrap.dedent(SHARED.format(pipeline=str(pipeline)))
        + textwrap.dedent(f"""
        settings = dict(num_steps=2, pairs_per_epoch=4, pairs_per_update=4, micro_batch=1, normalizer='step')
        trainer = shared({str(tmp_path / "run")!r}, **settings)
        trainer.train_epoch()
        policy, told = trainer.policy, []
        def attempt(action):
            try: action()
            except (ValueError, RuntimeError) as error: told.append(str(error))
        attempt(lambda: policy.save_lora({str(tmp_path / "lora")!r}))
        with policy.gathered(): attempt(lambda: policy.load_lora_state(policy.lora_state()))
        attempt(lambda: Trainer(policy, redness, PROMPTS, TrainConfig(output_dir={str(tmp_path / "other")!r}, **settings)))"""),
        result="told",
        sharing=True,
    )
    assert [" ".join(answer.split()[:1]) for answer in answers] == [
        "save_lora",
        "load_lora_state",
        "The",
    ] and answers == other
    assert (
        "with policy.gathered():" in answers[0]
        and "outside of `gathered` and of callbacks" in answers[1]
        and "load the policy anew" in answers[2]
    )


@pytest.mark.parametrize("rank", [0, 4])
def test_resume_where_weights_are_shared(pipeline, two_processes, tmp_path, rank):
    "Bit by bit, the whole UNet and a LoRA"
    settings = dict(
        num_steps=3,
        pairs_per_epoch=4,
        pairs_per_update=2,
        micro_batch=1,
        normalizer="step",
        lora_rank=rank,
        learning_rate=1e-4,
    )
    start = textwrap.dedent(SHARED.format(pipeline=str(pipeline)))
    straight, _ = two_processes(
        start + f"trainer = shared({str(tmp_path / 'straight')!r}, epochs=2, **{settings!r})", sharing=True
    )
    two_processes(start + f"trainer = shared({str(tmp_path / 'run')!r}, epochs=1, **{settings!r})", sharing=True)
    resumed, other = two_processes(
        start
        + f"trainer = shared({str(tmp_path / 'run')!r}, epochs=2, resume={str(tmp_path / 'run')!r}, **{settings!r})",
        sharing=True,
    )
    assert all(
        torch.equal(straight[name], resumed[name]) and torch.equal(resumed[name], other[name]) for name in straight
    )
    assert without_clock(tmp_path / "straight") == without_clock(tmp_path / "run")


def test_resume_is_exact_with_the_shipped_model_and_rewards(tmp_path):
    "A run of three epochs, and one that a fresh process would go on with after two: the rewards' own caches must not show"
    from sdpo_nb.config import preset_config
    from sdpo_nb.models import load_policy

    def run(folder, **settings):
        config = preset_config(
            "tiny", num_steps=4, eval_samples=0, checkpoint_every=1, output_dir=str(folder), **settings
        )
        trainer = Trainer(load_policy("tiny"), config.reward, config.prompts, config, callbacks=[])
        trainer.train()
        return trainer.policy.lora_state()

    whole = run(tmp_path / "whole", epochs=3)
    run(tmp_path / "parts", epochs=2)
    resumed = run(tmp_path / "parts", epochs=3, resume=str(tmp_path / "parts"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
