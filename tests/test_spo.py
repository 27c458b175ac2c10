"""SPO: the common trainer that learns from comparisons of a tree's candidates."""

import json
import math
import re

import pytest
import torch
from comparisons import same_learning, same_weights, weights, without_clock

from sdpo_nb.batching import Minibatch
from sdpo_nb.config import TrainConfig, resolve
from sdpo_nb.files import read_jsonl
from sdpo_nb.models import load_policy
from sdpo_nb.objectives import preference_loss
from sdpo_nb.plan import batch_plan
from sdpo_nb.preference import RewardAsPreference, load_preference, modulation_file
from sdpo_nb.run import run_config
from sdpo_nb.spo import SPOConfig, SPOTrainer, compare_candidates
from sdpo_nb.trainer import Trainer

PROMPTS = ["a red circle", "a cat"]


def redness(images, prompts):
    return (images[:, 0] - images[:, 2]).mean((1, 2))


def later_is_better(images, timesteps, prompts):
    "A judge that is told the timestep, and listens"
    return redness(images, prompts) * (1 + timesteps / 1000)


@pytest.fixture(scope="module")
def policy(pipeline):
    return load_policy(pipeline, device="cpu")


def close(first, second, tolerance=1e-4):
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)


# --- settings

REFUSED = [
    (dict(candidates=2.0), "candidates is 2.0; give a whole number from 2 to 64"),
    (dict(preference_threshold=0), "preference_threshold is 0; give a number above 0"),
    (dict(preference_threshold=1.0), "preference_threshold is 1.0; give a number above 0 and below 1"),
    (dict(preference_scale=0.0), "preference_scale is 0.0; give a number above 0"),
    (dict(beta=-1.0), "beta is -1.0; give a number above 0"),
    (dict(divert_start=10), "divert_start is 10; give a whole number from 0 to 9"),
    (dict(segment_steps=11), "segment_steps is 11; give a whole number from 1 to 10"),
    (dict(num_steps=1), "num_steps is 1 with divert_start=None and train_last_step=True, which leaves no step whose"),
    (
        dict(num_steps=4, divert_start=3, train_last_step=False),
        "num_steps is 4 with divert_start=3 and train_last_step=",
    ),
    (dict(clip_range=1.0), "clip_range is 1.0"),
    (dict(recipe="sdpo"), "recipe is 'sdpo', which goes with TrainConfig, not SPOConfig"),
    (dict(policy="stabilityai/sd-turbo"), "the policy is 'stabilityai/sd-turbo'; give the folder or hub id of a judge"),
    (dict(preference_model="./none"), "where nothing is; give tiny, reward, or the folder or hub id of a judge."),
    (dict(preference_model=""), "preference_model is ''"),
    (dict(preference_model=None), "preference_model is None"),
]


@pytest.mark.parametrize("settings, message", REFUSED, ids=[str(settings) for settings, _ in REFUSED])
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(SPOConfig(**settings))


def test_settings():
    config = resolve(SPOConfig())
    assert (config.beta, config.clip_range, config.step_weight, config.train_last_step) == (10.0, 0.1, 1.0, True)
    assert resolve(config) == config and resolve(SPOConfig(beta=5.0)).beta == 5.0
    assert resolve(SPOConfig(num_steps=1, divert_start=0)).num_steps == 1  # whoever insists
    with pytest.raises(ValueError, match="recipe is 'spo', which goes with SPOConfig, not TrainConfig"):
        resolve(TrainConfig(recipe="spo"))


def test_folders_of_judges(tmp_path):
    "Looked at before anything is loaded; a hub id is only known by asking"
    (tmp_path / "empty").mkdir(), (tmp_path / "file").write_text("")
    for name in ("empty", "file"):
        with pytest.raises(ValueError, match="it has no config.json; give one that save_preference wrote"):
            resolve(SPOConfig(preference_model=str(tmp_path / name)))

    def words(**settings):
        return resolve(SPOConfig(policy="stabilityai/sd-turbo", **settings)).words()["judge"]

    folder = tmp_path / "judge"
    folder.mkdir(), (folder / "config.json").touch()
    plain = "plain CLIP, not trained on predictions; the reward is only watched; threshold 0.3"
    assert words(preference_model=str(folder)) == f"{folder}, {plain}"
    (folder / modulation_file).touch()
    assert words(preference_model=str(folder)) == f"{folder}; the reward is only watched; threshold 0.3"


# --- the trainer


SIZES = dict(num_steps=5, epochs=1, pairs_per_epoch=4, pairs_per_update=2, micro_batch=2, eval_samples=0)
SIZES |= dict(candidates=3, divert_start=1, preference_threshold=1e-6, preference_scale=50.0)


@pytest.fixture
def make(pipeline, tmp_path):
    "Make a trainer of a small run"

    def make_trainer(judge="reward", reward=redness, callbacks=(), output="run", **settings):
        named = dict(preference_model=judge) if isinstance(judge, str) else {}
        config = SPOConfig(**{**SIZES, "output_dir": str(tmp_path / output), **named, **settings})
        judge = None if named else judge
        return SPOTrainer(load_policy(pipeline, device="cpu"), reward, PROMPTS, config, callbacks, preference=judge)

    return make_trainer


def rolled(trainer):
    "A rollout with its comparisons"
    rollout = trainer.sample()
    trainer.score(rollout)
    trainer.credit(rollout)
    return rollout


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(segment_steps=2, kl_coefficient=0.1),
        dict(num_steps=2, divert_start=None, candidates=2),
        dict(continue_from="winner", train_last_step=False, kl_coefficient=0.1),
        dict(divert_start=4),
    ],
    ids=str,
)
def test_it_trains(make, settings):
    trainer = make(**settings)
    start, plan, config = weights(trainer), batch_plan(trainer.config), trainer.config
    metrics = trainer.train()
    assert not same(start, weights(trainer))
    assert metrics["log_ratio/max_before_update"] < 1e-5 and metrics["log_ratio/recomputed"] == 0
    assert metrics["samples"] == 4 * config.candidates == plan["trajectories per epoch, in network calls, at most"]
    assert metrics["reward_queries"] == plan["reward queries per epoch"]
    compared = round(metrics["preference/valid"] * 4 * len(trainer.trained_steps))
    assert metrics["optimizer_steps"] == math.ceil(compared / 2)
    assert compared <= plan["(tree, step) comparisons per epoch, at most"]
    assert {"reward/mean", "loss", "grad_norm", "diversity", "seconds/sample", "seconds/train"} <= metrics.keys()
    assert all(math.isfinite(value) for value in metrics.values() if value is not None)
    assert not any(name.startswith(("anchor/", "dense/")) for name in metrics)  # there are none


def test_judges_that_are_handed_over(make):
    with pytest.raises(ValueError, match="preference_model is 'tiny', trained on pictures of the policy"):
        make(judge="tiny")
    shipped = make(judge=load_preference("tiny"))  # whoever hands it over knows why
    assert shipped.config.preference_model == "given:tiny"
    named = make(judge=later_is_better).config
    assert named.words()["judge"].startswith("later_is_better, as handed to the trainer; the reward is only watched")
    assert isinstance(make().preference, RewardAsPreference)


@pytest.mark.parametrize(
    "valid, sharing",
    [(1, False), pytest.param(4, False, marks=pytest.mark.slow), pytest.param(3, True, marks=pytest.mark.slow)],
    ids=["one", "all", "three, weights shared"],
)
def test_two_processes_learn_what_one_does(make, pipeline, two_processes, tmp_path, valid, sharing):
    "One update of all comparisons, however many of them each process has: every one counts alike"
    settings = dict(SIZES, num_steps=2, candidates=2, pairs_per_update=4, micro_batch=1, epochs=2)
    settings |= dict(preference_threshold=1e-9)
    if valid < 4:
        gaps = rolled(make(**settings)).advantages[0, :, 1].sort(descending=True).values
        settings |= dict(preference_threshold=(gaps[valid - 1] + gaps[valid]).item() / 2, epochs=1)  # so many pass
    alone = make(**settings, output="alone")
    assert alone.train()["preference/valid"] == valid / 4 and len(alone.trained_steps) == 1
    place = str(tmp_path / "two")
    first, second = two_processes(
        f"""
        from test_spo import *
        config = SPOConfig(preference_model='reward', output_dir={place!r}, **{settings!r})
        trainer = SPOTrainer(load_policy({str(pipeline)!r}, device='cpu'), redness, PROMPTS, config, [])""",
        sharing=sharing,
    )
    same_learning(first, second, weights(alone), weights(make(**settings)))
    one, two = (without_clock(tmp_path / name) for name in ("alone", "two"))
    for name in ("samples", "reward_queries", "optimizer_steps", "preference/valid"):
        assert [record[name] for record in one] == [record[name] for record in two]
    for name in ("reward/mean", "preference/gap", "loss"):
        assert [record[name] for record in two] == pytest.approx([record[name] for record in one], rel=1e-3)


def test_what_is_learnt_from(make):
    "Winners and losers by the judge, at the timestep of the next call; only confident comparisons at trained steps"
    middle = rolled(make(judge=later_is_better)).advantages[0, :, 1:].median().item()
    trainer = make(judge=later_is_better, preference_threshold=middle, output="other")
    tree = trainer.sample()
    (winner, loser, gap), actions = compare_candidates(tree.dense, 50.0), tree.actions
    trainer.score(tree)
    trainer.credit(tree)
    times, prompts = [*trainer.sampler.timesteps.tolist(), 0], tree.prompts
    for b in range(4):
        for i in range(5):
            sides = torch.stack([actions[winner[b, i], b, i], actions[loser[b, i], b, i]])
            assert torch.equal(tree.actions[:, b, i], sides)
            assert tree.valid[b, i] == (i > 0 and gap[b, i].item() > middle)
        last = trainer.policy.decode(actions[:, b, -1])
        close(later_is_better(last, torch.zeros(3), prompts[b] * 3).amax(), tree.dense[0, b, -1])
    assert times[-1] == 0 and 0 < tree.valid[:, 1:].float().mean() < 1
    assert (tree.advantages[0] >= tree.advantages[1]).all()
    assert torch.equal(tree.final_reward[0], redness(trainer.policy.decode(tree.latents[0, :, -1]), None))


def loss_of(trainer, rollout, group, step):
    "The loss of some transitions, with the reference policy's log-probabilities"
    trainer.logs, trainer.norms = [], [0.0]
    with trainer.policy.without_lora():
        rollout.reference_log_prob = trainer.all_log_probs(rollout)
    return trainer.loss(rollout, Minibatch(group, step))


def test_one_call_for_the_shared_state(make, monkeypatch):
    "The network looks once at a state that winner and loser share; the numbers are those of two calls"
    trainer = make()
    rollout, rows, predict = rolled(trainer), [], trainer.policy.predict
    group, step = rollout.valid.nonzero(as_tuple=True)

    def counting(x, *rest):
        rows.append(len(x))
        return predict(x, *rest)

    monkeypatch.setattr(trainer.policy, "predict", counting)
    once = loss_of(trainer, rollout, group, step)
    assert rows[-1] == len(group)
    rollout.states = rollout.states.expand(2, *rollout.states.shape[1:])
    twice = loss_of(trainer, rollout, group, step)
    assert rows[-1] == 2 * len(group)
    close(once, twice, 1e-5)


def test_the_loss_is_dpo_on_mean_log_probabilities(make):
    "Recomputed from the formula after an epoch, when policy and reference differ"
    trainer = make(learning_rate=1e-3)
    trainer.train_epoch()
    rollout = trainer.last_rollout
    group, step = rollout.valid.nonzero(as_tuple=True)
    loss = loss_of(trainer, rollout, group, step)

    def log_prob():
        state, actions = rollout.states[0, group, step], rollout.actions[:, group, step]
        output = trainer.policy.predict(state, trainer.sampler.timesteps[step], rollout.embedding[group])
        return torch.stack([trainer.sampler.step(output, state, step, action=action).log_prob for action in actions])

    with torch.no_grad():
        now = log_prob()
        with trainer.policy.without_lora():
            reference = log_prob()
    ratio, ones = (now - reference).exp().clamp(0.9, 1.1).log(), torch.ones(len(group))
    expected = -torch.nn.functional.logsigmoid(10 * (ratio[0] - ratio[1])).mean()
    close(loss.detach(), expected)
    assert (now - reference).abs().max() > 1e-6
    sides = torch.tensor([[1.0], [-1.0]]).expand(2, len(group))
    close(preference_loss(now, reference, sides, ones, clip_range=0.1, beta=10.0), expected)


def test_winners_become_more_probable(make):
    trainer = make(learning_rate=3e-3, pairs_per_update=4, micro_batch=4)
    trainer.train_epoch()
    rollout = trainer.last_rollout
    moved = (trainer.all_log_probs(rollout) - rollout.log_prob)[:, rollout.valid]
    assert (moved[0] - moved[1]).mean() > 0


def test_micro_batches_do_not_matter(make):
    whole, parts = make(micro_batch=2, output="a"), make(micro_batch=1, output="b")
    whole.train(), parts.train()
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(parts)[name], rtol=1e-3, atol=2e-5)


def test_nothing_passes_the_threshold(make):
    "An epoch without a confident comparison teaches nothing, and says so, once, with the remedy"
    settings = dict(preference_threshold=0.9, preference_scale=1e-3)
    trainer = make(**settings, epochs=2)
    start = weights(trainer)
    with pytest.warns(UserWarning, match="taught nothing") as said:
        metrics = trainer.train()
    assert same(start, weights(trainer)) and metrics["epoch"] == 2
    assert metrics["optimizer_steps"] == metrics["preference/valid"] == metrics["loss"] == 0
    (message,) = [str(warning.message) for warning in said if "taught nothing" in str(warning.message)]
    begins = (
        r"epoch 1 taught nothing: no comparison passed preference_threshold 0\.9, the largest gap in probability was "
    )
    assert re.match(begins, message)
    assert f"was {rolled(make(**settings)).advantages[0, :, 1:].max():.2g};" in message
    enough = 1.01 * float(re.search(r"raise preference_scale above (.+)\.$", message)[1])
    assert make(**{**settings, "preference_scale": enough}, output="more").train()["optimizer_steps"] == 1
    with pytest.warns(UserWarning, match="the judge finds all candidates equally good"):
        make(judge=lambda images, timesteps, prompts: torch.zeros(len(images)), output="alike").train()


def test_a_resumed_run_is_the_same_run(make, tmp_path):
    settings = dict(judge=later_is_better, preference_threshold=0.01, preference_scale=100.0, segment_steps=2)
    whole = make(epochs=2, output="whole", **settings)
    whole.train()
    make(epochs=1, output="parts", **settings).train()
    resumed = make(epochs=2, output="parts", resume=str(tmp_path / "parts"), **settings)
    resumed.train()
    assert same_weights(whole, resumed)
    first, second = (without_clock(tmp_path / name) for name in ("whole", "parts"))
    assert first == second and len(first) == 2
    for other, message in (
        (dict(candidates=2), "candidates is 2, but the run in .* was started with 3"),
        (dict(judge="reward"), "preference_model is 'reward', but the run in .* with 'given:later_is_better'"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**{**settings, **other}, epochs=5, resume=str(tmp_path / "parts")).train()


@pytest.mark.slow
def test_a_run_folder(make, tmp_path):
    "Evaluation, report, model card and LoRA are those of every run"
    make(callbacks=None, eval_samples=4, epochs=1).train()
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {
        "config.json",
        "metrics.jsonl",
        "evaluation.json",
        "checkpoints",
        "lora",
        "report.html",
        "README.md",
    } <= left
    assert run_config(tmp_path / "run", SPOConfig).candidates == 3


def test_the_common_trainer_does_not_take_it(policy, tmp_path):
    with pytest.raises(ValueError, match="recipe is 'spo', which goes with SPOConfig"):
        Trainer(policy, redness, PROMPTS, TrainConfig(recipe="spo", output_dir=str(tmp_path / "run")))


# --- the command line


def run(*words):
    from sdpo_nb.cli import train_command

    return train_command([str(word) for word in words])


@pytest.mark.slow
def test_from_the_command_line(pipeline, tmp_path, capsys):
    "Train, look at the plan, resume: the recipe decides which flags there are"
    place, sizes = tmp_path / "run", ["--num_steps", 4, "--pairs_per_epoch", 2, "--eval_samples", 0, "--candidates", 2]
    words = ["tiny", "--recipe", "spo", "--policy", pipeline, "--reward", "warmth", *sizes, "--output_dir", place]
    words += ["--preference_model", "reward", "--preference_scale=50", "--preference_threshold", "1e-6"]
    assert run(*words, "--dry_run") == 0
    plan = capsys.readouterr().out
    assert re.search(r"judge +warmth of the prediction \(cheap mode\); threshold 1e-06", plan)
    assert "2 trees per epoch" in plan and not place.exists()
    assert run(*words, "--epochs", 1) == 0
    assert run("--resume", place, "--epochs", 2) == 0
    assert [record["epoch"] for record in read_jsonl(place / "metrics.jsonl")] == [1, 2]
    capsys.readouterr()
    assert run("--resume", place, "--candidates", 3) == 2
    assert "candidates is 3, but the run in" in capsys.readouterr().err


def test_a_judge_that_was_handed_over_cannot_be_resumed_without_it(make, tmp_path, capsys):
    make(judge=later_is_better, reward="warmth").train()
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["preference_model"] == "given:later_is_better"
    assert run("--resume", tmp_path / "run", "--epochs", 2) == 2
    message = "preference_model is 'given:later_is_better', a judge that was handed to the trainer and cannot be loaded"
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == files


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["sd_turbo_aesthetic", "--recipe", "spo", "--num_steps", 4],
            "preference_model is 'tiny', trained on pictures of the policy tiny",
        ),
        (["tiny", "--recipe", "spo", "--candidates", 1], "candidates is 1; give a whole number from 2 to 64."),
        (["tiny", "--recipe=spo", "--num_steps", 1], "num_steps is 1 with divert_start=None"),
        (["tiny", "--candidates", 4], "candidates"),
        (["tiny", "--recipe", "spo", "--candidate", 4], "did you mean --candidates?"),
    ],
    ids=str,
)
def test_refused_on_the_command_line(words, message, capsys):
    assert run(*words, "--dry_run") == 2
    assert message in capsys.readouterr().err


def test_a_yaml_file_may_name_the_recipe(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("recipe: spo\ncandidates: 2\n")
    assert run("tiny", "--config", tmp_path / "mine.yaml", "--dry_run", "--beta", 5) == 0
    assert "2 candidates at each of their branching steps" in capsys.readouterr().out
