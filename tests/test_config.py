"""Settings: what the recipe fills in, what the numbers amount to, and one sentence for every refusal."""

import re
from dataclasses import fields

import pytest

from sdpo_nb.config import (
    TrainConfig,
    animals,
    batch_plan,
    load_prompts,
    preset_config,
    presets,
    prompt_lists,
    queries_per_epoch,
    ranges,
    resolve,
)
from sdpo_nb.objectives import objectives
from sdpo_nb.recipes import Recipe, recipes, register_recipe


@pytest.mark.parametrize("name", [name for name, recipe in recipes.items() if recipe.settings == "TrainConfig"])
def test_every_recipe_resolves(name):
    config = resolve(TrainConfig(recipe=name))
    assert all(getattr(config, f.name) is not None for f in fields(Recipe) if hasattr(config, f.name))
    assert recipes[name].loss in objectives
    assert resolve(config) == config


@pytest.mark.parametrize("name", presets)
def test_every_preset_resolves(name):
    assert resolve(preset_config(name)).num_steps >= 1
    assert preset_config(name, epochs=3).epochs == 3


def test_the_user_overrules_the_recipe():
    config = resolve(TrainConfig(recipe="ddpo", gamma=0.5, order="step_shuffled", clip_range=0))
    assert (config.gamma, config.order, config.clip_range, config.credit) == (0.5, "step_shuffled", 0, "causal")


def test_recipes_say_what_their_authors_say():
    ddpo, d3po, rebel, prdp = (resolve(TrainConfig(recipe=name)) for name in ("ddpo", "d3po", "rebel", "prdp"))
    assert {c.queries for c in (ddpo, d3po, rebel, prdp)} == {"final"} and {
        c.order for c in (ddpo, d3po, rebel, prdp)
    } == {"step_accumulated"}
    assert (ddpo.sampling, d3po.sampling, rebel.sampling) == ("single", "pair", "independent_pair")
    assert (rebel.clip_range, prdp.clip_range > 0, d3po.clip_range) == (0, True, 0.1)
    reference = resolve(TrainConfig(recipe="sdpo_reference"))
    assert (reference.anchor, reference.train_last_step, reference.log_ratio_scale, reference.credit) == (
        "all",
        True,
        "none",
        "paper",
    )
    assert recipes["sdpo_reference"].prev_timestep == "reference"


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
    (dict(precision="fp8"), "precision is 'fp8'"),
    (dict(num_steps=0), "num_steps is 0; give a whole number from 1 to 1000"),
    (dict(num_steps=2.5), "num_steps is 2.5; give a whole number"),
    (dict(epochs=True), "epochs is True"),
    (dict(learning_rate=0.0), "learning_rate is 0.0; give a number above 0"),
    (dict(learning_rate=float("nan")), "learning_rate is nan"),
    (dict(learning_rate="1e-3"), "learning_rate is '1e-3'"),
    (dict(clip_range=-1.0), "clip_range is -1.0; give a number from 0"),
    (dict(gamma=1.5), "gamma is 1.5"),
    (dict(train_last_step="no"), "train_last_step is 'no'; give True or False"),
    (dict(eta=0.0), "eta is 0: deterministic steps"),
    (dict(pairs_per_epoch=30, pairs_per_update=16), "pairs_per_update is 16, which does not divide pairs_per_epoch 30"),
    (dict(micro_batch=5), "micro_batch is 5, which does not divide pairs_per_update 16"),
    (dict(min_count=33), "min_count is 33, more than buffer_size 32"),
    (dict(num_steps=1), "num_steps is 1 with credit='paper', whose expected signal is zero"),
    (dict(num_steps=1, credit="causal"), "train_last_step is false with num_steps 1"),
    (dict(queries="final"), "credit is 'paper' with queries='final'"),
    (dict(queries="final", credit="gain"), "credit is 'gain' with queries='final'"),
    (dict(sampling="single"), "sampling is 'single', but the loss 'reward_difference' of recipe 'sdpo' compares pairs"),
    (dict(recipe="rebel", order="step_shuffled"), "needs whole trajectories"),
    (dict(recipe="d3po", clip_range=1.0), "clips probability ratios"),
]


@pytest.mark.parametrize(
    "settings,sentence", refusals, ids=[" ".join(map(str, settings.values())) for settings, _ in refusals]
)
def test_refusals_are_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        resolve(TrainConfig(**settings))
    assert "\n" not in str(caught.value) and re.search(r"[.?]$", str(caught.value))


def test_unknown_presets_and_fields():
    with pytest.raises(ValueError, match="preset is 'tinny'.*did you mean 'tiny'"):
        preset_config("tinny")
    with pytest.raises(ValueError, match="field is 'epoch'.*did you mean 'epochs'"):
        preset_config("tiny", epoch=3)


def test_every_range_is_of_a_field():
    assert set(ranges) <= {f.name for f in fields(TrainConfig)}


def test_prompts(tmp_path):
    assert len(animals) == len(set(animals)) == 45
    assert all(load_prompts(name) == list(prompts) for name, prompts in prompt_lists.items())
    assert load_prompts(["a cat"]) == load_prompts(("a cat",)) == ["a cat"]
    (tmp_path / "p.txt").write_text("a cat\n\n  a dög \n", encoding="utf-8")
    assert load_prompts(str(tmp_path / "p.txt")) == load_prompts(tmp_path / "p.txt") == ["a cat", "a dög"]
    (tmp_path / "windows.txt").write_text("\ufeffa cat\r\na dög\r\n", encoding="utf-8")  # as Notepad saves it
    assert load_prompts(str(tmp_path / "windows.txt")) == ["a cat", "a dög"]
    (tmp_path / "empty.txt").write_text("\n")
    for wrong in ([], [1], str(tmp_path / "empty.txt")):
        with pytest.raises(ValueError, match="at least one string"):
            load_prompts(wrong)
    for wrong in ("shape", tmp_path, "a" * 300, "a\0b", None, 3, 1.0, {"a cat"}, {"a": "cat"}, b"shapes"):
        with pytest.raises(ValueError, match="prompts is .*, neither a built-in list") as caught:
            load_prompts(wrong)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_batch_plan():
    plan = batch_plan(TrainConfig(num_steps=10, pairs_per_epoch=32, pairs_per_update=16, micro_batch=8, epochs=3))
    assert plan["trajectories per epoch"] == 64 and plan["trajectories in total"] == 192
    assert plan["trained steps per trajectory"] == 9 and plan["optimizer steps per epoch"] == 2 * 9
    assert plan["forward passes per optimizer step and process"] == 2
    accumulated = batch_plan(
        TrainConfig(num_steps=10, pairs_per_epoch=32, pairs_per_update=16, micro_batch=8, order="step_accumulated"),
        processes=2,
    )
    assert (
        accumulated["optimizer steps per epoch"] == 2
        and accumulated["forward passes per optimizer step and process"] == 9
    )


@pytest.mark.parametrize(
    "settings,per_pair",
    [
        ({}, 5),
        (dict(queries="5"), 9),
        (dict(queries="all"), 19),
        (dict(queries="terminal"), 2),
        (dict(sampling="independent_pair"), 6),
        (dict(credit="causal"), 5),
        (dict(credit="causal", train_last_step=True), 7),
        (dict(recipe="ddpo"), 2),
        (dict(num_steps=2), 3),
        (dict(num_steps=1, credit="causal", train_last_step=True, queries="terminal"), 3),
    ],
)
def test_queries(settings, per_pair):
    assert (
        queries_per_epoch(resolve(TrainConfig(**{"num_steps": 10, "pairs_per_epoch": 32, **settings}))) == 32 * per_pair
    )
