"""`sdpo_branch` and `sdpo_mixed`: what is counted, credited, resumed, shared between processes, and refused."""

import math
import re

import pytest
import torch
from comparisons import same_learning, same_weights, weights, without_clock
from small_runs import PROMPTS, SMALL, redness, rolled, small_trainer

from sdpo_nb.advantages import StepPromptNormalizer
from sdpo_nb.branch import BranchConfig, BranchTrainer
from sdpo_nb.cli import train_command
from sdpo_nb.config import TrainConfig, preset_config, resolve, step_counts
from sdpo_nb.models import load_policy
from sdpo_nb.plan import batch_plan, plan_text
from sdpo_nb.run import run_config
from sdpo_nb.spo import SPOConfig


@pytest.fixture
def branch(pipeline, tmp_path):
    "Make a trainer of a small run of trees"

    def make(output="run", reward=redness, **settings):
        config = BranchConfig(**{**SMALL, "output_dir": str(tmp_path / output), **settings})
        return BranchTrainer(load_policy(pipeline, device="cpu"), reward, PROMPTS, config, [])

    return make


@pytest.fixture
def mixed(pipeline, tmp_path):
    def make(output="run", **settings):
        settings = {"num_steps": (2, 3, 4), "recipe": "sdpo_mixed", **settings}
        return small_trainer(pipeline, tmp_path, output_dir=str(tmp_path / output), **settings)

    return make


# --- branches


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(candidates=4, num_steps=4),
        dict(num_steps=(2, 4), epochs=2),
        dict(divert_start=1, kl_coefficient=0.1),
        dict(train_last_step=True, continue_from="winner"),
        dict(normalizer="batch", order="step_accumulated", micro_batch=1),
    ],
    ids=str,
)
def test_it_trains_and_counts_what_it_says(branch, settings):
    "Queries, updates and network calls are those of the plan; nothing is asked about the finished sample"
    trainer, calls = branch(**settings), []
    plan, config, start = batch_plan(trainer.config), trainer.config, weights(trainer)
    predict = trainer.policy.predict
    trainer.policy.predict = lambda x, *rest: calls.append(len(x)) or predict(x, *rest)
    metrics = trainer.train()
    epochs, k, last = config.epochs, config.candidates, config.train_last_step
    assert metrics["reward_queries"] == epochs * plan["reward queries per epoch"]
    assert metrics["optimizer_steps"] == epochs * plan["optimizer steps per epoch"]
    ordinary, branching = config.divert_start, [T - 1 + last for T in step_counts(config.num_steps)]
    grown = sum(4 * (1 + ordinary + k * (T - 1 - ordinary)) for T in step_counts(config.num_steps))
    trained = sum(4 * (n - ordinary) for n in branching)  # one call a comparison: its two actions share their state
    assert sum(calls) == grown + trained * (2 if config.kl_coefficient else 1)
    assert not all(torch.equal(start[name], value) for name, value in weights(trainer).items())
    assert metrics["log_ratio/max_before_update"] < 1e-5
    assert all(math.isfinite(value) for value in metrics.values() if value is not None)


def test_each_action_is_credited_with_its_own_next_prediction(branch):
    "Minus that of its siblings, over the deviation for step and prompt; of four candidates best and worst remain"
    trainer = branch(candidates=4, num_steps=4, buffer_size=64)
    trainer.begin_epoch()
    rollout = trainer.sample()
    scores, actions = rollout.dense.clone(), rollout.actions.clone()
    trainer.score(rollout)
    trainer.credit(rollout)
    assert scores[..., -1].isnan().all() and not scores[..., :-1].isnan().any()  # the last step does not branch
    embedding = trainer.policy.embed(rollout.prompts)
    for i in range(3):
        for k in range(4):
            state, time = actions[k, :, i], trainer.sampler.timesteps[i + 1].item()
            with torch.no_grad():
                ahead = trainer.sampler.predict(trainer.policy.predict(state, time, embedding), state, i + 1)[0]
            torch.testing.assert_close(
                scores[k, :, i], redness(trainer.policy.decode(ahead), None), atol=1e-4, rtol=1e-4
            )
    centred = (scores - scores.mean(0))[..., :3]
    expected = StepPromptNormalizer(64, 4).update(rollout.prompts * 4, centred.flatten(0, 1)).view(4, -1, 3)
    for b in range(len(rollout.prompts)):
        for i in range(3):
            best, worst = scores[:, b, i].argmax(), scores[:, b, i].argmin()
            assert torch.equal(rollout.actions[:, b, i], actions[[best, worst], b, i])
            torch.testing.assert_close(rollout.advantages[:, b, i], expected[[best, worst], b, i])
    path = scores[rollout.chosen[:, :3], torch.arange(4)[:, None], torch.arange(3)]
    assert torch.equal(rollout.rewards[0], path) and rollout.indices[0, 0].tolist() == [1, 2, 3]
    assert torch.equal(rollout.outcome[0], path[:, -1])


def test_the_better_action_becomes_more_probable(branch):
    "After one update with everything in it, for nearly every comparison"
    trainer = branch(pairs_per_epoch=8, pairs_per_update=8, learning_rate=1e-3, order="step_accumulated", micro_batch=8)
    rollout = rolled(trainer)
    before = rollout.log_prob.clone()
    (minibatch,) = trainer.minibatches(rollout)
    trainer.accelerator.backward(trainer.loss(rollout, minibatch))
    trainer.optimizer_step()
    change = (trainer.all_log_probs(rollout) - before)[..., trainer.trained_steps]
    gap = (rollout.advantages[0] - rollout.advantages[1])[..., trainer.trained_steps]
    assert (gap * (change[0] - change[1])).sum() > 0


@pytest.mark.parametrize("settings", [dict(num_steps=4), dict(num_steps=(2, 4))], ids=str)
def test_a_resumed_branch_run_is_the_same_run(branch, tmp_path, settings):
    whole = branch("whole", epochs=3, **settings)
    whole.train()
    branch("parts", epochs=1, **settings).train()
    resumed = branch("parts", epochs=3, resume=str(tmp_path / "parts"), **settings)
    resumed.train()
    assert same_weights(whole, resumed) and without_clock(tmp_path / "whole") == without_clock(tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["branch", "mixed"])
def test_two_processes_learn_what_one_does(branch, mixed, pipeline, two_processes, tmp_path, kind):
    settings = dict(SMALL, epochs=2, pairs_per_update=4, micro_batch=1, order="step_accumulated")
    settings |= dict(num_steps=[2, 3] if kind == "mixed" else 3)
    alone = {"branch": branch, "mixed": mixed}[kind]("alone", **settings)
    untrained = weights(alone)
    alone.train()
    names = dict(branch=("Branch", "branch", "sdpo_branch"), mixed=("Train", "trainer", "sdpo_mixed"))[kind]
    first, second = two_processes(
        f"""
        from small_runs import *
        from sdpo_nb.config import TrainConfig
        from sdpo_nb.branch import BranchConfig, BranchTrainer
        config = {names[0]}Config(recipe={names[2]!r}, output_dir={str(tmp_path / "two")!r}, **{settings!r})
        kind = BranchTrainer if {kind == "branch"} else Trainer
        trainer = kind(load_policy({str(pipeline)!r}, device='cpu'), redness, PROMPTS, config, [])"""
    )
    same_learning(first, second, weights(alone), untrained)
    one, two = (without_clock(tmp_path / name) for name in ("alone", "two"))
    for name in ("samples", "reward_queries", "optimizer_steps"):
        assert [record[name] for record in one] == [record[name] for record in two]
    assert [r["reward/mean"] for r in two] == pytest.approx([r["reward/mean"] for r in one], rel=1e-3)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_steps=1), "num_steps is 1 with divert_start=0 and train_last_step=False, which leaves no step whose"),
        (dict(num_steps=[4, 1]), "num_steps is 1 with divert_start=0"),
        (dict(num_steps=4, divert_start=3), "num_steps is 4 with divert_start=3"),
        (dict(divert_start=4), "divert_start is 4; give a whole number from 0 to 1"),
        (dict(candidates=1), "candidates is 1; give a whole number from 2 to 64"),
        (dict(min_count=64), "min_count is 64, more than buffer_size 32 can hold"),
        (dict(recipe="sdpo"), "recipe is 'sdpo', which goes with TrainConfig, not BranchConfig"),
    ],
    ids=str,
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(BranchConfig(**settings))


@pytest.mark.parametrize("name", ["queries", "credit", "gamma", "preference_model", "segment_steps"])
def test_what_a_branch_does_not_obey_is_no_field(name):
    with pytest.raises(ValueError, match=f"{name} is a setting of the recipes? .*, which the recipe 'sdpo_branch'"):
        BranchConfig(**{name: 3})


# --- several numbers of steps


def test_every_number_of_steps_once_in_a_round(mixed):
    trainer, seen = mixed(epochs=7), []
    trainer.close_epoch = (lambda close: lambda metrics: seen.append(trainer.last_rollout) or close(metrics))(
        trainer.close_epoch
    )
    trainer.train()
    steps = [rollout.log_prob.shape[2] for rollout in seen]
    assert sorted(steps[:3]) == sorted(steps[3:6]) == [2, 3, 4]
    assert {steps for _, steps in trainer.normalizer.buffers} == {2, 3, 4}  # statistics of each by itself
    for T, plan in trainer.step_plans.items():
        assert len(plan.scales) == len(plan.weights) == plan.sampler.num_steps == T
        assert plan.scales[plan.trained].mean().item() == pytest.approx(1)
        alone = small_trainer(trainer.policy.name, trainer.folder, num_steps=T, recipe="sdpo")
        assert torch.equal(alone.scales, plan.scales)


def test_a_resumed_mixed_run_is_the_same_run(mixed, tmp_path):
    whole = mixed("whole", epochs=5)
    whole.train()
    mixed("parts", epochs=2).train()
    resumed = mixed("parts", epochs=5, resume=str(tmp_path / "parts"))
    resumed.train()
    assert same_weights(whole, resumed) and without_clock(tmp_path / "whole") == without_clock(tmp_path / "parts")
    assert run_config(tmp_path / "parts").num_steps == [2, 3, 4]
    with pytest.raises(ValueError, match=re.escape("num_steps is [2, 3], but the run in")):
        mixed("parts", num_steps=[2, 3], epochs=6, resume=str(tmp_path / "parts")).train()


def test_a_plan_counts_the_mean(mixed):
    "Over whole rounds it is exact"
    trainer = mixed(epochs=6)
    plan = batch_plan(trainer.config)
    queries = plan["reward queries per epoch, at most"]
    assert plan["trained steps per trajectory"] == 2 and queries == pytest.approx(4 * (3 + 5 + 5) / 3, abs=0.01)
    metrics = trainer.train()
    assert metrics["optimizer_steps"] == 6 * plan["optimizer steps per epoch"]
    assert metrics["reward_queries"] <= round(6 * queries)
    assert "trained steps per trajectory" in plan_text(trainer.config, PROMPTS)


def test_any_method_takes_several(pipeline, tmp_path):
    for recipe in ("ddpo", "d3po", "prdp"):
        trainer = small_trainer(pipeline, tmp_path / recipe, recipe=recipe, num_steps=[2, 3], epochs=2)
        assert math.isfinite(trainer.train()["loss"])
    assert resolve(SPOConfig(num_steps=[2, 4])).plan()["branching steps of a tree"] == 2.5


@pytest.mark.parametrize(
    "value, message",
    [
        ([2, 0], "num_steps is 0; give a whole number from 1 to 1000."),
        ([], "num_steps is []; give a whole number from 1 to 1000."),
        ([2, 2.5], "num_steps is 2.5; give a whole number"),
        ("2,3", "num_steps is '2,3'; give a whole number"),
        ([1, 4], "num_steps is 1 with credit='paper', whose expected signal is zero"),
    ],
    ids=str,
)
def test_numbers_of_steps_that_cannot_be(value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(TrainConfig(recipe="sdpo_mixed", num_steps=value))


def test_on_the_command_line(capsys, tmp_path):
    "A list by commas and in YAML; a preset's number gives way to a recipe that is about several"
    assert preset_config("sd_turbo_aesthetic", recipe="sdpo_mixed").num_steps is None
    assert resolve(preset_config("tiny", recipe="sdpo_mixed")).num_steps == [2, 3, 4, 10]
    for words in (["--num_steps", "2,4"], ["--num_steps=2,4", "--recipe", "sdpo_branch"]):
        assert train_command(["tiny", *words, "--dry_run", "--output_dir", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert "2 trained steps per trajectory" in said and "2 branching steps of a tree" in said
    (tmp_path / "c.yaml").write_text("num_steps: [2, 6]\nrecipe: sdpo_branch\n")
    assert train_command(["tiny", "--config", str(tmp_path / "c.yaml"), "--dry_run"]) == 0
    assert "3 branching steps of a tree" in capsys.readouterr().out
    assert train_command(["tiny", "--num_steps", "2,x", "--dry_run"]) == 2
    assert "num_steps is 'x'; give a whole number." in capsys.readouterr().err
    assert train_command(["tiny", "--epochs", "2,3", "--dry_run"]) == 2
    assert "epochs is '2,3'; give a whole number." in capsys.readouterr().err
