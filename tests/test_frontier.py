"""A path says what was measured, its number is what the definition says, and what cannot be is refused."""

import math
from copy import deepcopy

import pytest
import torch

from sdpo_nb.frontier import FrontierPath, costs, frontier_figure, frontier_over_seeds, frontier_path, gain_at_loss


def run(gains, losses, name="a", seed=1, steps=(1, 4), **extra):
    "A line of an experiment: gain and change of agreement at each time, the same at all step counts but the last"
    records = []
    for time, (gain, loss) in enumerate(zip((0.0, *gains), (0.0, *losses))):
        agreement = [0.9 + loss] * (len(steps) - 1) + [0.9 + 2 * loss]
        cost = {k: 10 * time for k in ("samples", "reward_queries", "optimizer_steps", "network_calls")}
        rows = dict(
            steps=list(steps), mean=[4.0 + gain] * len(steps), agreement=agreement, diversity=[0.2] * len(steps)
        )
        records.append({"prompts": "trained", "epoch": time, **cost, **rows, **extra})
    return {"name": name, "seed": seed, "evaluations": records}


def test_records_of_one_time_are_joined_and_step_counts_measured_only_once_are_left_out():
    line = run([1.0], [-0.01])
    more = [
        {**record, "steps": [16], "mean": [7.0 + i], "agreement": [1.0], "diversity": [0.1]}
        for i, record in enumerate(deepcopy(line["evaluations"]))
    ]
    line["evaluations"] += [*more, {**more[-1], "steps": [50]}, {**more[-1], "prompts": "unseen", "epoch": 9}]
    path = frontier_path(line)
    assert path.steps == [1, 4, 16] and path.gain.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert frontier_path(line, steps=[16]).gain.tolist() == [[0], [1]]
    assert path.cost["reward_queries"].tolist() == [0, 10]
    with pytest.raises(ValueError, match="steps names 50"):
        frontier_path(line, steps=[1, 50])


def test_a_reward_that_was_only_watched_has_a_path_too():
    line = run([1.0], [0.0], other_rewards={"warmth": [0.5, 0.7]})
    line["evaluations"][1]["other_rewards"] = {"warmth": [1.5, 0.9]}
    assert frontier_path(line, value="warmth").gain[1].tolist() == pytest.approx([1.0, 0.2])
    with pytest.raises(ValueError, match="lacks coldness"):
        frontier_path(line, value="coldness")


def test_a_cost_that_older_runs_did_not_count_is_unknown():
    line = run([1.0], [0.0])
    for record in line["evaluations"]:
        del record["network_calls"]
    assert math.isnan(gain_at_loss(frontier_path(line)).cost["network_calls"])


def test_the_number_is_interpolated_where_the_agreement_is_lost():
    path = frontier_path(run([1.0, 2.0], [0.0, -0.04]))  # mean over step counts: 0, -0.06
    point = gain_at_loss(path)
    assert point.crossed and point.place == pytest.approx(1.5)
    assert point.gain.tolist() == pytest.approx([1.5, 1.5]) and point.cost["reward_queries"] == pytest.approx(15)
    assert point.agreement.tolist() == pytest.approx([-0.02, -0.04])
    strict = gain_at_loss(path, by="worst")
    assert strict.place == pytest.approx(1.375) and strict.agreement.min() == pytest.approx(-0.03)


def test_the_best_of_an_earlier_time_counts_and_what_came_after_the_crossing_does_not():
    assert gain_at_loss(frontier_path(run([2.0, 0.5], [0.0, -0.04]))).gain.mean() == pytest.approx(2.0)
    recovered = frontier_path(run([1.0, 3.0], [-0.04, 0.0]))
    assert gain_at_loss(recovered).gain.mean() == pytest.approx(0.5)


def test_a_run_that_loses_nothing_counts_with_its_best_evaluation():
    point = gain_at_loss(frontier_path(run([1.0, 1.4], [0.0, -0.01])))
    assert not point.crossed and point.gain.mean() == pytest.approx(1.4)
    assert gain_at_loss(frontier_path(run([-1.0], [-0.2]))).gain.mean() == 0  # it was best not to begin


def test_seeds_are_interpolated_one_by_one():
    runs = [run([1.0, 2.0], [0.0, -0.04]), run([2.0], [0.0], seed=2)]
    found = frontier_over_seeds(runs)
    assert found["each"].tolist() == pytest.approx([1.5, 2.0]) and found["mean"] == pytest.approx(1.75)
    assert found["half_width"] == pytest.approx(12.706 * 0.25) and found["crossed"] == 1
    assert found["reward_queries"] == pytest.approx(12.5) and found["seeds"] == [1, 2]
    assert math.isnan(frontier_over_seeds(runs[:1])["half_width"])


@pytest.mark.parametrize(
    "runs",
    [
        [],
        [run([1], [0]), run([1], [0])],
        [run([1], [0]), run([1], [0], name="b", seed=2)],
        [run([1], [0]), run([1], [0], seed=2, steps=(1, 2))],
    ],
    ids=["none", "a seed twice", "two settings", "other step counts"],
)
def test_runs_that_do_not_belong_together_are_refused(runs):
    with pytest.raises(ValueError, match="runs"):
        frontier_over_seeds(runs)


def test_what_was_not_measured_is_named():
    only = run([], [])
    with pytest.raises(ValueError, match=r"after the epochs \[0\]"):
        frontier_path(only)
    with pytest.raises(ValueError, match="agreement is unknown"):
        frontier_path(run([1.0], [0.0], agreement=[None, None]))
    with pytest.raises(ValueError, match="lacks mean"):
        frontier_path(run([1.0], [0.0], mean=None))
    with pytest.raises(ValueError, match="lost is 3"):
        gain_at_loss(frontier_path(run([1.0], [0.0])), 3)
    with pytest.raises(ValueError, match="settings hold no runs"):
        frontier_figure({"SDPO": []})


def test_the_figure_has_a_line_for_each_seed_and_one_for_their_mean():
    runs = [run([1.0, 2.0], [0.0, -0.04]), run([2.0], [0.0], seed=2)]
    nothing = FrontierPath("by hand", 1, [1, 4], *torch.zeros(3, 2, 2), dict.fromkeys(costs, torch.zeros(2)))
    axis = frontier_figure({"some": runs, "by hand": [nothing]}, steps=4)
    lines = [line for line in axis.axes[0].lines if len(line.get_xdata()) > 1]
    assert [len(line.get_xdata()) for line in lines][:3] == [3, 2, 2]
    assert axis.axes[0].get_ylabel() == "gain, 4 steps"
