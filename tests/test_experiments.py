"""The experiments' bookkeeping, and the committed runs that the chapters draw.

They are complete, of the settings they claim, on seeds never used for tuning."""

import json
from dataclasses import asdict
from pathlib import Path

import experiments
import pytest

from sdpo_nb.config import resolve

script = Path(experiments.__file__)
complete = [
    "search",
    "order",
    "normalizers",
    "main",
    "factors",
    "spo",
    "queries",
    "ablations",
    "steps",
    "few_steps",
]  # what the chapters draw as complete; a missing file counts as missing runs


def line(run, gain):
    "A run whose gain is known"

    def record(samples, mean):
        return {"prompts": "trained", "epoch": bool(samples), "samples": samples, "steps": [1, 4], "mean": [mean, mean]}

    config = asdict(resolve(run.config)) | {"output_dir": None}
    return json.loads(
        json.dumps(
            {
                "group": run.group,
                "name": run.name,
                "reward": config["reward"],
                "seed": config["seed"],
                "config": config,
                "evaluations": [record(0, 1.0), record(32, 1.0 + gain)],
            }
        )
    )


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "results", tmp_path)
    return tmp_path


def note(results, run, gain=0.0):
    with open(results / f"{run.group}.jsonl", "a") as file:
        file.write(json.dumps(line(run, gain)) + "\n")


def tried(name):
    return [
        (run.config.learning_rate, run.config.clip_range) for run in experiments.search_runs(name, experiments.quality)
    ]


def test_search_tries_clips_at_the_best_learning_rate(results):
    assert tried("SDPO") == [(3e-4, None), (1e-3, None), (3e-3, None), (1e-2, None)]
    for run, gain in zip(experiments.search_runs("SDPO", experiments.quality), (0.1, 0.4, 0.3, 0.2)):
        note(results, run, gain)
    assert tried("SDPO")[4:] == [(1e-3, 1e-3), (1e-3, 2e-2)]
    note(results, experiments.search_runs("SDPO", experiments.quality)[4], 0.9)
    assert experiments.searched("SDPO") == {"learning_rate": 1e-3, "clip_range": 1e-3}


def test_search_goes_beyond_the_edge_and_never_tries_more_than_six(results):
    for run, gain in zip(experiments.search_runs("SDPO", experiments.quality), (0.1, 0.2, 0.3, 0.4)):
        note(results, run, gain)
    assert tried("SDPO")[4:] == [(3e-2, None)]
    note(results, experiments.search_runs("SDPO", experiments.quality)[4], 0.5)
    assert tried("SDPO")[4:] == [(3e-2, None), (3e-2, 1e-3)]


@pytest.mark.parametrize("name", experiments.methods)
def test_every_method_gets_the_same_number_of_settings_at_most(results, name):
    for gain in range(8):
        for run in experiments.missing(experiments.search_runs(name, experiments.quality)):
            note(results, run, gain)
    assert 4 <= len(experiments.lines("search")) <= 6 and not experiments.missing(
        experiments.search_runs(name, experiments.quality)
    )


def test_unsearched_methods_are_named(results):
    with pytest.raises(SystemExit, match="DDPO has not been searched"):
        experiments.searched("DDPO")


def test_each_reward_has_a_search_of_its_own(results):
    for reward, gains in ((experiments.quality, (0.1, 0.4, 0.3, 0.2)), (experiments.alignment, (0.4, 0.3, 0.2, 0.1))):
        for run, gain in zip(experiments.search_runs("SDPO", reward), gains):
            note(results, run, gain)
    assert experiments.searched("SDPO")["learning_rate"] == 1e-3
    assert experiments.searched("SDPO", experiments.alignment)["learning_rate"] == 3e-4


def test_a_run_of_another_group_is_copied_and_not_repeated(results):
    one = experiments.make_run("main", "SDPO", "SDPO", 1)
    same, other = (
        experiments.make_run("order", "shuffled", "SDPO", 1),
        experiments.make_run("order", "shuffled", "SDPO", 2),
    )
    note(results, one, 0.5)
    assert experiments.copy_lines([same, other]) == [other]
    (copied,) = experiments.lines("order")
    assert (copied["group"], copied["name"]) == ("order", "shuffled") and experiments.final_gain(
        copied
    ) == pytest.approx(0.5)
    assert experiments.missing([same, other]) == [other]


def test_settings_decide_what_a_run_is():
    def key(**changes):
        return experiments.make_run("a", "b", "SDPO", 1, **changes).key

    assert key() == experiments.make_run("c", "d", "SDPO", 1).key == key(output_dir="elsewhere")
    assert len({key(), key(learning_rate=1e-3), key(reward="shapes_alignment"), key(normalizer="batch")}) == 4


def test_a_run_is_known_under_the_names_of_its_time():
    "Settings that were renamed, that got a default, an alias, or that the method never obeyed"
    now = experiments.make_run("few_steps", "LaSRO", "LaSRO, 2 steps", 1)
    then = asdict(resolve(now.config))
    then |= {"anchor_weight": then.pop("reference_penalty"), "pairs_per_update": then.pop("surrogate_batch")}
    then |= {"log_scale": 1.0, "clip_range": 5e-3, "credit": "causal"}
    assert experiments.key_of(then) == now.key != experiments.key_of({**then, "anchor_weight": 0.0})
    now = experiments.make_run("main", "SDPO", "SDPO", 1)
    then = {**asdict(resolve(now.config)), "credit": "paper", "log_scale": 1.0}
    del then["reward_device"]
    assert experiments.key_of(then) == now.key != experiments.key_of({**then, "credit": "causal"})


def test_numbers_are_shortened_and_nothing_else():
    assert experiments.shorten({"a": [1.23456789, 7, "x", None]}) == {"a": [1.23457, 7, "x", None]}


def test_an_unknown_group_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [script.name, "mian"])
    with pytest.raises(SystemExit) as stopped:
        experiments.main()
    assert stopped.value.code == 2 and "GROUP is 'mian'" in capsys.readouterr().err


def test_missing_runs_make_the_check_fail(results):
    for name in experiments.methods:
        note(results, experiments.make_run("search", name, name, experiments.search_seed))
    assert "order lacks shuffled (shapes_aesthetic, seed 1)" in experiments.check(["order"], [1])
    for run in experiments.groups["order"]([1]):
        note(results, run)
    assert experiments.check(["order"], [1]) is None


@pytest.mark.parametrize("name", complete)
def test_what_the_chapters_draw_is_complete(name):
    assert experiments.check([name], [1, 2, 3, 4, 5]) is None


@pytest.mark.parametrize("path", sorted(experiments.results.glob("*.jsonl")), ids=lambda path: path.stem)
def test_committed_runs_say_what_they_are(path):
    if path.stem not in experiments.groups:
        pytest.skip("made by a script of its own")
    for run in experiments.lines(path.stem):
        assert run["group"] == path.stem and {
            "recipe",
            "reward",
            "seed",
            "config",
            "versions",
            "machine",
            "evaluations",
            "metrics",
        } <= set(run)
        assert (run["seed"] == experiments.search_seed) == (path.stem == "search")  # no reported seed was tuned on
        assert len(run["metrics"]) == run["config"]["epochs"] and run["metrics"][-1]["epoch"] == run["config"]["epochs"]
        for record in run["evaluations"]:
            assert {"samples", "reward_queries", "optimizer_steps", "steps", "mean", "std", "n"} <= set(record) and len(
                record["mean"]
            ) == len(record["steps"])
