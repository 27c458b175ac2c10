"""The surrogate begins as the policy's encoder, learns an order from pairs, remembers the newest, and is watched."""

import math

import pytest
import torch

from sdpo_nb.models import load_policy
from sdpo_nb.surrogate import (
    LatentReward,
    RankedPairs,
    ReplayBuffer,
    RunningScale,
    copy_encoder,
    fresh_alarm,
    gains_since,
    mean_and_error,
    note_claims,
    ranked_loss,
    ranking_accuracy,
    score_outputs,
)

KINDS = ("tiny", "sd_turbo", "sdxl_turbo", "lcm")
PROMPTS = ["a cat", "two dogs"]


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny", device="cpu")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def learning(surrogate):
    return {name.split(".")[0] for name, parameter in surrogate.named_parameters() if parameter.requires_grad}


# --- the network


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_starts_as_the_policys_own_whatever_its_lora(random_folder, kind):
    policy = load_policy("tiny" if kind == "tiny" else random_folder(kind), device="cpu")
    embedding, latents, seen = policy.embed(PROMPTS), noise(2, *policy.latent_shape), {}
    note = lambda module, args, output: seen.update(features=output)
    handle = policy.denoiser.mid_block.register_forward_hook(note)
    policy.denoiser(latents, 0, **policy.conditioning(embedding))
    handle.remove()
    policy.add_lora(4, seed=3)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))  # it changes everything
    surrogate = LatentReward(policy)
    found = surrogate.encoder(latents, 0, **surrogate.conditions(embedding), return_dict=False)[0]
    torch.testing.assert_close(found, seen["features"], rtol=0, atol=1e-5)
    assert surrogate(latents, embedding).shape == (2,)
    assert not any("up_blocks" in name or "lora" in name for name, _ in surrogate.named_parameters())


def test_the_surrogate_shares_no_memory_with_the_policy(policy):
    ours = dict(LatentReward(policy).named_parameters())
    theirs = {parameter.data_ptr() for parameter in policy.denoiser.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in ours.values()}
    assert not any(parameter.is_meta for parameter in ours.values())


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match="The surrogate is half of a network, and a Linear has no blocks"):
        copy_encoder(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    "learns, parts", [("encoder", {"encoder", "features", "score"}), ("head", {"features", "score"})]
)
def test_what_learns_and_what_is_kept(policy, learns, parts):
    surrogate = LatentReward(policy, learns)
    assert learning(surrogate) == parts == {name.split(".")[0] for name in surrogate.learned_state()}
    assert learning(surrogate.learning(False)) == set() and learning(surrogate.learning(True)) == parts
    other = LatentReward(policy, learns, seed=1)
    other.load_learned_state(surrogate.learned_state())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in surrogate.state_dict().items())
    with pytest.raises(ValueError, match="surrogate_learns is 'all', which is none of encoder, head"):
        LatentReward(policy, "all")


def test_the_head_is_the_same_for_the_same_seed_and_leaves_torch_alone(policy):
    before = torch.get_rng_state()
    first, second, third = (LatentReward(policy, seed=seed).score.weight for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, third) and torch.equal(before, torch.get_rng_state())


def test_text_and_latents_reach_the_score_without_the_autoencoder(policy, monkeypatch):
    monkeypatch.setattr(policy.vae, "decode", lambda *args, **kwargs: pytest.fail("decoded"))
    surrogate, latents = LatentReward(policy), noise(2, 2, *policy.latent_shape).requires_grad_()
    scores = score_outputs(surrogate, latents, policy.embed(["a circle", "a star"]))
    swapped = score_outputs(surrogate, latents, policy.embed(["a star", "a circle"]))
    scores.sum().backward()
    assert scores.shape == (2, 2) and latents.grad.abs().amax((2, 3, 4)).min() > 0
    assert (scores - swapped).abs().min() > 1e-6
    alone = surrogate(latents[1:, 1], policy.embed(["a star"]))
    torch.testing.assert_close(alone[0], scores[1, 1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_surrogate_never_computes_in_float16(precision):
    "Its gradient would underflow there without a loss scale; its weights and scores are float32 in any case"
    policy, dtype, seen = load_policy("tiny", device="cpu"), getattr(torch, precision), []
    policy.denoiser.to(dtype)
    surrogate = LatentReward(policy)
    surrogate.encoder.conv_in.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    scores = surrogate(noise(2, *policy.latent_shape).to(dtype), policy.embed(PROMPTS))
    scores.sum().backward()
    gradient = surrogate.encoder.conv_in.weight.grad
    assert seen == [torch.bfloat16 if precision == "bfloat16" else torch.float32]
    assert {scores.dtype, *(parameter.dtype for parameter in surrogate.parameters())} == {torch.float32}
    assert gradient.isfinite().all() and gradient.abs().max() > 0


# --- pairs


def test_accuracy_counts_decided_pairs_within_a_group():
    rewards = torch.tensor([[[1.0], [2.0], [2.0]], [[0.0], [1.0], [2.0]]])
    right = rewards * 3 + torch.tensor([100.0, -100.0]).view(2, 1, 1)  # a shift per prompt changes nothing
    assert ranking_accuracy(right, rewards).tolist() == [1.0] and ranking_accuracy(-right, rewards).tolist() == [0.0]
    one_wrong = torch.tensor([[[1.0], [2.0], [5.0]], [[0.0], [2.0], [1.0]]])  # the tie does not count
    assert ranking_accuracy(one_wrong, rewards).item() == pytest.approx(4 / 5)
    assert ranking_accuracy(rewards, torch.ones_like(rewards)).isnan().all()


def test_fitting_teaches_the_order_and_ties_teach_nothing(policy):
    latents = noise(2, 4, 2, *policy.latent_shape)
    pairs = RankedPairs(["a circle"] * 4, latents, torch.stack([torch.ones(4, 2), torch.zeros(4, 2)]))
    surrogate, embedding = LatentReward(policy), policy.embed(pairs.prompts)
    optimizer = torch.optim.AdamW(surrogate.parameters(), lr=1e-3)
    for _ in range(15):
        loss, scores = ranked_loss(surrogate, pairs, embedding)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 and (scores[0] > scores[1]).all()
    tied, _ = ranked_loss(surrogate, RankedPairs(pairs.prompts, latents, torch.ones(2, 4, 2)), embedding)
    assert tied.item() == 0


def test_the_buffer_keeps_the_newest_and_comes_back_as_it_was():
    def pairs(*values):
        latents = torch.tensor(values).float().view(1, -1, 1, 1, 1, 1).expand(2, -1, 1, 1, 1, 1)
        return RankedPairs([f"p{value}" for value in values], latents, torch.zeros(2, len(values), 1))

    buffer, other = ReplayBuffer(3), ReplayBuffer(3)
    assert len(buffer) == 0 and buffer.state_dict() is None
    buffer.add(pairs(0, 1))
    buffer.add(pairs(2, 3))
    assert buffer.pairs.prompts == ["p1", "p2", "p3"] and buffer.pairs.latents[0].flatten().tolist() == [1, 2, 3]
    other.load_state_dict(buffer.state_dict())
    first, second = (each.draw(7, torch.Generator().manual_seed(0)) for each in (buffer, other))
    assert first.prompts == second.prompts and len(first) == 7 and {*first.prompts} <= {"p1", "p2", "p3"}
    assert [f"p{int(value)}" for value in first.latents[0].flatten()] == first.prompts


# --- the scale


def test_the_running_scale_by_hand():
    "The notebook has the first update; here follow the next ones"
    scale, other = RunningScale(1, decay=0.5), RunningScale(1, decay=0.5)
    scale.update(torch.tensor([[0.0], [4.0]]), recentre=True)
    scale.update(torch.tensor([[4.0], [4.0]]))
    assert (scale.mean.item(), scale.largest.item()) == (3.0, 1.0)
    scale.update(torch.tensor([[103.0]]), recentre=True)
    assert (scale.mean.item(), scale.largest.item()) == (103.0, 0.5)
    other.load_state_dict(scale.state_dict())
    assert other(torch.tensor([[3.0]])).tolist() == scale(torch.tensor([[3.0]])).tolist()
    assert RunningScale(2)(torch.zeros(3, 2)).isfinite().all()


@pytest.mark.parametrize("recentre", [False, True])
def test_an_overflow_leaves_the_running_scale_alone(recentre):
    scale, clean = RunningScale(2), RunningScale(2)
    good = torch.tensor([[0.0, 1.0], [4.0, 3.0]])
    clean.update(good, recentre=recentre)
    scale.update(torch.cat([good, torch.tensor([[math.inf, 1.0], [2.0, math.nan]])]), recentre=recentre)
    assert torch.equal(scale.mean, clean.mean) and torch.equal(scale.largest, clean.largest)
    scale.update(torch.full((2, 2), math.nan), recentre=recentre)
    assert torch.equal(scale.mean, clean.mean) and scale(good).isfinite().all()


# --- the alarm


def test_a_prompt_without_a_past_is_left_out_of_the_gain():
    before, names = torch.tensor([[0.0], [2.0], [10.0], [12.0]]), ["a", "a", "b", "b"]
    known = gains_since(torch.tensor([[2.0], [13.0]]), ["a", "b"], before, names)
    more = gains_since(torch.tensor([[2.0], [1000.0], [13.0]]), ["a", "c", "b"], before, names)
    assert [value.item() for value in known] == [value.item() for value in more]
    gain, error = gains_since(torch.tensor([[6.0]]), ["c"], before, names)
    assert math.isnan(gain.item()) and error.item() == math.inf
    gain, error = gains_since(
        torch.tensor([[1.0]]), ["a"], before, names
    )  # one prompt has no spread to tell an error by
    assert gain.item() == 0.0 and error.item() == math.inf
    assert mean_and_error(torch.tensor([[1.0], [math.nan], [3.0]]))[0].item() == 2.0


def test_a_lucky_best_is_known_to_be_uncertain():
    for best_error, rings in ((0.1, True), (0.5, False)):
        counts = dict(fresh_alarm)
        assert not note_claims(counts, 2.0, best_error, 1.0, 0.8, 0.05)
        assert note_claims(counts, 1.5, 0.1, 2.0, 0.8, 0.05) == rings and counts["alarms_in_a_row"] == rings


def test_what_proves_nothing_rings_for_nothing():
    counts = dict(fresh_alarm)
    assert note_claims(counts, 2.0, 0.1, 2.0, 0.6, 0.06) and not note_claims(counts, 2.0, 0.1, 2.0, 0.6, 0.04)
    for silent in ((math.nan, math.inf, math.nan), (9.0, math.inf, 9.0), (1.0, 0.1, math.nan)):
        assert not note_claims(counts, *silent, math.nan, math.inf) and counts["alarms_in_a_row"] == 0
    assert counts["best_true"] == 2.0
