"""One of everything is added, each in one place, named in the settings and trained with."""

import pytest
import torch
from accelerate.tracking import GeneralTracker
from diffusers import StableDiffusionPAGPipeline

from sdpo_nb.advantages import CreditRule, credit_rules, normalizers
from sdpo_nb.batching import Minibatch, schedules
from sdpo_nb.callbacks import Tracker, trackers
from sdpo_nb.config import TrainConfig, resolve
from sdpo_nb.files import read_jsonl
from sdpo_nb.models import Policy, load_policy, policy_classes
from sdpo_nb.objectives import Objective, objectives
from sdpo_nb.recipes import Recipe, recipes
from sdpo_nb.samplers import FlowSampler
from sdpo_nb.trainer import Trainer

SMALL = dict(num_steps=3, epochs=1, pairs_per_epoch=4, pairs_per_update=2, eval_samples=0, reward="colorfulness")


@pytest.fixture
def train(pipeline, tmp_path):
    "An epoch with these settings; the line of the log, and the trainer"

    def run(policy=pipeline, **settings):
        config = TrainConfig(policy=str(policy), output_dir=str(tmp_path / "run"), **{**SMALL, **settings})
        trainer = Trainer(load_policy(policy, device="cpu"), config.reward, ["a cat", "a dog"], config, [])
        return trainer.train(), trainer

    return run


def test_a_loss(train, monkeypatch):
    asked = []

    def loss(log_prob, old_log_prob, advantages, weight, **options):
        asked.append((tuple(log_prob.shape), sorted(options)))
        return -(weight * (log_prob - old_log_prob) * advantages).mean()

    monkeypatch.setitem(objectives, "plain", Objective(loss, pairs=False, options=("beta",)))
    metrics, trainer = train(recipe="ddpo", loss="plain", beta=2.0)
    assert metrics["grad_norm"] > 0 and trainer.config.loss == "plain"
    assert {shape[0] for shape, _ in asked} == {1} and all("beta" in options for _, options in asked)


def test_a_loss_that_needs_the_reference_and_whole_trajectories(train, monkeypatch):
    seen = []

    def loss(log_prob, old_log_prob, advantages, weight, *, pair_index, **options):
        seen.append(len(pair_index))
        return ((log_prob - old_log_prob).sum(1) - advantages.mean(1)).square().mean()

    monkeypatch.setitem(objectives, "whole", Objective(loss, reference=True, trajectories=True))
    metrics, trainer = train(loss="whole", order="step_accumulated")
    assert metrics["grad_norm"] > 0 and trainer.last_rollout.reference_log_prob is not None
    assert set(seen) == {2 * len(trainer.trained_steps)}


def test_what_a_loss_needs_is_checked_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(objectives, "whole", Objective(None, trajectories=True))
    with pytest.raises(ValueError, match="order is 'step_shuffled', but the loss 'whole' needs whole trajectories"):
        resolve(TrainConfig(loss="whole"))
    with pytest.raises(ValueError, match="sampling is 'single', but the loss 'whole' compares pairs"):
        resolve(TrainConfig(loss="whole", order="step_accumulated", sampling="single"))


def test_a_credit_rule_and_its_alias(train, monkeypatch):
    def level(rewards, final_reward, gamma):
        return rewards.mean(1, keepdim=True).expand_as(rewards)

    monkeypatch.setitem(credit_rules, "level", CreditRule(level, "gamma", aliases=("flat",)))
    for name in ("level", "flat"):
        resolve(TrainConfig(credit=name))
    metrics, trainer = train(credit="flat", normalizer="batch")
    assert (trainer.last_rollout.advantages.std(-1) < 1e-5).all() and metrics["grad_norm"] > 0
    with pytest.raises(ValueError, match="level"):
        resolve(TrainConfig(credit="lebel"))


def test_a_normalizer(train, monkeypatch):
    class Signs:
        def __init__(self, buffer_size, min_count, divide_by_std):
            self.seen = 0

        def update(self, prompts, returns):
            self.seen += len(prompts)
            return (returns - returns.mean(0)).sign()

        def state_dict(self):
            return {"seen": self.seen}

        def load_state_dict(self, state):
            self.seen = state["seen"]

    monkeypatch.setitem(normalizers, "signs", Signs)
    _, trainer = train(normalizer="signs")
    assert trainer.last_rollout.advantages.abs().max() == 1 and trainer.normalizer.seen == 8


def test_an_order_of_updates(train, monkeypatch):
    def backwards(num_pairs, num_steps, pairs_per_update, *, steps, generator):
        everyone = torch.arange(num_pairs)
        return [Minibatch(everyone, torch.full_like(everyone, step)) for step in reversed(steps)]

    monkeypatch.setitem(schedules, "backwards", backwards)
    metrics, trainer = train(order="backwards")
    assert metrics["optimizer_steps"] == len(trainer.trained_steps) == 2


def test_a_method_as_a_choice_of_all_these(train, monkeypatch):
    monkeypatch.setitem(recipes, "mine", Recipe(credit="gae", order="step_accumulated"))
    metrics, trainer = train(recipe="mine")
    assert (trainer.config.order, metrics["optimizer_steps"]) == ("step_accumulated", 2)


class FlowPolicy(Policy):
    "Says that the network predicts the velocity of a straight path"

    def sampler(self, num_steps, eta=1.0, prev_timestep="diffusers"):
        return FlowSampler(torch.linspace(1, 0, num_steps + 1), eta=eta, num_train_timesteps=999).to(self.device)


def test_a_family(train, pipeline, monkeypatch, tmp_path):
    parts = load_policy(pipeline, device="cpu").pipeline.components
    StableDiffusionPAGPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path / "flow")
    with pytest.raises(ValueError, match="is a StableDiffusionPAGPipeline, which cannot be trained here"):
        load_policy(tmp_path / "flow", device="cpu")
    monkeypatch.setitem(policy_classes, "StableDiffusionPAGPipeline", FlowPolicy)
    metrics, trainer = train(tmp_path / "flow", eta=0.8)
    assert isinstance(trainer.policy, FlowPolicy) and isinstance(trainer.sampler, FlowSampler)
    assert metrics["grad_norm"] > 0 and metrics["log_ratio/max_before_update"] <= trainer.log_ratio_bound()
    assert trainer.policy.sample(["a cat"], 2, seeds=[0]).shape == (1, 3, 16, 16)


class Notes(GeneralTracker):
    "Keeps what it is told"

    name, requires_logging_directory, main_process_only, tracker = "notes", False, True, None

    def __init__(self):
        super().__init__()
        self.told = []

    def store_init_configuration(self, values):
        self.told.append(values)

    def log(self, values, step=None, **_):
        self.told.append((step, values))


def test_a_tracker(train, monkeypatch):
    notes = Notes()
    monkeypatch.setitem(trackers, "notes", Tracker("accelerate", make=lambda run: notes))
    metrics, trainer = train(tracker="notes")
    (settings, (step, values)) = notes.told
    assert settings["tracker"] == "notes" and step == 1
    assert (
        values["reward/mean"]
        == metrics["reward/mean"]
        == read_jsonl(trainer.folder / "metrics.jsonl")[0]["reward/mean"]
    )


def test_a_tracker_without_its_package(monkeypatch):
    monkeypatch.setitem(trackers, "notes", Tracker("no_such_package"))
    with pytest.raises(ValueError, match="tracker is 'notes', but the package no_such_package is not installed"):
        resolve(TrainConfig(tracker="notes"))
