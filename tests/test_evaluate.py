"""Evaluation deals the same pairs at every step count, measures what it says, and compares only what belongs together."""
import json
import math
from types import SimpleNamespace

import pytest
import torch

import sdpo_nb.evaluate as evaluate
from sdpo_nb.evaluate import (StepEvaluation, agreement_share, compare, comparison_table, evaluation_pairs, prompt_diversity, read_attributes,
                              shrink, spread_indices, step_generalization)
from sdpo_nb.files import read_json, write_json
from sdpo_nb.mdp import make_ddim
from sdpo_nb.models import Policy
from sdpo_nb.shapes import backgrounds, caption, colors, parse_caption, random_scenes, render, shapes
from random_pipelines import SCHEDULER, random_stable_diffusion


class WorldPolicy:
    "Draws what the prompt names by arithmetic; a share of its pictures, larger at few steps, shows another scene. Remembers every call."
    latent_shape, device = (3, 32, 32), torch.device('cpu')
    pipeline = SimpleNamespace(vae_scale_factor=1)

    def __init__(self, skill=1., brightness=0.):
        self.scheduler = self.own_scheduler = make_ddim(SCHEDULER)
        self.skill, self.brightness, self.calls = skill, brightness, []

    def sample(self, prompts, num_steps, *, seeds, eta, own_scheduler, batch_size, return_latents):
        assert len(prompts) <= batch_size and return_latents
        self.calls.append((num_steps, tuple(prompts), tuple(seeds), eta, own_scheduler))
        images = []
        for prompt, seed in zip(prompts, seeds):
            generator = torch.Generator().manual_seed(seed)
            scene, luck = random_scenes(1, generator), torch.rand(1, generator=generator).item()
            if luck < self.skill*(1 - .5/num_steps):
                for attribute, index in parse_caption(prompt).items(): setattr(scene, attribute, torch.tensor([index]))
            images.append(render(scene)[0] + self.brightness)
        return torch.stack(images)

    def decode(self, latents, batch_size=64): return latents.clamp(0, 1)


def reference_oracle(images):
    "Reads background and colour by the nearest known paint in a corner and in the middle"
    def nearest(pixels, table): return -torch.cdist(pixels, torch.tensor(list(table.values())))
    return {'background': nearest(images[:, :, :2, :2].mean((2, 3)), backgrounds), 'color': nearest(images[:, :, 15:17, 15:17].mean((2, 3)), colors)}


def brightness(images, prompts): return images.mean((1, 2, 3))


PROMPTS = [caption('square', color, background) for color, background in zip(colors, [*backgrounds, 'white'])]


@pytest.fixture
def oracle(monkeypatch):
    monkeypatch.setattr(evaluate, 'load_network', lambda name: SimpleNamespace(to=lambda device: reference_oracle))


def test_pairs_are_the_same_at_every_step_count_and_batch_size(oracle):
    policy = WorldPolicy()
    step_generalization(policy, brightness, PROMPTS, steps=(1, 4), samples=10, batch_size=4)
    step_generalization(policy, brightness, PROMPTS, steps=(8,), samples=10, batch_size=128)
    dealt = {}
    for num_steps, prompts, seeds, *_ in policy.calls: dealt.setdefault(num_steps, []).extend(zip(prompts, seeds))
    assert dealt[1] == dealt[4] == dealt[8]
    assert [prompt for prompt, _ in dealt[1]] == [PROMPTS[index % 6] for index in range(10)] and len(set(dealt[1])) == 10


def test_more_samples_only_add_pairs():
    few, many = evaluation_pairs(PROMPTS, 5, 3), evaluation_pairs(PROMPTS, 3000, 3)
    assert few == (many[0][:5], many[1][:5]) and len(set(many[1])) == 3000


def test_options_reach_the_sampler(oracle):
    policy = WorldPolicy()
    step_generalization(policy, brightness, PROMPTS, steps=(2,), samples=3, eta=.5, own_scheduler=True)
    assert policy.calls[0][3:] == (.5, True)


def test_numbers_are_those_of_the_pictures(oracle):
    policy = WorldPolicy(skill=.9)
    result = step_generalization(policy, brightness, PROMPTS, steps=(1, 8), samples=40, batch_size=16, other_rewards={'dark': lambda *both: -brightness(*both)})
    prompts, seeds = evaluation_pairs(PROMPTS, 40, 0)
    images = torch.stack([policy.sample(prompts, steps, seeds=seeds, eta=1, own_scheduler=False, batch_size=40, return_latents=True) for steps in (1, 8)])
    rewards = images.mean((2, 3, 4))
    assert torch.allclose(result.rewards, rewards) and torch.allclose(result.other_rewards['dark'], -rewards)
    assert torch.allclose(result.mean, rewards.mean(1)) and torch.allclose(result.std, rewards.std(1))
    assert result.per_prompt[PROMPTS[2]] == pytest.approx(rewards[:, 2::6].mean(1).tolist())
    assert torch.equal(result.images, images[:, result.kept]) and result.image_prompts == [prompts[index] for index in result.kept]
    assert torch.allclose(result.diversity, torch.tensor([prompt_diversity(of_step, prompts) for of_step in images]))
    assert result.agreement[1] > result.agreement[0] and 0 < result.agreement[0] < 1
    assert (result.agreement <= torch.stack([right.nanmean(1) for right in result.correct.values()]).amin(0)).all()


def test_agreement_counts_what_is_named_only():
    images = render(random_scenes(4, torch.Generator().manual_seed(0)))
    seen = {attribute: logits.argmax(1).tolist() for attribute, logits in reference_oracle(images).items()}
    right, wrong = list(backgrounds)[seen['background'][0]], list(backgrounds)[seen['background'][1] - 1]
    prompts = [f'a square on a {right} background', f'a square on a {wrong} background', 'a cat', 'a square']
    correct = read_attributes(reference_oracle, images, prompts)
    assert correct['background'][:2].tolist() == [1, 0] and correct['background'][2:].isnan().all() and correct['color'].isnan().all()
    table = {name: values[None] for name, values in correct.items()}
    assert agreement_share(table).tolist() == [.5]


def test_no_oracle_for_other_worlds(monkeypatch):
    def refuse(name): raise AssertionError('loaded for nothing')
    monkeypatch.setattr(evaluate, 'load_network', refuse)
    policy = WorldPolicy()
    assert step_generalization(policy, brightness, ['a cat', 'a dog'], steps=(1,), samples=2).agreement is None
    policy.pipeline = SimpleNamespace(vae_scale_factor=16)   # its pictures would be larger
    assert step_generalization(policy, brightness, PROMPTS, steps=(1,), samples=2).agreement is None


def test_diversity():
    flat = torch.tensor([0., .6, .2, .9])[:, None, None, None].expand(4, 3, 48, 32)
    assert prompt_diversity(flat, list('abab')) == pytest.approx((.2 + .3)/2)
    assert math.isnan(prompt_diversity(flat, list('abcd')))
    checkers = (torch.arange(64)[:, None] + torch.arange(64) & 1).float().expand(3, 64, 64)
    assert prompt_diversity(torch.stack([checkers, 1 - checkers]), ['a', 'a']) == 0   # fine texture plays no part
    assert shrink(torch.rand(2, 3, 20, 30), 32).shape == (2, 3, 20, 30) and shrink(torch.rand(2, 3, 512, 768), 256).shape == (2, 3, 171, 256)


@pytest.mark.parametrize('samples, prompts', [(1, 1), (2, 9), (9, 2), (256, 180), (8, 8), (7, 180)])
def test_kept_pictures(samples, prompts):
    kept = spread_indices(samples, prompts)
    assert len(kept) == min(8, samples) and len(set(kept)) == len(kept) and 0 <= kept[0] and kept[-1] < samples


def test_comparison_is_paired_and_follows_the_layout(oracle, tmp_path):
    before, after = (step_generalization(WorldPolicy(skill, light), brightness, PROMPTS, steps=(1, 2, 4), samples=30, other_rewards={'dark': lambda *both: -brightness(*both)})
                     for skill, light in [(.8, 0), (.9, .02)])
    result = compare(before, after)
    assert {'steps', 'n', 'reward', 'before', 'after', 'gain', 'agreement', 'diversity'} <= set(result)
    assert result['steps'] == [1, 2, 4] and result['n'] == 30 and result['reward'] == 'brightness'
    difference = (after.rewards - before.rewards)
    assert result['gain']['mean'] == pytest.approx(difference.mean(1).tolist())
    assert result['gain']['se'] == pytest.approx((difference.std(1)/30**.5).tolist())
    assert result['before'] == {'mean': before.mean.tolist(), 'std': before.std.tolist()}
    assert result['after']['mean'] == after.mean.tolist() and set(result['agreement']) == set(result['diversity']) == {'before', 'after'}
    assert result['other_rewards']['dark']['gain']['mean'] == pytest.approx((-difference.mean(1)).tolist())
    assert set(result['attributes']) == {'background', 'color'}
    stored = read_json(write_json(tmp_path/'evaluation.json', result | {'own_scheduler': result}))
    assert stored['own_scheduler']['gain'] == result['gain'] == stored['gain']


def test_table_says_everything(oracle):
    before, after = (step_generalization(WorldPolicy(1, light), brightness, PROMPTS, steps=(1, 50), samples=12) for light in (0, .05))
    result = compare(before, after)
    lines = comparison_table(result).splitlines()
    assert 'brightness' in lines[0] and '12 fixed pairs' in lines[0] and 'DDIM' in lines[0]
    assert lines[1].split()[:3] == ['steps', 'before', 'after'] and 'agreement' in lines[1] and 'diversity' in lines[1]
    assert lines[2].split()[0] == '1' and lines[3].split()[0] == '50' and f"{result['after']['mean'][1]:.3f}" in lines[3]
    assert len({len(line) for line in lines[1:]}) == 1
    assert comparison_table(result | {'own_scheduler': result}).count('fixed pairs') == 2


def test_one_pair_has_no_error_and_still_prints(oracle, tmp_path):
    before, after = (step_generalization(WorldPolicy(), brightness, ['a cat'], steps=(1,), samples=1) for _ in range(2))
    result = compare(before, after)
    assert result['gain']['mean'] == [0] and math.isnan(result['gain']['se'][0]) and result['agreement'] == {'before': None, 'after': None}
    stored = json.loads(write_json(tmp_path/'evaluation.json', result).read_text())
    assert stored['gain']['se'] == [None] and stored['diversity']['before'] == [None]
    for readable in (result, stored): assert '+0.000 ± –' in comparison_table(readable) and 'diversity' not in comparison_table(readable)


@pytest.mark.parametrize('change, named', [(dict(steps=(1, 4)), 'steps'), (dict(seed=1), 'seed'), (dict(own_scheduler=True), 'sampler'), (dict(eta=.5), 'sampler'),
                                           (dict(prompts=PROMPTS[:2]), 'prompts'), (dict(reward=lambda *both: brightness(*both)), 'reward')])
def test_only_like_is_compared(oracle, change, named):
    def run(reward=brightness, prompts=PROMPTS, **options): return step_generalization(WorldPolicy(), reward, prompts, **{'steps': (1, 2), 'samples': 3, **options})
    with pytest.raises(ValueError, match=f'{named} differs'): compare(run(), run(**change))


@pytest.mark.parametrize('change, sentence', [
    (dict(prompts=[]), 'prompts='), (dict(prompts='a cat'), 'prompts='), (dict(samples=0), 'samples=0'), (dict(samples=2.5), 'samples=2.5'), (dict(steps=()), 'steps='),
    (dict(steps=4), 'steps=4'), (dict(steps=(1, 0)), 'num_steps is 0'), (dict(steps=(2000,)), 'num_steps is 2000'), (dict(batch_size=0), 'batch_size=0')])
def test_impossible_requests_are_refused_before_sampling(oracle, change, sentence):
    policy = WorldPolicy()
    with pytest.raises(ValueError, match=sentence): step_generalization(policy, brightness, **{'prompts': PROMPTS, **change})
    assert policy.calls == []


def test_broken_rewards_are_named(oracle):
    with pytest.raises(ValueError, match='nan'):
        step_generalization(WorldPolicy(), lambda images, prompts: torch.full((len(images),), torch.nan), PROMPTS, steps=(1,), samples=2)


def test_a_real_pipeline_before_and_after_a_lora(tmp_path):
    policy = Policy(random_stable_diffusion(tmp_path/'pipeline'), 'random')
    options = dict(steps=(1, 3), samples=5, batch_size=2)
    before = step_generalization(policy, brightness, ['a cat', 'a dog'], **options)
    assert before.images.shape == (2, 5, 3, 16, 16) and before.agreement is None and before.rewards.isfinite().all()
    policy.add_lora(rank=2)
    untouched = step_generalization(policy, brightness, ['a cat', 'a dog'], **options)
    assert torch.allclose(untouched.rewards, before.rewards, atol=1e-6)
    with torch.no_grad():
        for name, weights in policy.trainable_parameters().items():
            if 'lora_B' in name: weights.fill_(.3)
    after = step_generalization(policy, brightness, ['a cat', 'a dog'], **options)
    assert max(map(abs, compare(before, after)['gain']['mean'])) > 1e-5
    with policy.without_lora():
        assert torch.allclose(step_generalization(policy, brightness, ['a cat', 'a dog'], **options).rewards, before.rewards, atol=1e-6)
    own = step_generalization(policy, brightness, ['a cat', 'a dog'], own_scheduler=True, **options)
    assert own.sampler == 'DDIMScheduler' and own.rewards.isfinite().all() and isinstance(own, StepEvaluation)
