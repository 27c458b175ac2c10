"""The bookkeeping of the race to a gain: what counts as arrived, which rate is chosen, what is not run again."""

import json

import pytest
import time_to_gain as race
import torch
from trl_ddpo import Calls


@pytest.fixture
def given(tmp_path):
    return race.arguments(["--methods", "ddpo", "trl", "--seeds", "1", "--output", str(tmp_path / "runs.jsonl")])


def trained(monkeypatch, outcome):
    "Runs are replaced by what `outcome` says of a job: seconds, or None where it does not arrive"
    made = []

    def measure(job, given, before):
        made.append(job)
        seconds = outcome(job)
        at_end = [1.2] * 6 if seconds is not None else [job.rate, 0.5, 0.6, 0.7, 0.8]
        found = dict(reached=seconds is not None, cpu_seconds=seconds or job.budget + 1, at_end=at_end, curve=[])
        return dict(found, network_samples=10, epoch=3, samples=96, reward_queries=96, optimizer_steps=6)

    monkeypatch.setattr(race, "measure", measure)
    return made


before = {number: torch.tensor([4.0, 5.0, 6.0]) for number in race.steps}


def test_a_gain_counts_once_every_step_count_has_it():
    rewards = {number: before[number] + (0.9 if number == 8 else 1.1) for number in race.steps}
    asked = []

    def look(number):
        asked.append(number)
        return rewards[number][None]

    table = {number: row[None] for number, row in before.items()}
    assert race.gains(look, table, race.steps) == pytest.approx([1.1, 1.1, 1.1, 0.9]) and asked == [1, 2, 4, 8]
    assert len(race.gains(look, table, race.steps, until_short=False)) == 6


def test_the_best_rate_arrives_first_or_comes_furthest(monkeypatch, given):
    seconds = {3e-3: 30.0, 1e-2: 20.0, 3e-2: None}
    made = trained(monkeypatch, lambda job: seconds[job.rate])
    assert race.searched("ddpo", given, before) == 1e-2
    assert [job.budget for job in made] == [45, 30, 20]  # nobody trains longer than the best before
    assert {job.seed for job in made} == {race.search_seed}
    trained(monkeypatch, lambda job: None)
    assert race.searched("trl", given, before) == 3e-2  # the smallest of its gains is the largest


def test_methods_alternate_and_nothing_is_run_twice(monkeypatch, given):
    made = trained(monkeypatch, lambda job: 5.0)
    given.seeds = [1, 2]
    found = race.race(given, before)
    order = [(job.method, job.seed) for job in made if job.phase == "report"]
    assert order == [("ddpo", 1), ("trl", 1), ("ddpo", 2), ("trl", 2)]
    made.clear()
    assert race.race(given, before) == found and not made
    assert "5.0, 5.0" in race.table(race.committed(given))


def test_a_larger_budget_repeats_what_had_not_arrived(monkeypatch, given):
    made = trained(monkeypatch, lambda job: None)
    job = race.Job("ddpo", 1, 1e-2, 10.0, "report")
    race.execute(job, given, before), race.execute(job, given, before)
    assert len(made) == 1 and "> 10" in race.table(race.committed(given))
    race.execute(race.Job("ddpo", 1, 1e-2, 20.0, "report"), given, before)
    assert len(made) == 2
    assert {"recipe", "reward", "seed", "config", "versions", "evaluations"} <= set(race.read_jsonl(given.output)[0])


def test_lines_of_other_settings_are_not_shown(monkeypatch, given):
    "But those of an older version are, which did not know all of today's settings"
    trained(monkeypatch, lambda job: 5.0)
    line = race.execute(race.Job("ddpo", 1, 1e-2, 10.0, "report"), given, before)
    for change, shown in ((dict(kl_coefficient=0.7), False), ({}, True)):
        config = {**line["config"], **change}
        del config["sampling_batch"]
        given.output.write_text(json.dumps({**line, "config": config}) + "\n")
        assert bool(race.committed(given)["ddpo"]) == shown


def test_without_trls_environment_the_others_are_measured(monkeypatch, given):
    def measure(job, given, before):
        if job.method == "trl":
            raise race.NotMeasured("no network")
        return dict(reached=True, cpu_seconds=1.0, at_end=[1.2] * 6, network_samples=1)

    monkeypatch.setattr(race, "measure", measure)
    found = race.race(given, before)
    assert found["trl"] == "no network" and found["ddpo"][0]["reached"]
    assert "not measured: no network" in race.table(race.committed(given))


def test_an_environment_that_pip_cannot_make_is_named(monkeypatch, tmp_path):
    class Failed:
        returncode, stderr = 1, "looking\nERROR: no such package"

    monkeypatch.setattr(race.subprocess, "run", lambda *_, **__: Failed)
    with pytest.raises(race.NotMeasured, match="cannot be made: ERROR: no such package"):
        race.environment(tmp_path)


def test_the_seed_of_the_search_is_not_reported(capsys):
    with pytest.raises(SystemExit):
        race.arguments(["--seeds", "1", str(race.search_seed)])
    assert f"--seeds holds {race.search_seed}" in capsys.readouterr().err


def test_network_calls_are_counted():
    network = torch.nn.Linear(2, 2)
    calls = Calls(network)
    network(torch.ones(3, 2))
    with torch.no_grad():
        network(torch.ones(5, 2))
    counted = dict(network_calls=2, network_samples=8, network_samples_with_gradient=3)
    assert calls.counts == counted == json.loads(json.dumps(calls.counts))


@pytest.mark.parametrize("name", race.methods)
def test_every_method_has_settings_that_can_be_written(name, given):
    config = race.settings(race.Job(name, 1, 1e-3, 10.0, "report"), given)
    rate = config.get("learning_rate", config.get("train_learning_rate"))
    assert json.loads(json.dumps(config)) and rate == 1e-3
    if race.methods[name].recipe == "trl":  # an epoch of TRL and one of DDPO here train on as much
        assert config["sample_batch_size"] * config["sample_num_batches_per_epoch"] == 32
