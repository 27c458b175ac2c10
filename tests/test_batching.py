"Schedules: every transition once, the announced number of updates, one generator decides everything."

import pytest
import torch

from sdpo_nb.batching import Minibatch, pooled_transitions, schedules, step_accumulated, step_shuffled

SIZES = [(1, 1, 1), (4, 1, 2), (6, 5, 3), (6, 5, 6), (12, 7, 4), (128, 50, 64)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def as_lists(updates):
    return [list(zip(pair.tolist(), step.tolist())) for pair, step in updates]


@pytest.mark.parametrize("name", list(schedules))
@pytest.mark.parametrize("num_pairs, num_steps, pairs_per_update", SIZES)
def test_every_transition_is_visited_exactly_once(name, num_pairs, num_steps, pairs_per_update):
    updates = schedules[name](num_pairs, num_steps, pairs_per_update, generator=generator())
    assert sorted(sum(as_lists(updates), [])) == [
        (pair, step) for pair in range(num_pairs) for step in range(num_steps)
    ]


@pytest.mark.parametrize("name", list(schedules))
@pytest.mark.parametrize("steps", [[0], [3, 1], [0, 1, 2, 4], torch.tensor([2, 0])])
def test_only_the_trainable_steps_are_visited(name, steps):
    updates = schedules[name](6, 5, 2, steps=steps, generator=generator())
    assert sorted(sum(as_lists(updates), [])) == sorted((pair, int(step)) for pair in range(6) for step in steps)


@pytest.mark.parametrize("num_pairs, num_steps, pairs_per_update", SIZES)
def test_number_and_size_of_updates(num_pairs, num_steps, pairs_per_update):
    shuffled = step_shuffled(num_pairs, num_steps, pairs_per_update, generator=generator())
    accumulated = step_accumulated(num_pairs, num_steps, pairs_per_update, generator=generator())
    assert [len(pair) for pair, _ in shuffled] == [pairs_per_update] * (num_steps * num_pairs // pairs_per_update)
    assert [len(pair) for pair, _ in accumulated] == [pairs_per_update * num_steps] * (num_pairs // pairs_per_update)
    assert all(t.dtype == torch.long and t.ndim == 1 for update in shuffled + accumulated for t in update)


def test_the_updates_per_epoch_of_the_published_configurations():
    "128 pairs and 50 steps: 100 updates with 64 pairs an update, 50 with 128."
    assert len(step_shuffled(128, 50, 64, generator=generator())) == 100
    assert len(step_shuffled(128, 50, 128, generator=generator())) == 50


def test_shuffled_updates_go_over_all_pairs_before_a_pair_returns():
    updates = step_shuffled(12, 7, 4, generator=generator())
    for first in range(0, len(updates), 3):
        seen = torch.cat([pair for pair, _ in updates[first : first + 3]])
        assert sorted(seen.tolist()) == list(range(12))


def test_an_accumulated_update_holds_whole_trajectories_step_by_step():
    for pair, step in step_accumulated(12, 7, 4, generator=generator()):
        pair, step = pair.view(7, 4), step.view(7, 4)
        assert (pair == pair[0]).all()
        assert torch.equal(step.sort(dim=0).values, torch.arange(7)[:, None].expand(7, 4))


def test_pairs_have_different_orders_of_steps():
    order = torch.stack([step for _, step in step_shuffled(32, 10, 32, generator=generator())], dim=1)
    assert len(order.unique(dim=0)) == 32


def test_shuffled_updates_mix_steps_from_all_over_the_trajectory():
    updates = step_shuffled(64, 10, 64, generator=generator())
    assert all(len(step.unique()) >= 8 for _, step in updates)


def test_steps_are_shuffled_uniformly():
    counts = torch.zeros(4, 4)
    for seed in range(50):
        for position, (_, step) in enumerate(step_shuffled(20, 4, 20, generator=generator(seed))):
            counts[position] += step.bincount(minlength=4)
    assert (counts / 1000 - 0.25).abs().max() < 0.06


@pytest.mark.parametrize("name", list(schedules))
def test_the_generator_decides_everything(name):
    torch.manual_seed(1)
    first = as_lists(schedules[name](12, 7, 4, generator=generator(3)))
    torch.manual_seed(2)
    assert first == as_lists(schedules[name](12, 7, 4, generator=generator(3)))
    assert first != as_lists(schedules[name](12, 7, 4, generator=generator(4)))


@pytest.mark.parametrize("name", list(schedules))
def test_the_next_epoch_has_another_order_and_resumes_from_the_generator_state(name):
    random = generator()
    first = as_lists(schedules[name](12, 7, 4, generator=random))
    state = random.get_state()
    second = as_lists(schedules[name](12, 7, 4, generator=random))
    assert first != second
    random.set_state(state)
    assert second == as_lists(schedules[name](12, 7, 4, generator=random))


@pytest.mark.parametrize("name", list(schedules))
@pytest.mark.parametrize("num_pairs, pairs_per_update", [(10, 4), (4, 8), (4, 0), (0, 1), (4, -2)])
def test_impossible_arithmetic_is_refused(name, num_pairs, pairs_per_update):
    with pytest.raises(ValueError, match="pairs_per_update is .*choose a divisor"):
        schedules[name](num_pairs, 3, pairs_per_update, generator=generator())


@pytest.mark.parametrize("name", list(schedules))
@pytest.mark.parametrize("steps", [[], [3], [-1], [0, 0]])
def test_impossible_steps_are_refused(name, steps):
    with pytest.raises(ValueError, match="steps is .*each once"):
        schedules[name](4, 3, 2, steps=steps, generator=generator())


@pytest.mark.parametrize("micro_batch", [1, 3, 1000])
def test_micro_batches_of_micro_batches_add_up_to_the_whole(micro_batch):
    generator_, count = generator(), 28
    losses, weight = torch.randn(2, count, dtype=torch.float64, generator=generator_)
    coefficients = torch.randn(2, count, dtype=torch.float64, generator=generator_)
    whole = Minibatch(torch.arange(count), torch.arange(count) % 7, 0.5, coefficients, weight, last=False)
    parts = [part for half in whole.split(15) for part in half.split(micro_batch)]
    assert torch.equal(torch.cat([part.group for part in parts]), whole.group)
    assert torch.equal(torch.cat([part.step for part in parts]), whole.step)
    assert torch.equal(torch.cat([part.weight for part in parts]), weight)
    assert sum(part.share for part in parts) == pytest.approx(0.5)
    total = sum(part.share * losses[part.group].mean() for part in parts)
    assert total.item() == pytest.approx(0.5 * losses.mean().item(), abs=1e-12)
    total = sum(part.share * part.coefficients.sum(1) for part in parts)
    assert total.tolist() == pytest.approx((0.5 * coefficients.sum(1)).tolist(), abs=1e-12)
    assert not any(part.last for part in parts)  # the minibatch itself is not the last of its update


@pytest.mark.parametrize("micro_batch", [1, 3, 7, 1000])
def test_the_last_micro_batch_says_so(micro_batch):
    group, step = step_shuffled(14, 1, 14, generator=generator())[0]
    parts = Minibatch(group, step).split(micro_batch)
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
    assert max(map(len, parts)) <= micro_batch


def test_negative_micro_batches_are_refused():
    with pytest.raises(ValueError, match="micro_batch is -1"):
        step_shuffled(4, 3, 2, generator=generator())[0].split(-1)


def test_pooled_transitions_follow_their_generator():
    valid = torch.rand(9, 5, generator=generator()) > 0.5
    first, again, other = (as_lists(pooled_transitions(valid, 4, generator(seed))) for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(sum(first, [])) == sorted(sum(other, [])) == [tuple(pair) for pair in valid.nonzero().tolist()]
