"""Trees: their parts belong together, and they depend on nothing but their numbers."""

import re

import pytest
import torch

from sdpo_nb.models import load_policy
from sdpo_nb.samplers import make_ddim, make_sampler
from sdpo_nb.tree import Tree, branch_noise, branching_steps, first_branch, sample_tree

PROMPTS = ["a red circle", "a cat"]


def redness(images, prompts):
    return (images[:, 0] - images[:, 2]).mean((1, 2))


@pytest.fixture(scope="module")
def policy(pipeline):
    return load_policy(pipeline, device="cpu")


def close(first, second, tolerance=1e-4):
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)


def grow(policy, T=5, K=3, B=2, seed=0, indices=None, branching=None, **options):
    "Trees, and what was asked on the way"
    asked, sampler, prompts = dict(predict=[], score=[]), policy.sampler(T), (PROMPTS * B)[:B]
    embedding = policy.embed(prompts)
    drawn = branch_noise(seed, 0, range(B) if indices is None else indices, K, T, policy.latent_shape)

    def predict(x, t):
        asked["predict"].append((len(x), t))
        return policy.predict(x, t, embedding.repeat(len(x) // B))

    def score(x, t):
        asked["score"].append((len(x), t))
        return redness(policy.decode(x), prompts * (len(x) // B))

    branching = torch.ones(T, dtype=torch.bool) if branching is None else branching
    return sample_tree(predict, score, sampler, *drawn, branching, **options), asked, sampler


@pytest.mark.parametrize("segment_steps, ordinary", [(1, 0), (2, 0), (3, 2), (9, 2)])
@torch.no_grad()
def test_the_parts_of_a_tree_belong_together(policy, segment_steps, ordinary):
    T, K, B = 5, 3, 2
    tree, asked, sampler = grow(policy, branching=torch.arange(T) >= ordinary, segment_steps=segment_steps)
    times, rows, embedding = [*sampler.timesteps.tolist(), 0], torch.arange(B), policy.embed(PROMPTS)
    S = 1 if segment_steps == 1 else K
    assert tree.states.shape == (S, B, T, *policy.latent_shape)
    assert tree.actions.shape == tree.predicted.shape == (K, B, T, *policy.latent_shape)
    assert tree.latents.shape[:2] == (B, T + 1) and tree.pred_x0.shape[:2] == tree.chosen.shape == (B, T)
    for i in range(T):
        chosen = tree.chosen[:, i]
        assert torch.equal(tree.latents[:, i], tree.states[chosen if S > 1 else [0, 0], rows, i])
        assert torch.equal(tree.latents[:, i + 1], tree.actions[chosen, rows, i])
        inside = i > ordinary and (i - ordinary) % segment_steps  # of a segment: candidates stand where they have gone
        for k in range(K):
            state = tree.states[k if S > 1 else 0, :, i]
            step = sampler.step(policy.predict(state, times[i], embedding), state, i, action=tree.actions[k, :, i])
            close(step.log_prob, tree.log_prob[k, :, i])
            close(step.pred_x0, tree.predicted[k, :, i - 1] if inside else tree.pred_x0[:, i])
            if i >= ordinary:
                end = min(i + segment_steps - 1 - (i - ordinary) % segment_steps, T - 1)
                close(tree.scores[k, :, i], redness(policy.decode(tree.predicted[k, :, end]), None))
    assert torch.equal(tree.predicted[:, :, -1], tree.actions[:, :, -1]) and tree.scores[:, :, :ordinary].isnan().all()
    ends = [min(start + segment_steps, T) for start in range(ordinary, T, segment_steps)]
    assert asked["score"] == [(K * B, times[end]) for end in ends]  # at the next timestep; finished samples at 0
    assert [t for _, t in asked["predict"]] == times[:T]  # one call a step: the chosen prediction is reused
    assert [count for count, _ in asked["predict"]] == [B if i <= ordinary else K * B for i in range(T)]


def test_a_tree_does_not_depend_on_its_batch(policy):
    "Its noise and its choices are its own, and trees can be put together afterwards"
    (both, _, _), (one, _, _), (other, _, _) = (
        grow(policy, B=len(indices), indices=indices) for indices in ([4, 9], [4], [9])
    )
    joined = Tree.cat([one, other], 2)
    assert torch.equal(joined.chosen, both.chosen) and torch.equal(joined.latents[:, 0], both.latents[:, 0])
    assert joined.states.shape == both.states.shape and joined.scores.shape == both.scores.shape
    # more candidates leave the first ones alone
    assert torch.equal(
        branch_noise(3, 2, [1, 5], 5, 4, (2, 3, 3))[1][:2], branch_noise(3, 2, [1, 5], 2, 4, (2, 3, 3))[1]
    )


def test_where_trajectories_go_on(policy):
    winner, loser, drawn = (grow(policy, continue_from=way)[0] for way in ("winner", "loser", "random"))
    assert torch.equal(winner.chosen, winner.scores.argmax(0)) and torch.equal(loser.chosen, loser.scores.argmin(0))
    assert torch.equal(drawn.chosen, branch_noise(0, 0, range(2), 3, 5, policy.latent_shape)[2])
    picks = branch_noise(0, 0, range(400), 4, 5, (1, 1, 1))[2]
    counts = torch.bincount(picks.flatten(), minlength=4)
    assert ((counts - 500).abs() < 5 * (2000 * 0.25 * 0.75) ** 0.5).all()


def test_noises_that_do_not_fit(policy):
    drawn = branch_noise(0, 0, range(2), 3, 5, policy.latent_shape)
    message = "noises has shape [3, 2, 5, 4, 8, 8]; give [K,B,T,C,H,W] with T = 4 and latents of [4, 8, 8]."
    with pytest.raises(ValueError, match=re.escape(message)):
        sample_tree(None, None, policy.sampler(4), *drawn, None)


def test_few_steps(policy):
    "Which steps branch by default, where nothing is asked for"
    assert branching_steps(policy.sampler(20)).nonzero()[:, 0].tolist() == list(range(5, 20))
    assert first_branch(torch.tensor([999]), 0) == 0 and first_branch(torch.tensor([999])) == 1
    finished = make_ddim({**policy.pipeline.scheduler.config, "set_alpha_to_one": True, "timestep_spacing": "trailing"})
    clean = make_sampler(finished, 4)  # a last step without noise has no candidates
    assert branching_steps(clean).tolist() == [False, True, True, False]
