"""Evaluation uses the same pairs at every step count, measures what it says, and compares only like with like."""

import json
import math
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler

import sdpo_nb.evaluate as evaluate
from sdpo_nb.evaluate import (
    StepEvaluation,
    _t_quantile,
    compare,
    comparison_columns,
    comparison_table,
    coverage,
    evaluation_pairs,
    feature_diversity,
    gains_over_seeds,
    paired_gain,
    possible_steps,
    prompt_diversity,
    seed_interval,
    spread_indices,
    step_generalization,
    usual_steps,
)
from sdpo_nb.files import read_json, write_json
from sdpo_nb.models import load_policy
from sdpo_nb.samplers import make_sampler
from sdpo_nb.shapes import all_captions, backgrounds, caption, colors, parse_caption, random_scenes, render
from random_pipelines import SCHEDULER


class WorldPolicy:
    "Draws what the prompt names; a share of its pictures, larger at few steps, shows another scene. Remembers calls"

    latent_shape, device = (3, 32, 32), torch.device("cpu")
    pipeline = SimpleNamespace(vae_scale_factor=1)

    def __init__(self, skill=1.0, brightness=0.0):
        self.own_scheduler = DDIMScheduler(**SCHEDULER)
        self.skill, self.brightness, self.calls = skill, brightness, []

    def sampler(self, num_steps):
        return make_sampler(self.own_scheduler, num_steps)

    def sample(self, prompts, num_steps, *, seeds, eta, own_scheduler, batch_size, return_latents):
        assert len(prompts) <= batch_size and return_latents
        self.calls.append((num_steps, tuple(prompts), tuple(seeds), eta, own_scheduler))
        images = []
        for prompt, seed in zip(prompts, seeds):
            generator = torch.Generator().manual_seed(seed)
            scene, luck = random_scenes(1, generator), torch.rand(1, generator=generator).item()
            if luck < self.skill * (1 - 0.5 / num_steps):
                for attribute, index in parse_caption(prompt).items():
                    setattr(scene, attribute, torch.tensor([index]))
            images.append(render(scene)[0] + self.brightness)
        return torch.stack(images)

    def decode(self, latents, batch_size=64):
        return latents.clamp(0, 1)


def reference_oracle(images):
    "Reads background and colour by the nearest known paint in a corner and in the middle"

    def nearest(pixels, table):
        return -torch.cdist(pixels, torch.tensor(list(table.values())))

    return {
        "background": nearest(images[:, :, :2, :2].mean((2, 3)), backgrounds),
        "color": nearest(images[:, :, 15:17, 15:17].mean((2, 3)), colors),
    }


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def mean_colour(images):
    return images.mean((2, 3))


PROMPTS = [caption("square", color, background) for color, background in zip(colors, [*backgrounds, "white"])]


@pytest.fixture
def oracle(monkeypatch):
    monkeypatch.setattr(evaluate, "load_network", lambda name: SimpleNamespace(to=lambda device: reference_oracle))


def test_pairs_are_the_same_at_every_step_count_and_batch_size(oracle):
    policy = WorldPolicy()
    step_generalization(policy, brightness, PROMPTS, steps=(1, 4), samples=10, batch_size=4)
    step_generalization(policy, brightness, PROMPTS, steps=(8,), samples=10, batch_size=128)
    dealt = {}
    for num_steps, prompts, seeds, *_ in policy.calls:
        dealt.setdefault(num_steps, []).extend(zip(prompts, seeds))
    assert dealt[1] == dealt[4] == dealt[8]
    assert [prompt for prompt, _ in dealt[1]] == [PROMPTS[index % 6] for index in range(10)] and len(
        set(dealt[1])
    ) == 10


def test_more_samples_only_add_pairs():
    few, many = evaluation_pairs(PROMPTS, 6, 3), evaluation_pairs(PROMPTS, 3000, 3)
    assert few == (many[0][:6], many[1][:6]) and len(set(many[1])) == 3000


def test_pairs_of_committed_results_stay():
    "48 pairs of 12 or 24 prompts: prompt and seed by their place, as ever"
    for count in (12, 24, 48):
        names, seeds = evaluation_pairs([str(index) for index in range(count)], 48, 1000)
        drawn = torch.randint(2**63 - 1, (48,), generator=torch.Generator().manual_seed(1000)).tolist()
        assert names == [str(index % count) for index in range(48)] and seeds == drawn


@pytest.mark.parametrize("samples", [1, 7, 64, 179, 180, 200, 256])
def test_few_pairs_of_many_prompts_are_drawn(samples):
    "Spread over the list, each prompt once, another draw with another seed; a smaller evaluation is part of a larger"
    names = all_captions()
    pairs = list(zip(*evaluation_pairs(names, samples, 1000)))
    assert len(pairs) == samples and len({prompt for prompt, _ in pairs}) == min(samples, len(names))
    for fewer in (1, samples // 4, samples - 1):
        if fewer:
            assert set(zip(*evaluation_pairs(names, fewer, 1000))) < set(pairs) or fewer == samples
    if 1 < samples < len(names):
        other = evaluation_pairs(names, samples, 1001)
        assert {prompt for prompt, _ in pairs} != {*other[0]} and pairs != sorted(pairs)[:samples]


def test_drawn_prompts_cover_the_list():
    "64 captions of the whole world of shapes held 30 circles, 30 squares, 4 triangles and nothing else"
    names = all_captions()
    for seed in range(5):
        told = [parse_caption(prompt) for prompt in evaluation_pairs(names, 64, seed)[0]]
        for attribute, fewest in (("shape", 7), ("color", 4), ("background", 4)):
            numbers = torch.tensor([names_[attribute] for names_ in told if attribute in names_]).bincount()
            assert numbers.min() >= fewest, (seed, attribute, numbers)


class ShortPolicy(WorldPolicy):
    "Knows 25 timesteps and no more, as a consistency model that was distilled for them"

    def sampler(self, num_steps):
        if num_steps > 25:
            raise ValueError(f"num_steps is {num_steps}; use at most 25.")
        return super().sampler(num_steps)


def test_step_counts_that_a_model_cannot_do_are_left_out_unless_asked_for(oracle):
    policy = ShortPolicy()
    assert possible_steps(policy) == [1, 2, 4, 8, 16] == step_generalization(policy, "warmth", PROMPTS, samples=2).steps
    assert step_generalization(WorldPolicy(), "warmth", PROMPTS, samples=2).steps == [*usual_steps]
    policy.calls.clear()
    with pytest.raises(ValueError, match="num_steps is 50"):
        step_generalization(policy, "warmth", PROMPTS, samples=2, steps=(1, 50))
    assert policy.calls == []
    policy.sampler = lambda num_steps: make_sampler(policy.own_scheduler, num_steps - 1)  # not even one step
    assert possible_steps(policy) == [2, 4, 8, 16, 50]
    policy.sampler = lambda num_steps: make_sampler(policy.own_scheduler, 0)
    with pytest.raises(ValueError, match="num_steps is 0"):
        possible_steps(policy)


def test_progress_is_told_in_sampling_steps(oracle):
    "In the order of the work, by batch; all of them make n * sum(steps)"
    done = []
    step_generalization(WorldPolicy(), brightness, PROMPTS, steps=(1, 4), samples=5, batch_size=2, watch=done.append)
    assert done == [2, 2, 1, 8, 8, 4]


def test_options_reach_the_sampler(oracle):
    policy = WorldPolicy()
    step_generalization(policy, brightness, PROMPTS, steps=(2,), samples=3, eta=0.5, own_scheduler=True)
    assert policy.calls[0][3:] == (0.5, True)


def test_numbers_are_those_of_the_pictures(oracle):
    policy = WorldPolicy(skill=0.9)
    result = step_generalization(
        policy,
        brightness,
        PROMPTS,
        steps=(1, 8),
        samples=40,
        batch_size=16,
        other_rewards={"dark": lambda *both: -brightness(*both)},
        features=mean_colour,
    )
    prompts, seeds = evaluation_pairs(PROMPTS, 40, 0)
    images = torch.stack(
        [
            policy.sample(prompts, steps, seeds=seeds, eta=1, own_scheduler=False, batch_size=40, return_latents=True)
            for steps in (1, 8)
        ]
    )
    rewards = images.mean((2, 3, 4))
    assert torch.allclose(result.rewards, rewards) and torch.allclose(result.other_rewards["dark"], -rewards)
    assert torch.allclose(result.mean, rewards.mean(1)) and torch.allclose(result.std, rewards.std(1))
    assert torch.equal(result.images, images[:, result.kept]) and result.image_prompts == [
        prompts[index] for index in result.kept
    ]
    assert torch.allclose(result.diversity, torch.tensor([prompt_diversity(of_step, prompts) for of_step in images]))
    seen = [feature_diversity(mean_colour(of_step), prompts) for of_step in images]
    assert torch.allclose(result.feature_diversity, torch.tensor(seen)) and result.features == "mean_colour"
    assert result.agreement[1] > result.agreement[0] and 0 < result.agreement[0] < 1
    assert (result.agreement <= torch.stack([right.nanmean(1) for right in result.correct.values()]).amin(0)).all()


def test_no_oracle_for_other_worlds(monkeypatch):
    def refuse(name):
        raise AssertionError("loaded for nothing")

    monkeypatch.setattr(evaluate, "load_network", refuse)
    policy = WorldPolicy()
    assert step_generalization(policy, brightness, ["a cat", "a dog"], steps=(1,), samples=2).agreement is None
    policy.pipeline = SimpleNamespace(vae_scale_factor=16)  # its pictures would be larger
    assert step_generalization(policy, brightness, PROMPTS, steps=(1,), samples=2).agreement is None


@pytest.mark.parametrize("samples, prompts", [(1, 1), (2, 9), (9, 2), (256, 180), (8, 8), (7, 180)])
def test_kept_pictures(samples, prompts):
    kept = spread_indices(samples, prompts)
    assert len(kept) == min(8, samples) and len(set(kept)) == len(kept) and 0 <= kept[0] and kept[-1] < samples


def test_comparison_is_paired_and_follows_the_layout(oracle, tmp_path):
    before, after = (
        step_generalization(
            WorldPolicy(skill, light),
            brightness,
            PROMPTS,
            steps=(1, 2, 4),
            samples=30,
            other_rewards={"dark": lambda *both: -brightness(*both)},
        )
        for skill, light in [(0.8, 0), (0.9, 0.02)]
    )
    result = compare(before, after)
    assert {"steps", "n", "reward", "before", "after", "gain", "agreement", "diversity"} <= set(result)
    assert result["steps"] == [1, 2, 4] and result["n"] == 30 and result["reward"] == "brightness"
    difference = after.rewards - before.rewards
    assert result["gain"] == paired_gain(before.rewards, after.rewards)
    assert result["gain"]["mean"] == pytest.approx(difference.mean(1).tolist())
    assert result["gain"]["se"] == pytest.approx((difference.std(1) / 30**0.5).tolist())
    assert result["before"] == {"mean": before.mean.tolist(), "std": before.std.tolist()}
    assert result["after"]["mean"] == after.mean.tolist() and set(result["agreement"]) == set(result["diversity"]) == {
        "before",
        "after",
    }
    assert result["other_rewards"]["dark"]["gain"]["mean"] == pytest.approx((-difference.mean(1)).tolist())
    assert set(result["attributes"]) == {"background", "color"}
    stored = read_json(write_json(tmp_path / "evaluation.json", result | {"own_scheduler": result}))
    assert stored["own_scheduler"]["gain"] == result["gain"] == stored["gain"]


def test_table_says_everything(oracle):
    before, after = (
        step_generalization(WorldPolicy(1, light), brightness, PROMPTS, steps=(1, 50), samples=12)
        for light in (0, 0.05)
    )
    result = compare(before, after)
    lines = comparison_table(result).splitlines()
    assert "brightness" in lines[0] and "12 fixed pairs" in lines[0] and "DDIM" in lines[0]
    assert lines[1].split()[:3] == ["steps", "before", "after"] and "agreement" in lines[1] and "diversity" in lines[1]
    assert (
        lines[2].split()[0] == "1" and lines[3].split()[0] == "50" and f"{result['after']['mean'][1]:.3f}" in lines[3]
    )
    assert len({len(line) for line in lines[1:]}) == 1
    assert comparison_table(result | {"own_scheduler": result}).count("fixed pairs") == 2


def test_diversity_in_features_is_told_where_it_was_asked_for(oracle, tmp_path):
    "An evaluation.json of an earlier version has no such field"
    asked = dict(steps=(1, 8), samples=18)
    policies = [WorldPolicy(skill) for skill in (0.5, 1)]
    result = compare(*[step_generalization(p, brightness, PROMPTS, **asked, features=mean_colour) for p in policies])
    stored = read_json(write_json(tmp_path / "evaluation.json", result))
    assert stored["features"] == "mean_colour" and stored["feature_diversity"] == result["feature_diversity"]
    columns = dict(comparison_columns(stored))
    assert [*columns][-3:] == ["agreement", "diversity", "mean_colour diversity"]
    assert columns["mean_colour diversity"][1].startswith(f"{result['feature_diversity']['before'][1]:.3f} → ")
    plain = compare(*[step_generalization(policy, brightness, PROMPTS, **asked) for policy in policies])
    assert plain["features"] is None and plain["feature_diversity"] == {"before": None, "after": None}
    old = {name: values for name, values in plain.items() if "feature" not in name}
    assert comparison_table(old) == comparison_table(plain) and [*columns][:-1] == [*dict(comparison_columns(old))]


def widening(images):
    return torch.ones(len(images), len(images))


FEATURES = {  # what is returned for two pictures -> what is said
    "a row for each picture": (lambda images: images, "has shape [2, 3, 32, 32]; give a tensor [2,d]"),
    "one row": (lambda images: torch.ones(1, 4), "has shape [1, 4]; give a tensor [2,d]"),
    "a tensor": (lambda images: mean_colour(images).numpy(), "is of type ndarray; give a tensor [2,d]"),
    "no list": (lambda images: mean_colour(images).tolist(), "is of type list; give a tensor [2,d]"),
    "something": (lambda images: None, "is of type NoneType; give a tensor [2,d]"),
    "nan": (lambda images: torch.full((2, 4), torch.nan), "has length nan in row 0 (2 of 2 rows are"),
    "inf": (lambda images: torch.tensor([[1.0], [torch.inf]]), "has length inf in row 1 (1 of 2 rows are"),
    "zero": (lambda images: torch.eye(2)[[0, 0]] * torch.tensor([[1.0], [0.0]]), "has length 0 in row 1 (1 of 2 rows"),
}


@pytest.mark.parametrize("name", FEATURES)
def test_unfit_features_are_refused_at_the_first_batch(oracle, name):
    "Copies have the diversity 0, which zeros would have, too; NaN would leave no column and no word"
    policy, (features, sentence) = WorldPolicy(), FEATURES[name]
    with pytest.raises(ValueError, match=re.escape(f"features {sentence}")) as caught:
        step_generalization(policy, brightness, ["a", "b"], steps=(1, 2), samples=6, batch_size=2, features=features)
    assert len(policy.calls) == 1 and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=re.escape(f"features {sentence}")):
        feature_diversity(features(torch.rand(2, 3, 32, 32)), ["a", "a"])


def test_features_are_equally_many_for_every_batch(oracle):
    policy = WorldPolicy()
    with pytest.raises(ValueError, match="features has rows of width 1 in one batch and 3 in another; give the same"):
        step_generalization(policy, brightness, ["a"], steps=(1, 2), samples=4, batch_size=3, features=widening)
    assert len(policy.calls) == 2


class Colours(list):
    "A function of images that is false, as an empty list"

    def __call__(self, images):
        return mean_colour(images)


def test_a_function_counts_even_if_it_is_false(oracle):
    ask = partial(step_generalization, WorldPolicy(), brightness, PROMPTS, steps=(1,), samples=18)
    found = ask(features=Colours())
    assert found.features == "Colours" and torch.equal(
        found.feature_diversity, ask(features=mean_colour).feature_diversity
    )


@pytest.mark.parametrize(
    "features, samples, sentence",
    [
        ("facebook/dinov2-base", 12, "features is 'facebook/dinov2-base'; give a function of images"),
        (Colours, 12, "Colours'>; give a function of images, such as DINOv2()"),
        (mean_colour, 6, "samples=6 makes no two pictures of one prompt for features; give more samples"),
    ],
)
def test_features_that_cannot_be_compared_are_refused_before_sampling(oracle, features, samples, sentence):
    policy = WorldPolicy()
    with pytest.raises(ValueError, match=re.escape(sentence)):
        step_generalization(policy, brightness, PROMPTS, steps=(1,), samples=samples, features=features)
    assert policy.calls == []


def test_every_pair_of_pictures_weighs_the_same():
    "A prompt with three pictures has three pairs; of no picture there is none"
    shades = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])[:, None, None, None].expand(5, 3, 32, 32)
    assert prompt_diversity(shades, ["a", "a", "a", "b", "b"]) == 1 / 4
    assert math.isnan(prompt_diversity(shades[:0], [])) and math.isnan(feature_diversity(torch.ones(0, 2), []))


def test_one_pair_has_no_error_and_still_prints(oracle, tmp_path):
    asked = dict(steps=(1,), samples=1)
    before, after = (step_generalization(WorldPolicy(), brightness, ["a cat"], **asked) for _ in range(2))
    result = compare(before, after)
    assert (
        result["gain"]["mean"] == [0]
        and math.isnan(result["gain"]["se"][0])
        and result["agreement"] == {"before": None, "after": None}
    )
    stored = json.loads(write_json(tmp_path / "evaluation.json", result).read_text())
    assert stored["gain"]["se"] == [None] and stored["diversity"]["before"] == [None]
    for readable in (result, stored):
        assert "+0.000 ± –" in comparison_table(readable) and "diversity" not in comparison_table(readable)


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(steps=(1, 4)), "steps"),
        (dict(seed=1), "seed"),
        (dict(own_scheduler=True), "sampler"),
        (dict(eta=0.5), "sampler"),
        (dict(prompts=PROMPTS[:2]), "prompts"),
        (dict(reward=lambda *both: brightness(*both)), "reward"),
        (dict(features=lambda images: images.mean((2, 3))), "features"),
    ],
)
def test_only_like_is_compared(oracle, change, named):
    def run(reward=brightness, prompts=PROMPTS, **options):
        return step_generalization(WorldPolicy(), reward, prompts, **{"steps": (1, 2), "samples": 7, **options})

    with pytest.raises(ValueError, match=f"{named} differs"):
        compare(run(), run(**change))


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(prompts=[]), "prompts="),
        (dict(prompts="a cat"), "prompts="),
        (dict(samples=0), "samples=0"),
        (dict(samples=2.5), "samples=2.5"),
        (dict(steps=()), "steps="),
        (dict(steps=4), "steps=4"),
        (dict(steps=(1, 0)), "num_steps is 0"),
        (dict(steps=(2000,)), "num_steps is 2000"),
        (dict(batch_size=0), "batch_size=0"),
    ],
)
def test_impossible_requests_are_refused_before_sampling(oracle, change, sentence):
    policy = WorldPolicy()
    with pytest.raises(ValueError, match=sentence):
        step_generalization(policy, brightness, **{"prompts": PROMPTS, **change})
    assert policy.calls == []


def test_broken_rewards_are_named(oracle):
    with pytest.raises(ValueError, match="nan"):
        step_generalization(
            WorldPolicy(), lambda images, prompts: torch.full((len(images),), torch.nan), PROMPTS, steps=(1,), samples=2
        )


def test_a_real_pipeline_before_and_after_a_lora(random_folder):
    policy = load_policy(random_folder(), device="cpu")
    options = dict(steps=(1, 3), samples=5, batch_size=2)
    before = step_generalization(policy, brightness, ["a cat", "a dog"], **options)
    assert before.images.shape == (2, 5, 3, 16, 16) and before.agreement is None and before.rewards.isfinite().all()
    policy.add_lora(rank=2)
    untouched = step_generalization(policy, brightness, ["a cat", "a dog"], **options)
    assert torch.allclose(untouched.rewards, before.rewards, atol=1e-6)
    with torch.no_grad():
        for name, weights in policy.trainable_parameters().items():
            if "lora_B" in name:
                weights.fill_(0.3)
    after = step_generalization(policy, brightness, ["a cat", "a dog"], **options)
    assert max(map(abs, compare(before, after)["gain"]["mean"])) > 1e-5
    with policy.without_lora():
        assert torch.allclose(
            step_generalization(policy, brightness, ["a cat", "a dog"], **options).rewards, before.rewards, atol=1e-6
        )
    own = step_generalization(policy, brightness, ["a cat", "a dog"], own_scheduler=True, **options)
    assert own.sampler == "DDIMScheduler" and own.rewards.isfinite().all() and isinstance(own, StepEvaluation)


def test_rewards_go_by_their_names_too(oracle):
    by_name = step_generalization(
        WorldPolicy(), "0.5*warmth", PROMPTS, steps=(2,), samples=6, other_rewards={"colourful": "colorfulness"}
    )
    images = torch.stack(
        [
            WorldPolicy().sample(
                [prompt], 2, seeds=[seed], eta=1, own_scheduler=False, batch_size=1, return_latents=True
            )[0]
            for prompt, seed in zip(*evaluation_pairs(PROMPTS, 6, 0))
        ]
    )
    assert by_name.reward == "0.5*warmth" and torch.allclose(
        by_name.rewards[0], 0.5 * (images[:, 0] - images[:, 2]).mean((1, 2)), atol=1e-6
    )
    assert by_name.other_rewards["colourful"].shape == (1, 6)
    policy = WorldPolicy()
    for rewards in (dict(reward="warmt"), dict(reward="warmth", other_rewards={"x": "colourfullness"})):
        with pytest.raises(ValueError, match="nearest"):
            step_generalization(policy, prompts=PROMPTS, **rewards)
    assert policy.calls == []


def test_fine_texture_plays_no_part_in_diversity():
    checkers = (torch.arange(64)[:, None] + torch.arange(64) & 1).float().expand(3, 64, 64)
    assert prompt_diversity(torch.stack([checkers, 1 - checkers]), ["a", "a"]) == 0


@pytest.mark.parametrize("shape", [(0, 3, 32, 32), (2, 3, 64, 64), (3, 32, 32)])
def test_coverage_of_what_the_oracle_cannot_read(shape):
    with pytest.raises(ValueError, match=f"images has shape {re.escape(str(list(shape)))}"):
        coverage(reference_oracle, torch.zeros(shape))


def test_t_quantiles():
    known = {
        1: 12.7062,
        2: 4.3027,
        4: 2.7764,
        10: 2.2281,
        11: 2.2010,
        15: 2.1314,
        30: 2.0423,
        120: 1.9799,
    }  # from printed tables
    assert {freedom: _t_quantile(freedom) for freedom in known} == pytest.approx(known, abs=6e-4)


def test_seed_interval_of_one_seed_and_of_none():
    mean, half_width = seed_interval([[1, 2]])
    assert mean.tolist() == [1, 2] and half_width.isnan().all() and half_width.shape == (2,)
    for nothing in ([], 3.0):
        with pytest.raises(ValueError, match="at least one seed"):
            seed_interval(nothing)


def experiment_run(seed, gain, **changes):
    "A line of an experiment: trained prompts after epochs 0, 2 and 4, unseen ones and 50 steps at the ends only"

    def record(prompts, epoch, steps, mean):
        return dict(
            prompts=prompts,
            epoch=epoch,
            samples=32 * epoch,
            reward_queries=80 * epoch + (epoch > 0) * seed,
            optimizer_steps=9 * epoch,
            steps=steps,
            n=8,
            mean=mean,
            std=[1.0] * len(steps),
            agreement=[1 - epoch / 8] * len(steps),
            diversity=[None] * len(steps),
            other_rewards={"warmth": [epoch * gain] * len(steps)},
        )

    evaluations = [
        record("trained", 0, [1, 4, 50], [5.0, 6.0, 6.5]),
        record("unseen", 0, [1, 4], [1.0, 1.0]),
        record("trained", 2, [1, 4], [5 + gain / 2, 6.0]),
        record("trained", 4, [1, 4, 50], [5 + gain, 6.5, 6.5]),
        record("unseen", 4, [1, 4], [1.0, 1 + gain / 2]),
    ]
    return (
        dict(group="order", name="shuffled", recipe="sdpo", reward="light", seed=seed, evaluations=evaluations)
        | changes
    )


RUNS = [experiment_run(seed, gain) for seed, gain in ((1, 1.0), (2, 2.0), (3, 3.0))]


def test_gains_over_seeds():
    last = gains_over_seeds(RUNS)
    assert last["steps"] == [1, 4, 50] and last["seeds"] == [1, 2, 3] and last["epoch"] == 4
    assert (last["samples"], last["reward_queries"], last["optimizer_steps"]) == (128, 322, 36)
    assert last["each"].tolist() == [[1, 0.5, 0], [2, 0.5, 0], [3, 0.5, 0]]
    assert last["mean"].tolist() == [2, 0.5, 0] and last["half_width"].tolist() == pytest.approx([4.303 / 3**0.5, 0, 0])
    early, start = gains_over_seeds(RUNS, epoch=2), gains_over_seeds(RUNS, epoch=0)
    assert early["steps"] == [1, 4] and early["mean"].tolist() == [1, 0] and early["samples"] == 64
    assert start["each"].abs().sum() == 0 and start["samples"] == 0
    unseen = gains_over_seeds(RUNS, prompts="unseen")
    assert unseen["steps"] == [1, 4] and unseen["each"].tolist() == [[0, 0.5], [0, 1], [0, 1.5]]
    assert gains_over_seeds(RUNS, value="warmth")["mean"].tolist() == [8, 8, 8]
    assert gains_over_seeds(RUNS, value="agreement")["mean"].tolist() == [-0.5] * 3
    assert gains_over_seeds(RUNS, value="diversity")["mean"].isnan().all()
    assert gains_over_seeds(RUNS[:1])["half_width"].isnan().all()


@pytest.mark.parametrize(
    "runs, options, sentence",
    [
        ([], {}, "runs is empty"),
        (RUNS + RUNS[:1], {}, "each seed once"),
        ([RUNS[0], RUNS[1] | {"reward": "dark"}], {}, "come from 2 settings"),
        (RUNS, {"epoch": 3}, r"its epochs are \[0, 2, 4\]"),
        (RUNS, {"prompts": "new"}, "prompts='new'"),
        (RUNS, {"value": "beauty"}, "was not measured; use mean, agreement, diversity or one of warmth"),
        ([RUNS[0], RUNS[1] | {"evaluations": RUNS[1]["evaluations"][:3]}], {}, "different epochs"),
        ([RUNS[0] | {"evaluations": RUNS[0]["evaluations"][3:4]}], {}, "no step count in common"),
    ],
)
def test_gains_of_what_does_not_belong_together_are_refused(runs, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        gains_over_seeds(runs, **options)
