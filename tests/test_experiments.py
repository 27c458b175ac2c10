"""The experiments' bookkeeping, and the committed runs that the chapters draw.

They are complete, of the settings they claim, on seeds never used for tuning."""

import json
from dataclasses import asdict
from pathlib import Path

import experiments
import pytest
import torch

from sdpo_nb.config import resolve
from sdpo_nb.models import load_policy

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
    "frontier_search",
    "frontier",
    "switches",
]  # what the chapters draw as complete; a missing file counts as missing runs


def line(run, gain):
    "A run whose gain is known"

    def record(samples, mean):
        shares = {"agreement": [1.0, 1.0], "diversity": [0.2, 0.2], "reward_queries": samples}
        record = {"prompts": "trained", "epoch": int(bool(samples)), "samples": samples, "steps": [1, 4]}
        return {**record, "mean": [mean, mean], **shares}

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


def ladder(name="SDPO, T=2"):
    runs = experiments.frontier_search_runs(name, experiments.quality)
    return [(run.config.learning_rate, run.config.pairs_per_update) for run in runs]


@pytest.mark.parametrize("gains, last", [((0.1, 0.2), (3e-3, 4)), ((0.2, 0.1), (1e-3, 16))], ids=["faster", "slower"])
def test_the_search_of_the_frontier_tries_the_neighbours_of_the_better_of_two(results, gains, last):
    assert ladder() == [(3e-3, 16), (3e-3, 8)]
    for run, gain in zip(experiments.frontier_search_runs("SDPO, T=2", experiments.quality), gains):
        note(results, run, gain)
    assert ladder() == [(3e-3, 16), (3e-3, 8), (1e-3, 4), last, (1e-3, 2), (5e-4, 2)]
    with pytest.raises(SystemExit, match="DDPO, T=2 has not been searched"):
        experiments.frontier_searched("DDPO, T=2")
    note(results, experiments.frontier_search_runs("SDPO, T=2", experiments.quality)[3], 0.9)
    assert experiments.frontier_searched("SDPO, T=2") == dict(zip(("learning_rate", "pairs_per_update"), last))


@pytest.mark.parametrize("name", experiments.frontier_methods)
def test_no_run_of_the_frontier_asks_more_than_all_may(name):
    config = experiments.resolve(experiments.frontier_run("frontier", name, 11, experiments.quality).config)
    dearest, mean = experiments.queries_of(config), experiments.queries_of(config, experiments.mean)
    assert experiments.frontier_queries - dearest < config.epochs * mean <= experiments.frontier_queries + mean
    assert (config.epochs * dearest <= experiments.frontier_queries) == (dearest == mean)  # else a callback ends it
    assert [entry[0] for entry in experiments.along(config)][-1] == config.epochs


def test_a_line_is_copied_only_between_groups_that_measure_alike(results):
    one = experiments.frontier_run("frontier", "SDPO, T=10", 1, experiments.quality)
    note(results, experiments.Run("steps", "T=10", one.config))
    assert experiments.copy_lines([one]) == [one] and not experiments.lines("frontier")
    note(results, experiments.Run("frontier_search", "SDPO, T=10", one.config))
    assert experiments.copy_lines([one]) == [] and experiments.lines("frontier")[0]["group"] == "frontier"


def test_switches_are_runs_of_their_own(results):
    note(results, experiments.frontier_search_runs(experiments.switched, experiments.quality)[0], 0.9)
    runs = experiments.switches([])
    assert len({(run.name, run.key) for run in runs}) == len(runs) == 4
    (far,) = [run for run in runs if run.bound]
    assert far.bound == experiments.trainer_class(far).bound == 1e-5
    note(results, experiments.Run("switches", "another bound", far.config, 1e-6))
    assert far in experiments.copy_lines([far]) and experiments.missing([far]) == [far]


def test_which_pictures_agree_is_kept_as_digits():
    assert experiments.bits(torch.tensor([True, False, True, True, False, False])) == "2c"
    assert experiments.bits(torch.tensor([False] * 7 + [True])) == "01"


def test_an_adapter_is_merged_for_measuring_and_nothing_stays_of_it():
    policy = load_policy("tiny")
    policy.prepare_training(2, None, seed=0)
    generator = torch.Generator().manual_seed(0)
    for weights in policy.trainable_parameters().values():
        weights.data.normal_(std=0.1, generator=generator)
    before = {name: value.clone() for name, value in policy.denoiser.state_dict().items()}
    latents, embedding = torch.randn(2, 4, 8, 8, generator=generator), policy.embed(["a circle"] * 2)
    with torch.no_grad():
        expected = policy.predict(latents, 999, embedding)
        with experiments.merged(policy):
            assert torch.allclose(policy.predict(latents, 999, embedding), expected, atol=1e-4)
        assert torch.equal(policy.predict(latents, 999, embedding), expected)
    after = policy.denoiser.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_a_run_of_the_frontier_is_measured_on_its_way_and_ends_where_it_lost_much(monkeypatch):
    monkeypatch.setattr(experiments, "search_pairs", {4: (1, 2)})
    run = experiments.frontier_run("frontier_search", "SDPO, T=2", experiments.search_seed, experiments.quality)
    short = experiments.replace(run.config, epochs=3, checkpoint_every=3)
    whole = experiments.execute(experiments.Run("frontier_search", "SDPO, T=2", short))
    assert [(e["epoch"], e["network_calls"]) for e in whole["evaluations"]] == [(0, 0), (1, 96), (2, 192), (3, 288)]
    monkeypatch.setattr(experiments, "lost_enough", -1.0)
    ended = experiments.execute(experiments.Run("frontier_search", "SDPO, T=2", short))
    assert len(ended["metrics"]) == 1 and str(ended["evaluations"]) == str(whole["evaluations"][:2])  # some NaN


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
        assert (run["seed"] == experiments.search_seed) == ("search" in path.stem)  # no reported seed was tuned on
        whole = [line["epoch"] for line in run["metrics"]] == [*range(1, run["config"]["epochs"] + 1)]
        assert whole or experiments.along_frontier(path.stem)  # which end early
        assert run["metrics"][-1]["epoch"] == max(record["epoch"] for record in run["evaluations"])
        for record in run["evaluations"]:
            assert {"samples", "reward_queries", "optimizer_steps", "steps", "mean", "std", "n"} <= set(record) and len(
                record["mean"]
            ) == len(record["steps"])
