"Losses: the reference vectors, cases by hand, gradients against autograd, two passes against the whole graph."

import inspect
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sdpo_nb.objectives import (
    Objective,
    log_prob_coefficients,
    objectives,
    ppo_clip_loss,
    preference_loss,
    reward_difference_loss,
    surrogate_loss,
    trajectory_difference_loss,
    trajectory_residual,
)

VECTORS = Path(__file__).parent / "reference_vectors" / "sdpo_vectors.npz"
REFERENCE_CASES = [  # name, clip range (0: none), log scale
    ("clip0.0001_scale1.0_step0", 1e-4, 1.0),
    ("clip0.0001_scale1.0_step7", 1e-4, 1.0),
    ("clip0.0_scale1.0_step3", 0.0, 1.0),
    ("clip0.2_scale10.0_step3", 0.2, 10.0),
]


def transitions(count=32, spread=1e-2, seed=0, rows=2):
    generator = torch.Generator().manual_seed(seed)
    old, move, advantages = torch.randn(3, rows, count, dtype=torch.float64, generator=generator)
    weight = 0.6 + 0.4 * torch.rand(count, dtype=torch.float64, generator=generator)
    return (old + spread * move).requires_grad_(), old, 3 * advantages, weight


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


ONE = torch.ones(1, dtype=torch.float64)
ZERO = column(0.0, 0.0)


def value_and_gradient(loss, log_prob, *args, **options):
    log_prob = log_prob.detach().clone().requires_grad_()
    value = loss(log_prob, *args, **options)
    return value.item(), torch.autograd.grad(value, log_prob)[0]


def pairs_for(name, count):
    return {"pair_index": torch.arange(count) // 4} if objectives[name].trajectories else {}


@pytest.fixture(scope="module")
def vectors():
    with np.load(VECTORS) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files if name.startswith("loss/")}


@pytest.mark.parametrize("name, clip_range, log_scale", REFERENCE_CASES)
def test_loss_and_gradients_equal_the_reference(vectors, name, clip_range, log_scale):
    def both(kind):
        return torch.stack([vectors[f"loss/{name}/{kind}{j}"] for j in (1, 2)])

    value, gradient = value_and_gradient(
        reward_difference_loss,
        both("log_prob"),
        both("old"),
        both("adv"),
        vectors[f"loss/{name}/weight"] / log_scale,
        clip_range=clip_range,
        advantage_clip=5.0,
    )
    assert abs(value - vectors[f"loss/{name}/loss"].item()) <= 1e-9
    assert (gradient - both("grad")).abs().max() <= 1e-9


def test_all_reference_cases_are_covered(vectors):
    assert {key.split("/")[1] for key in vectors} == {name for name, _, _ in REFERENCE_CASES}


@pytest.mark.parametrize(
    "ratios, advantages, loss, gradient",
    [
        ((0.0, 0.0), (2.0, 1.0), 1.0, (-1.0, 1.0)),  # the start: plain paired policy gradient, s = 0.5
        ((0.1, -0.3), (2.0, 1.0), 0.7225, (-0.85, 0.0)),  # b beyond the clip, a within
        ((0.3, -0.3), (2.0, 1.0), 0.64, (0.0, 0.0)),  # both where they should be, and further
        ((-0.3, 0.3), (2.0, 1.0), 1.69, (-1.3, 1.3)),  # both on the wrong side: charged in full
        ((0.0, 0.0), (9.0, -9.0), 100.0, (-10.0, 10.0)),  # advantages limited to 5 each
        ((0.1, 0.1), (3.0, 3.0), 0.0, (0.0, 0.0)),  # nothing to prefer
    ],
)
def test_reward_difference_by_hand(ratios, advantages, loss, gradient):
    value, slope = value_and_gradient(
        reward_difference_loss, column(*ratios), ZERO, column(*advantages), 0.5 * ONE, clip_range=0.2
    )
    assert value == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(slope, column(*gradient), rtol=0, atol=1e-12)


def test_transitions_do_not_see_each_other():
    log_prob, old, advantages, weight = transitions()
    _, gradient = value_and_gradient(reward_difference_loss, log_prob, old, advantages, weight, clip_range=5e-3)
    single = [
        value_and_gradient(
            reward_difference_loss,
            log_prob[:, i : i + 1],
            old[:, i : i + 1],
            advantages[:, i : i + 1],
            weight[i : i + 1],
            clip_range=5e-3,
        )[1]
        / 32
        for i in range(32)
    ]
    torch.testing.assert_close(gradient, torch.cat(single, dim=1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", list(objectives))
def test_gradcheck(name):
    log_prob, old, advantages, weight = transitions(12, spread=0.05)
    options = {"clip_range": 0.02, **pairs_for(name, 12)}
    assert torch.autograd.gradcheck(lambda x: objectives[name](x, old, advantages, weight, **options), log_prob)


@pytest.mark.parametrize("name", list(objectives))
def test_all_losses_are_called_alike_and_train_only_the_policy(name):
    log_prob, *others = (t.detach().requires_grad_() for t in transitions(12))
    options = {"clip_range": 0.01, "advantage_clip": 5.0, "log_ratio_scale": torch.ones(12, dtype=torch.float64)}
    loss = objectives[name](log_prob, *others[:2], others[2].detach(), **options, **pairs_for(name, 12))
    assert loss.shape == ()
    loss.backward()
    assert log_prob.grad.isfinite().all() and log_prob.grad.abs().sum() > 0
    assert others[0].grad is None and others[1].grad is None


@pytest.mark.parametrize("name", list(objectives))
def test_scale_multiplies_the_log_ratio_before_the_clamp(name):
    log_prob, old, advantages, weight = transitions(12, spread=0.05)
    scale = 0.2 + 3 * torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options = {"clip_range": 0.03, **pairs_for(name, 12)}
    scaled = value_and_gradient(objectives[name], log_prob, old, advantages, weight, log_ratio_scale=scale, **options)
    plain = value_and_gradient(objectives[name], scale * log_prob.detach(), scale * old, advantages, weight, **options)
    assert scaled[0] == pytest.approx(plain[0], abs=1e-12)
    torch.testing.assert_close(scaled[1], scale * plain[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip_range", [1e-4, 0.1])
@pytest.mark.parametrize("rows", [1, 2])
def test_ppo_equals_its_formula(clip_range, rows):
    log_prob, old, advantages, weight = transitions(64, spread=0.1, rows=rows)
    ratio, clipped_advantage = (log_prob - old).exp(), advantages.clamp(-2, 2)
    bounded = ratio.clamp(1 - clip_range, 1 + clip_range)
    expected = (weight * -torch.minimum(ratio * clipped_advantage, bounded * clipped_advantage)).mean()
    actual = ppo_clip_loss(log_prob, old, advantages, weight, clip_range=clip_range, advantage_clip=2.0)
    assert actual.item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize(
    "ratios, rewards, loss, gradient",
    [
        ((0.5, -0.5), (2.0, 1.0), math.log(1 + (0.9 / 1.1) ** 0.1), (0.0, 0.0)),  # beyond the clip
        ((-900.0, 900.0), (2.0, 1.0), math.log(1 + (1.1 / 0.9) ** 0.1), (0.0, 0.0)),  # no overflow on the way
    ],
)
def test_preference_by_hand(ratios, rewards, loss, gradient):
    value, slope = value_and_gradient(preference_loss, column(*ratios), ZERO, column(*rewards), ONE)
    assert value == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(slope, column(*gradient), rtol=0, atol=1e-12)


def test_preference_depends_on_the_order_only():
    log_prob, reference, advantages, weight = transitions(64, spread=0.1)
    first = preference_loss(log_prob, reference, advantages, weight)
    assert torch.equal(first, preference_loss(log_prob, reference, advantages * 100 + 7, weight))


def trajectories(num_pairs=5, num_steps=7, seed=0):
    log_prob, old, _, _ = transitions(num_pairs * num_steps, spread=1e-3, seed=seed)
    final = torch.randn(2, num_pairs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    pair_index = torch.arange(num_pairs).repeat_interleave(num_steps)
    return log_prob.detach(), old, final, torch.full((num_pairs * num_steps,), 0.8, dtype=torch.float64), pair_index


@pytest.mark.parametrize("clip_range", [0, 5e-4])
def test_trajectory_loss_equals_the_sum_over_time_and_mean_over_pairs(clip_range):
    log_prob, old, final, eta, pair_index = trajectories()
    ratio = (log_prob - old).view(2, 5, 7)
    target = final[0] - final[1]

    def square(ratio):
        total = ratio.sum(-1)
        return (0.8 * (total[0] - total[1]) - target).square()

    expected = (
        torch.maximum(square(ratio), square(ratio.clamp(-clip_range, clip_range))) if clip_range else square(ratio)
    )
    actual = trajectory_difference_loss(
        log_prob, old, final[:, pair_index], eta, pair_index=pair_index, clip_range=clip_range
    )
    assert actual.item() == pytest.approx(expected.mean().item(), abs=1e-12)


def test_order_and_names_of_pairs_do_not_matter():
    log_prob, old, final, eta, pair_index = trajectories()
    expected = trajectory_residual(log_prob, old, final[:, pair_index], eta, pair_index=pair_index)
    order = torch.randperm(35, generator=torch.Generator().manual_seed(3))
    actual = trajectory_residual(
        log_prob[:, order],
        old[:, order],
        final[:, pair_index[order]],
        eta[order],
        pair_index=10 + 3 * pair_index[order],
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", list(objectives))
@pytest.mark.parametrize("size", [1, 35])
@pytest.mark.parametrize("clip_range", [0, 3e-4])
def test_two_passes_equal_the_whole_graph(name, size, clip_range):
    torch.manual_seed(0)
    _, old, final, eta, pair_index = trajectories()
    network = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()
    inputs = torch.randn(2, 35, 4, dtype=torch.float64)
    args = old, final[:, pair_index], eta
    options = {"clip_range": clip_range, "log_ratio_scale": torch.linspace(0.5, 2, 35, dtype=torch.float64)}
    if objectives[name].trajectories:
        options["pair_index"] = pair_index

    def evaluate(chosen):
        return old[:, chosen] + 1e-3 * network(inputs[:, chosen])[..., 0]

    everything = torch.arange(35)
    loss = objectives[name](evaluate(everything), *args, **options)
    whole = torch.autograd.grad(loss, list(network.parameters()))
    with torch.no_grad():
        value, coefficients = log_prob_coefficients(objectives[name], evaluate(everything), *args, **options)
    for chosen in everything.split(size):
        surrogate_loss(evaluate(chosen), coefficients[:, chosen]).backward()
    assert not value.requires_grad and not coefficients.requires_grad
    assert value.item() == pytest.approx(loss.item(), abs=1e-15)
    for parameter, expected in zip(network.parameters(), whole):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", list(objectives))
def test_a_clip_range_of_zero_switches_the_clip_off(name):
    log_prob, old, advantages, weight = transitions(12, spread=0.05)
    options = pairs_for(name, 12)
    unlimited = value_and_gradient(objectives[name], log_prob, old, advantages, weight, clip_range=0, **options)
    wide = value_and_gradient(objectives[name], log_prob, old, advantages, weight, clip_range=0.99, **options)
    assert unlimited[0] == wide[0] and torch.equal(unlimited[1], wide[1])
    assert (unlimited[1] != 0).all()


@pytest.mark.parametrize("name", list(objectives))
@pytest.mark.parametrize(
    "change, message",
    [
        ({"log_prob": torch.zeros(12)}, "log_prob has shape .12."),
        ({"old_log_prob": torch.zeros(2, 1)}, "old_log_prob has shape .2, 1. where"),
        ({"advantages": torch.zeros(12)}, "advantages has shape .12. where"),
        ({"weight": torch.ones(2, 12)}, "weight has shape .2, 12. where"),
        ({"clip_range": -0.1}, "clip_range is -0.1; choose a positive one"),
        ({"clip_range": float("nan")}, "clip_range is nan"),
    ],
)
def test_bad_input_is_refused(name, change, message):
    log_prob, old, advantages, weight = transitions(12)
    given = {"log_prob": log_prob, "old_log_prob": old, "advantages": advantages, "weight": weight}
    with pytest.raises(ValueError, match=message):
        objectives[name](**{**given, **change}, **pairs_for(name, 12))


@pytest.mark.parametrize("name", [name for name in objectives if objectives[name].pairs])
def test_paired_losses_refuse_a_single_row(name):
    log_prob, old, advantages, weight = transitions(12, rows=1)
    with pytest.raises(ValueError, match="one row per trajectory of the pair"):
        objectives[name](log_prob, old, advantages, weight, **pairs_for(name, 12))


@pytest.mark.parametrize("name", list(objectives))
def test_what_an_objective_says_it_needs_is_what_it_takes(name):
    objective, parameters = objectives[name], inspect.signature(objectives[name].loss).parameters
    passed_on = inspect.signature(trajectory_residual).parameters if "options" in parameters else {}
    assert isinstance(objective, Objective) and set(objective.options) <= {*parameters, *passed_on}
    assert objective.trajectories == ("pair_index" in parameters)
    with pytest.raises(ValueError, match="clip_range is"):
        objective(
            *transitions(4),
            clip_range=objective.clip_below if objective.clip_below < math.inf else -1.0,
            **pairs_for(name, 4),
        )
