"Anchors and dense rewards: against the reference's numbers, and against the formulas written as plain loops"

import importlib.util
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sdpo_nb.dense import (
    interpolate_rewards,
    latent_similarities,
    nearest_weights,
    query_indices,
    rank_correlation,
    select_anchor,
    spread_rewards,
    step_similarities,
    time_weights,
    weighted_rewards,
)
from sdpo_nb.files import read_jsonl, write_jsonl

ROOT = Path(__file__).parent.parent
VECTORS = np.load(ROOT / "tests" / "reference_vectors" / "sdpo_vectors.npz")
RESULTS = ROOT / "benchmarks" / "results" / "experiments" / "dense_rewards.jsonl"


def vector(name):
    return torch.from_numpy(VECTORS[name])


def latents(B, T, seed=0, common=1.0):
    "Random walks around a common mean, so that neighbouring steps are alike"
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, 4, 4, 4, generator=generator).cumsum(1) / T**0.5 + common


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert ((actual - expected).abs() <= tolerance * expected.abs().clamp(min=1)).all()


# --- the reference implementation's numbers


@pytest.mark.parametrize("num_steps", [3, 4, 8, 16, 50])
def test_reference_vectors(num_steps):
    pred_x0, rewards, anchor = (vector(f"dense/T{num_steps}/{key}") for key in ("pred_x0", "rewards3", "anchor"))
    assert torch.equal(select_anchor(pred_x0, among="all"), anchor)
    for actual, key in zip(latent_similarities(pred_x0, anchor), ("sim_first", "sim_anchor", "sim_last")):
        close(actual, vector(f"dense/T{num_steps}/{key}"), 1e-5)
    close(interpolate_rewards(pred_x0, anchor, rewards), vector(f"dense/T{num_steps}/dense"), 1e-5)


# --- the formulas as plain loops


def cosine(a, b):
    a, b = a.flatten().double(), b.flatten().double()
    return (a @ b / (a.norm() * b.norm())).item()


@pytest.mark.parametrize("among,steps", [("interior", range(1, 6)), ("all", range(7))])
def test_anchor_and_interpolation_by_hand(among, steps):
    steps, num_steps, last = ([*steps] if among == "all" else [*range(1, 6)]), 7, 6
    pred_x0, rewards = latents(5, num_steps), torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    anchor = select_anchor(pred_x0, among)
    dense = interpolate_rewards(pred_x0, anchor, rewards)
    for x, k, r, d in zip(pred_x0, anchor.tolist(), rewards.tolist(), dense.tolist()):
        assert k == min(steps, key=lambda i: cosine(x[i], x[0]) + cosine(x[i], x[last]))
        weights = [[cosine(x[i], x[j]) for j in (0, k, last)] for i in range(num_steps)]
        expected = [sum(w * q for w, q in zip(row, r)) / sum(row) for row in weights]
        expected[0], expected[last] = r[0], r[2]
        expected[k] = r[1]
        assert all(math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-5) for a, b in zip(d, expected))


def test_interior_anchor_is_never_an_end_and_all_may_be():
    middle = torch.full((1, 5, 1, 1, 2), 1.0)
    middle[:, 0, ..., 1], middle[:, -1, ..., 1] = -1.0, 3.0  # the ends are the least alike
    assert select_anchor(middle, "all").item() in (0, 4)
    assert 0 < select_anchor(middle).item() < 4
    assert ((select_anchor(latents(200, 4)) > 0) & (select_anchor(latents(200, 4)) < 3)).all()


def test_anchor_wins_where_it_coincides_with_an_end():
    pred_x0, rewards = latents(2, 4), torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    dense = interpolate_rewards(pred_x0, torch.tensor([0, 3]), rewards)
    assert dense[0, [0, 3]].tolist() == [2.0, 3.0] and dense[1, [0, 3]].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("queries", [3, 5, "all", "terminal"])
@pytest.mark.parametrize("among", ["interior", "all", "random"])
def test_short_trajectories(queries, among):
    for num_steps in (1, 2):
        pred_x0, true = latents(3, num_steps), torch.randn(3, num_steps, generator=torch.Generator().manual_seed(0))
        assert select_anchor(pred_x0, among).tolist() == [num_steps - 1] * 3
        anchor = select_anchor(pred_x0, among)
        assert torch.equal(interpolate_rewards(pred_x0, anchor, true[:, [0, num_steps - 1, num_steps - 1]]), true)
        if queries == "terminal":
            continue
        indices = query_indices(pred_x0, queries, among)
        assert indices.tolist() == [[*range(num_steps)]] * 3  # nothing is decoded twice
        assert torch.equal(spread_rewards(pred_x0, indices, true.gather(1, indices)), true)


@pytest.mark.parametrize(
    "num_steps,queries,among", [*itertools.product((3, 4, 5, 6, 12), (3, 5), ("interior", "random"))]
)
def test_queries_are_distinct_and_ordered_first_anchors_last(num_steps, queries, among):
    indices = query_indices(latents(20, num_steps), queries, among)
    assert indices.shape == (20, min(queries, num_steps)) and indices.dtype == torch.int64
    assert (indices[:, 0] == 0).all() and (indices[:, -1] == num_steps - 1).all()
    assert all(len(set(row)) == len(row) for row in indices.tolist())


def test_five_queries_are_greedy():
    pred_x0 = latents(4, 12)
    for x, row in zip(pred_x0, query_indices(pred_x0, 5).tolist()):
        chosen = [0, 11]
        for k in row[1:-1]:
            rest = [i for i in range(1, 11) if i not in chosen]
            assert k == min(rest, key=lambda i: sum(cosine(x[i], x[j]) for j in chosen))
            chosen.append(k)


def test_five_queries_are_weighted_by_similarity():
    pred_x0 = latents(3, 9)
    indices, rewards = query_indices(pred_x0, 5), torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    dense = spread_rewards(pred_x0, indices, rewards)
    for b, i in itertools.product(range(3), range(9)):
        queried = indices[b].tolist()
        weights = [cosine(pred_x0[b, i], pred_x0[b, j]) for j in queried]
        expected = (
            rewards[b, queried.index(i)].item()
            if i in queried
            else sum(w * r.item() for w, r in zip(weights, rewards[b])) / sum(weights)
        )
        assert math.isclose(dense[b, i], expected, rel_tol=1e-4, abs_tol=1e-5)


def test_random_anchors_follow_their_generator():
    pred_x0 = latents(300, 8)
    draw = lambda seed: select_anchor(pred_x0, "random", torch.Generator().manual_seed(seed))
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    counts = draw(0).bincount(minlength=8)
    assert counts[0] == counts[7] == 0 and (counts[1:7] > 25).all()


def test_equal_rewards_stay_equal_and_scale_of_latents_is_irrelevant():
    pred_x0 = latents(3, 8)
    anchor = select_anchor(pred_x0)
    close(interpolate_rewards(pred_x0, anchor, torch.full((3, 3), 5.0)), torch.full((3, 8), 5.0), 1e-6)
    rewards = torch.randn(3, 3)
    assert torch.equal(select_anchor(pred_x0 * 7), anchor)
    close(interpolate_rewards(pred_x0 * 7, anchor, rewards), interpolate_rewards(pred_x0, anchor, rewards), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_latents_are_compared_in_float32(dtype):
    pred_x0, rewards = latents(4, 8).to(dtype), torch.randn(4, 3)
    anchor = select_anchor(pred_x0.float())
    assert torch.equal(select_anchor(pred_x0), anchor)
    dense = interpolate_rewards(pred_x0, anchor, rewards)
    assert dense.dtype == torch.float32 and torch.equal(dense, interpolate_rewards(pred_x0.float(), anchor, rewards))


# --- other ways to fill the gaps


def test_lines_in_time_are_those_of_numpy():
    generator = torch.Generator().manual_seed(0)
    for num_steps, queries in itertools.product((4, 9, 25), (1, 2, 3, 4)):
        indices = torch.stack(
            [torch.randperm(num_steps, generator=generator)[:queries] for _ in range(20)]
        )  # in any order
        rewards = torch.randn(20, queries, generator=generator)
        weights = time_weights(indices, num_steps)
        close(weights.sum(1), torch.ones(20, num_steps), 1e-6)
        for at, known, found in zip(indices, rewards, weighted_rewards(weights, indices, rewards)):
            order = at.argsort()
            assert np.allclose(found, np.interp(range(num_steps), at[order], known[order]), atol=1e-5)


def test_lines_in_time_with_a_query_made_twice():
    indices, rewards = torch.tensor([[0, 0, 4], [0, 4, 4]]), torch.tensor([[1.0, 1.0, 5.0], [1.0, 5.0, 5.0]])
    close(weighted_rewards(time_weights(indices, 5), indices, rewards), torch.tensor([[1.0, 2, 3, 4, 5]] * 2), 1e-6)


def test_nearest_queries_by_hand():
    pred_x0 = latents(6, 8)
    indices, rewards = query_indices(pred_x0), torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    found = weighted_rewards(nearest_weights(step_similarities(pred_x0, indices)), indices, rewards)
    for x, at, known, given in zip(pred_x0, indices.tolist(), rewards, found):
        for i in range(8):
            assert (
                given[i]
                == known[max(range(3), key=lambda q: cosine(x[i], x[at[q]]) if i not in at else float(i == at[q]))]
            )


def test_weights_are_relative_and_queried_rewards_are_kept():
    indices, rewards = torch.tensor([[0, 2, 5]]), torch.tensor([[1.0, -1.0, 3.0]])
    weights = torch.rand(1, 3, 6, generator=torch.Generator().manual_seed(0))
    close(weighted_rewards(7 * weights, indices, rewards), weighted_rewards(weights, indices, rewards), 1e-6)
    assert torch.equal(weighted_rewards(weights, indices, rewards).gather(1, indices), rewards)


def test_rank_correlation_by_hand():
    def ranks(values):
        return [
            sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2
            for value in values
        ]

    x, y = (
        torch.randint(0, 6, (5, 9), generator=torch.Generator().manual_seed(seed)).float() for seed in (0, 1)
    )  # with ties
    for row, (a, b) in enumerate(zip(x.tolist(), y.tolist())):
        assert math.isclose(rank_correlation(x, y)[row], np.corrcoef(ranks(a), ranks(b))[0, 1], abs_tol=1e-12)
    close(rank_correlation(x.exp(), y), rank_correlation(x, y), 1e-12)
    close(rank_correlation(-x, y), -rank_correlation(x, y), 1e-12)
    assert rank_correlation(torch.zeros(4), torch.randn(4)).isnan()


# --- the experiment


@pytest.fixture(scope="module")
def experiment():
    spec = importlib.util.spec_from_file_location("dense_rewards", ROOT / "benchmarks" / "dense_rewards.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_experiment_fills_gaps_with_the_packages_rules(experiment):
    pred_x0, true = latents(12, 10), torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
    anchor = select_anchor(pred_x0)
    three = torch.stack([0 * anchor, anchor, 0 * anchor + 9], 1)
    for where, how in ((w, h) for w, ways in experiment.rules.items() for h in ways):
        indices = experiment.queried_steps(where, pred_x0)
        found = experiment.fill(how, pred_x0, indices, true)
        assert found.isfinite().all() and torch.equal(found.gather(1, indices), true.gather(1, indices))
    assert torch.equal(experiment.queried_steps("interior", pred_x0), three)
    assert torch.equal(
        experiment.fill("similarity", pred_x0, three, true), interpolate_rewards(pred_x0, anchor, true.gather(1, three))
    )
    assert torch.equal(
        experiment.fill("time", pred_x0, experiment.queried_steps("last", pred_x0), true), true[:, -1:].expand(-1, 10)
    )


def test_experiment_knows_a_perfect_a_reversed_and_an_empty_prediction(experiment):
    true = torch.randn(2, 2 * experiment.pairs_per_prompt, 6, generator=torch.Generator().manual_seed(0))
    true[1, :, 0] = true[0, :, 0]  # a pair shares its first prediction
    perfect, reversed_, empty = (
        experiment.compare(predicted, true) for predicted in (true, -true, torch.zeros_like(true))
    )
    assert perfect["error"] == [0] * 6 and perfect["error_centred"] == [0] * 6
    for kind in ("rank", "rank_prompt"):
        assert perfect[kind] == [1] * 6 and reversed_[kind] == [-1] * 6 and empty[kind] == [0] * 6
    assert (
        perfect["rank_pair"][1:] == [1] * 5
        and reversed_["rank_pair"][1:] == [-1] * 5
        and math.isnan(perfect["rank_pair"][0])
    )
    assert perfect["return_prompt"] == perfect["return_pair"] == 1
    shifted = experiment.compare(true + torch.arange(6), true)
    assert max(shifted["error_centred"]) < 1e-5 and shifted["error"][3] == 3 and shifted["rank_prompt"] == [1] * 6


def test_experiment_goes_on_where_it_stopped(experiment, tmp_path, monkeypatch):
    ran = []

    def run(kind, seed, num_steps):
        ran.append((kind, seed, num_steps))
        return {"policy": kind, "seed": seed, "num_steps": num_steps}

    monkeypatch.setattr(experiment, "results", tmp_path / "dense_rewards.jsonl")
    monkeypatch.setattr(experiment, "run", run)
    monkeypatch.setattr("sys.argv", ["dense_rewards.py", "--seeds", "1", "2", "--cases", "shipped,10", "trained,10"])
    write_jsonl(experiment.results, [run("shipped", 2, 10)])
    experiment.main()
    experiment.main()
    assert ran == [("shipped", 2, 10), ("shipped", 1, 10), ("trained", 1, 10), ("trained", 2, 10)]


def test_committed_results_are_of_this_experiment(experiment):
    records = read_jsonl(RESULTS)
    for case in (("shipped", 10), ("shipped", 25), ("trained", 10)):
        assert len({line["seed"] for line in records if (line["policy"], line["num_steps"]) == case}) >= 5
    for line in records:
        assert tuple(line["rewards"]) == experiment.rewards and line["versions"] and line["machine"] and line["config"]
        for found in line["rewards"].values():
            assert {where: tuple(ways) for where, ways in found["predicted"].items()} == experiment.rules
            assert all(
                len(numbers["error"]) == line["num_steps"]
                for ways in found["predicted"].values()
                for numbers in ways.values()
            )
            for where, ways in found["predicted"].items():  # what was queried at the ends is exact
                for numbers in ways.values():
                    assert numbers["error"][-1] == 0 and (where == "last" or numbers["error"][0] == 0)


# --- what is refused, and how


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: select_anchor(latents(2, 5), "some"), "among is 'some'"),
        (lambda: select_anchor(torch.zeros(3, 4)), r"pred_x0 has shape \[3, 4\]"),
        (lambda: query_indices(latents(2, 5), 4), "queries is 4"),
        (
            lambda: interpolate_rewards(latents(2, 5), torch.tensor([1, 2]), torch.zeros(2, 2)),
            r"rewards has shape \[2, 2\]",
        ),
        (lambda: interpolate_rewards(latents(2, 5), torch.tensor([1]), torch.zeros(2, 3)), r"anchor has shape \[1\]"),
        (lambda: rank_correlation(torch.zeros(3), torch.zeros(2)), r"x has shape \[3\] and y \[2\]"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_similarities_that_cancel_do_not_explode():
    "A sum of cosines near 0 as a divisor: the plain mean of the rewards stands in, and nothing is infinite or NaN"
    weights = torch.tensor([[[1.0, 0.5, 0.2], [0.1, -0.5, 0.3], [0.2, 0.0, 1.0]]])
    dense = weighted_rewards(weights, torch.tensor([[0, 2, 2]]), torch.tensor([[1.0, 2.0, 6.0]]))
    assert dense[0, 1] == 3 and dense.isfinite().all()
