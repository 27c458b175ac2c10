"""Settings: what the recipe fills in, what each method obeys, and one sentence for every refusal."""

import copy
import itertools
import math
import pickle
import random
import re
import subprocess
import sys
from dataclasses import dataclass, fields, replace

import pytest

from sdpo_nb.config import (
    PolicyGradientConfig,
    RunConfig,
    TrainConfig,
    check_names,
    preset_config,
    presets,
    reward_settings,
    setting,
    resolve,
)
from sdpo_nb.recipes import Recipe, recipes, register_recipe

NAMES = [f.name for f in fields(TrainConfig)]


@pytest.mark.parametrize("name", [name for name, recipe in recipes.items() if recipe.settings == "TrainConfig"])
def test_every_recipe_resolves(name):
    config = resolve(TrainConfig(recipe=name))
    promised = [f.name for f in fields(Recipe) if f.name not in ("settings", "beta")]
    assert all(getattr(config, field) is not None for field in promised)
    assert resolve(config) == config


@pytest.mark.parametrize("field", [f.name for f in fields(Recipe) if f.name != "settings"])
def test_everything_that_a_recipe_chooses_can_be_overruled(field, monkeypatch):
    "By a value that no recipe has"
    given = {**asdict_of(resolve(TrainConfig(recipe="d3po"))), field: getattr(recipes["d3po"], field)}
    monkeypatch.setitem(recipes, "other", replace(recipes["sdpo"], **{field: "nothing"}))
    assert getattr(resolve(TrainConfig(**{**given, "recipe": "other"})), field) == given[field]


def asdict_of(config):
    return {f.name: getattr(config, f.name) for f in fields(config)}


@pytest.mark.parametrize("name", presets)
def test_every_preset_resolves(name):
    assert resolve(preset_config(name)).num_steps >= 1
    assert preset_config(name, epochs=3).epochs == 3


@pytest.mark.parametrize(
    "reward, epochs, rate, pairs",
    [
        ("aesthetic", 100, 1e-4, 64),
        ("imagereward", 200, 5e-5, 128),
        ("hpsv2", 200, 5e-5, 128),
        ("pickscore", 200, 6e-5, 64),
    ],
)
@pytest.mark.parametrize("suffix", ["", "_1x80gb", "_4x24gb"])
def test_presets_have_the_numbers_of_the_reference(reward, epochs, rate, pairs, suffix):
    settings = asdict_of(resolve(preset_config(f"sd_turbo_{reward}{suffix}")))
    expected = dict(epochs=epochs, learning_rate=rate, pairs_per_update=pairs, reward=reward, prompts="animals")
    expected |= dict(policy="stabilityai/sd-turbo", num_steps=50, clip_range=1e-4, pairs_per_epoch=128, lora_rank=4)
    expected |= dict(lora_alpha=4, precision="fp16", seed=42, eta=1, guidance_scale=0, gamma=0.99, step_weight=0.99)
    expected |= dict(advantage_clip=5, buffer_size=32, min_count=16, weight_decay=1e-4, max_grad_norm=1, anchor="all")
    expected |= dict(queries="3", train_last_step=True, order="step_shuffled", prev_timestep="reference")
    assert {name: settings[name] for name in expected} == expected and settings["credit"] in ("paper", "return")


def test_recipes_say_what_their_authors_say():
    ddpo, d3po, rebel, prdp = (resolve(TrainConfig(recipe=name)) for name in ("ddpo", "d3po", "rebel", "prdp"))
    assert {(c.queries, c.order) for c in (ddpo, d3po, rebel, prdp)} == {("final", "step_accumulated")}
    assert (ddpo.sampling, d3po.sampling, rebel.sampling) == ("single", "pair", "independent_pair")
    assert (rebel.clip_range, prdp.clip_range > 0, d3po.clip_range, d3po.beta) == (0, True, 0.1, 0.1)
    reference = resolve(TrainConfig(recipe="sdpo_reference"))
    assert (reference.anchor, reference.train_last_step, reference.log_ratio_scale) == ("all", True, "none")


def test_a_recipe_of_ones_own(monkeypatch):
    monkeypatch.setitem(recipes, "scratch", None)
    monkeypatch.delitem(recipes, "scratch")
    register_recipe("scratch", Recipe(queries="all", gamma=0.5))
    assert resolve(TrainConfig(recipe="scratch")).queries == "all"
    with pytest.raises(ValueError, match="recipe 'scratch' exists already"):
        register_recipe("scratch", Recipe())


refusals = [
    (dict(recipe="sdpoo"), "recipe is 'sdpoo', which is none of .*did you mean 'sdpo'"),
    (dict(queries="4"), "queries is '4'"),
    (dict(credit="papper"), "credit is 'papper'.*did you mean 'paper'"),
    (dict(anchor="middle"), "anchor is 'middle'"),
    (dict(normalizer="prompts"), "normalizer is 'prompts'"),
    (dict(order="shuffled"), "order is 'shuffled'"),
    (dict(loss="ppo_clp"), "loss is 'ppo_clp', which is none of .*did you mean 'ppo_clip'"),
    (dict(prev_timestep="paper"), "prev_timestep is 'paper'"),
    (dict(precision="fp8"), "precision is 'fp8'"),
    (dict(precision="fp16", lora_rank=0), "precision is 'fp16' with lora_rank 0"),
    (dict(num_steps=0), "num_steps is 0; give a whole number from 1 to 1000"),
    (dict(num_steps=2.5), "num_steps is 2.5; give a whole number"),
    (dict(epochs=True), "epochs is True"),
    (dict(epochs=None), "epochs is None"),
    (dict(learning_rate=0.0), "learning_rate is 0.0; give a number above 0"),
    (dict(learning_rate=math.nan), "learning_rate is nan"),
    (dict(learning_rate="1e-3"), "learning_rate is '1e-3'"),
    (dict(clip_range=-1.0), "clip_range is -1.0; give a number from 0"),
    (dict(clip_range=math.inf), "clip_range is inf"),
    (dict(gamma=1.5), "gamma is 1.5"),
    (dict(beta=-1), "beta is -1; give a number above 0."),
    (dict(beta=0.5), "beta is 0.5, but the loss 'reward_difference' has no such option; leave it out"),
    (dict(train_last_step="no"), "train_last_step is 'no'; give True or False"),
    (dict(policy=3), "policy is 3; give a text"),
    (dict(tracker="tensorbord"), "tracker is 'tensorbord'.*did you mean 'tensorboard'"),
    (dict(push_to_hub="mine"), "push_to_hub is 'mine'; give owner/name"),
    (dict(eta=0.0), "eta is 0: deterministic steps"),
    (dict(pairs_per_epoch=30, pairs_per_update=16), "pairs_per_update is 16, which does not divide pairs_per_epoch 30"),
    (dict(micro_batch=5), "micro_batch is 5, which does not divide pairs_per_update 16"),
    (dict(min_count=33), "min_count is 33, more than buffer_size 32"),
    (dict(num_steps=1), "num_steps is 1 with credit='paper', whose expected signal is zero"),
    (dict(num_steps=1, credit="reward_to_go"), "train_last_step is false with num_steps 1"),
    (dict(queries="final"), "credit is 'paper' with queries='final'"),
    (dict(queries="final", credit="gae"), "credit is 'gae' with queries='final'"),
    (dict(sampling="single"), "sampling is 'single', but the loss 'reward_difference' compares pairs"),
    (dict(recipe="ddpo", loss="preference"), "sampling is 'single', but the loss 'preference' compares pairs"),
    (dict(recipe="rebel", order="step_shuffled"), "needs whole trajectories"),
    (dict(recipe="d3po", clip_range=1.0), "clips probability ratios"),
]


@pytest.mark.parametrize(
    "settings, sentence", refusals, ids=[" ".join(map(str, settings.values())) for settings, _ in refusals]
)
def test_refusals_are_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        resolve(TrainConfig(**settings))
    assert "\n" not in str(caught.value) and re.search(r"[.?]$", str(caught.value))


VALUES = [
    None,
    True,
    -1,
    0,
    1,
    7,
    10**30,
    0.5,
    math.nan,
    math.inf,
    "",
    "none",
    "3",
    "sdpo",
    ["a cat"],
    {},
    b"x",
    object(),
]


@pytest.mark.parametrize("field", NAMES)
def test_any_value_is_taken_or_refused_by_name(field):
    for value in VALUES:
        try:
            config = resolve(TrainConfig(**{field: value}))
        except ValueError as error:
            text = str(error)
            assert "\n" not in text and text[-1] in ".?" and len(text) < 600, text
        else:
            assert resolve(config) == config and hash(repr(config))


def test_any_combination_of_choices_is_taken_or_refused():
    "And what is taken has steps to train, pairs where its loss compares, and batches that fit"
    choices = dict(
        recipe=[name for name, recipe in recipes.items() if recipe.settings == "TrainConfig"],
        num_steps=[1, 2, 10],
        credit=[None, "return", "causal", "gae"],
        queries=[None, "final", "terminal", 3, "all"],
        sampling=[None, "single", "pair"],
        order=[None, "step_shuffled", "step_accumulated"],
        loss=[None, "ppo_clip", "preference"],
        train_last_step=[None, True, False],
        pairs_per_epoch=[1, 6, 17],
        pairs_per_update=[None, 2, 3],
    )
    taken, draw = 0, random.Random(0)
    for chosen in draw.sample(list(itertools.product(*choices.values())), 1500):
        try:
            c = resolve(TrainConfig(**dict(zip(choices, chosen))))
        except ValueError as error:
            assert "\n" not in str(error)
            continue
        taken += 1
        assert c.pairs_per_epoch % c.pairs_per_update == 0 == c.pairs_per_update % c.micro_batch
        assert c.num_steps > 1 or c.train_last_step
        assert c.sampling != "single" or c.loss == "ppo_clip"
        assert (c.beta is not None) == (c.loss == "preference")
    assert taken > 100


def test_a_missing_tracker_is_named_before_the_work(monkeypatch):
    monkeypatch.setattr("sdpo_nb.config.find_spec", lambda name: None)
    sentence = "tracker is 'wandb', but the package wandb is not installed; run `pip install wandb`"
    with pytest.raises(ValueError, match=sentence):
        resolve(TrainConfig(tracker="wandb"))
    assert resolve(TrainConfig()).tracker == "none"


def test_unknown_presets_and_fields():
    with pytest.raises(ValueError, match="preset is 'tinny'.*did you mean 'tiny'"):
        preset_config("tinny")
    with pytest.raises(ValueError, match="field is 'epoch'.*did you mean 'epochs'"):
        preset_config("tiny", epoch=3)
    with pytest.raises(ValueError, match="field is 'epoch'.*did you mean 'epochs'"):
        TrainConfig(epoch=3)


@dataclass(frozen=True)
class OwnConfig(PolicyGradientConfig):
    "Settings of a method that only this test knows"

    recipe: str = setting("own", "the method")
    branches: int = setting(3, "of each step", low=2, high=9)


@pytest.fixture
def own(monkeypatch):
    monkeypatch.setitem(recipes, "own", replace(recipes["d3po"], settings="OwnConfig"))


def test_a_class_refuses_what_its_method_does_not_obey(own):
    sentence = "which the recipe 'own' does not use; leave it out.$"
    for field in {f.name for f in fields(TrainConfig)} - {f.name for f in fields(OwnConfig)}:
        for attempt in (
            lambda: OwnConfig(**{field: None}),
            lambda: preset_config("tiny", OwnConfig, **{field: None}),
            lambda: check_names({field: None, "recipe": "own"}, OwnConfig, None),
            lambda: replace(OwnConfig(), **{field: None}),
        ):
            with pytest.raises(ValueError, match=f"^{field} is a setting of the recipes sdpo, .*{sentence}"):
                attempt()
    with pytest.raises(ValueError, match="branches is a setting of the recipe own, which the recipe 'sdpo' does not"):
        TrainConfig(branches=2)


def test_a_method_of_ones_own_is_checked_like_the_others(own):
    config = resolve(OwnConfig())
    assert (config.branches, config.loss, config.beta, config.micro_batch) == (3, "preference", 0.1, 16)
    with pytest.raises(ValueError, match="branches is 1; give a whole number from 2 to 9."):
        resolve(OwnConfig(branches=1))
    with pytest.raises(ValueError, match="recipe is 'own', which goes with OwnConfig, not TrainConfig"):
        resolve(TrainConfig(recipe="own"))
    assert preset_config("sd_turbo_aesthetic", OwnConfig, recipe="own").pairs_per_update == 64


def test_a_preset_gives_a_method_only_what_it_obeys():
    assert preset_config("sd_turbo_aesthetic", RunConfig).pairs_per_epoch == 128
    assert "pairs_per_update" in reward_settings["aesthetic"]


def test_configurations_can_be_copied():
    config = resolve(TrainConfig(recipe="ddpo", prompts=["a cat"]))
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == copy.copy(config) == config


@pytest.mark.parametrize("f", fields(TrainConfig), ids=lambda f: f.name)
def test_every_field_is_explained(f):
    assert len(f.metadata["help"]) > 5 and f.metadata["help"][-1] != "."
    assert f.type in (bool, int, float, str, str | list | tuple)
    numeric = f.type in (int, float)
    assert ((f.metadata["low"] is None) != (f.metadata["above"] is None)) == numeric


@pytest.mark.parametrize("name", ["credit", "normalizer", "order", "tracker"])
def test_the_help_names_what_the_registries_hold(name):
    from sdpo_nb.advantages import credit_rules, normalizers
    from sdpo_nb.batching import schedules
    from sdpo_nb.callbacks import trackers

    known = dict(credit=credit_rules, normalizer=normalizers, order=schedules, tracker=trackers)[name]
    text = next(f.metadata["help"] for f in fields(TrainConfig) if f.name == name)
    assert [entry for entry in known if not re.search(rf"\b{entry}\b", text)] == []


def test_settings_are_known_without_torch():
    code = "import sys, sdpo_nb.config; assert not {'torch', 'numpy', 'yaml'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
