"Schedules: every cell once, the announced number of updates, one generator decides everything."

import pytest
import torch

from sdpo_nb.batching import micro_batches, schedules, step_accumulated, step_shuffled

SIZES = [(1, 1, 1), (4, 1, 2), (6, 5, 3), (6, 5, 6), (12, 7, 4), (128, 50, 64)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def as_lists(updates):
    return [list(zip(pair.tolist(), step.tolist())) for pair, step in updates]


@pytest.mark.parametrize("name", list(schedules))
@pytest.mark.parametrize("num_pairs, num_steps, pairs_per_update", SIZES)
def test_every_cell_is_visited_exactly_once(name, num_pairs, num_steps, pairs_per_update):
    updates = schedules[name](num_pairs, num_steps, pairs_per_update, generator=generator())
    cells = [cell for update in as_lists(updates) for cell in update]
    assert sorted(cells) == [(pair, step) for pair in range(num_pairs) for step in range(num_steps)]


@pytest.mark.parametrize("name", list(schedules))
@pytest.mark.parametrize("steps", [[0], [3, 1], [0, 1, 2, 4], torch.tensor([2, 0])])
def test_only_the_trainable_steps_are_visited(name, steps):
    updates = schedules[name](6, 5, 2, steps=steps, generator=generator())
    cells = [cell for update in as_lists(updates) for cell in update]
    assert sorted(cells) == sorted((pair, int(step)) for pair in range(6) for step in steps)


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


def test_a_shuffled_update_takes_one_step_of_each_of_its_pairs():
    for pair, _ in step_shuffled(12, 7, 4, generator=generator()):
        assert len(pair.unique()) == 4


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


@pytest.mark.parametrize("name", list(schedules))
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 1000])
def test_micro_batches_add_up_to_the_mean_of_the_update(name, micro_batch):
    losses = torch.randn(12, 7, dtype=torch.float64, generator=generator())
    for update in schedules[name](12, 7, 4, generator=generator()):
        pieces = list(micro_batches(update, micro_batch))
        assert torch.equal(torch.cat([pair for pair, _, _ in pieces]), update[0])
        assert torch.equal(torch.cat([step for _, step, _ in pieces]), update[1])
        assert all(len(pair) <= micro_batch for pair, _, _ in pieces)
        assert sum(weight for _, _, weight in pieces) == pytest.approx(1)
        total = sum(weight * losses[pair, step].mean() for pair, step, weight in pieces)
        assert total.item() == pytest.approx(losses[update].mean().item(), abs=1e-12)


@pytest.mark.parametrize("micro_batch", [0, -1])
def test_empty_micro_batches_are_refused(micro_batch):
    update = step_shuffled(4, 3, 2, generator=generator())[0]
    with pytest.raises(ValueError, match="micro_batch is"):
        list(micro_batches(update, micro_batch))
