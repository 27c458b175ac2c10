"""What the chapter on flow models draws is complete, of today's settings, and measured as it says."""

import json
from collections import Counter
from dataclasses import asdict

import flow_evidence
import pytest
from experiments import key_of

from sdpo_nb.files import read_jsonl


def by_run(group):
    return {(line["name"], line["seed"]): line for line in flow_evidence.lines(group)}


@pytest.mark.parametrize("name", flow_evidence.trainings)
def test_every_row_has_its_seeds_and_todays_settings(name):
    found = {seed: line for (known, seed), line in by_run("training").items() if known == name}
    assert {*found} >= {*flow_evidence.groups["training"][1]}
    for seed, line in found.items():
        assert key_of(line["config"]) == key_of(asdict(flow_evidence.training(name, seed).config))
        assert line["evaluations"][-1]["reward_queries"] <= 1.1 * flow_evidence.frontier_queries


def test_methods_that_lost_much_early_were_measured_more_often():
    "With all of their seeds; and what was measured again is the same run"
    runs, early, lost = by_run("training"), by_run("early"), flow_evidence.lost_early()
    assert {*early} == {run for run in runs if run[0] in lost}
    for run, line in early.items():
        for again, first in zip(line["metrics"], runs[run]["metrics"]):
            assert all(again[name] == value for name, value in first.items() if not name.startswith("seconds"))


def test_learning_rates_were_searched_on_seeds_and_pairs_that_are_not_reported():
    lines = flow_evidence.lines("rates")
    assert not {line["seed"] for line in lines} & {line["seed"] for line in flow_evidence.lines("training")}
    counts = Counter((line["seed"], line["name"]) for line in lines)
    assert {name for _, name in counts} == {*flow_evidence.searched} and {*counts.values()} == {3}
    for line in lines:
        config = flow_evidence.training(line["name"], line["seed"], line["factor"]).config
        assert key_of(line["config"]) == key_of(asdict(config))


@pytest.mark.parametrize("name", ["SDPO, T=4", "SDPO, T=4, Flow-GRPO"])
def test_another_rule_for_noise_is_that_of_training_alone(monkeypatch, name):
    seen = []

    class Trainer:
        def __init__(self, policy, reward, prompts, config, callbacks):
            self.policy, self.folder = policy, config.output_dir
            seen.append(type(policy.sampler(4)).__name__)

        def train(self):
            seen.append(type(self.policy.sampler(4)).__name__)

    monkeypatch.setattr(flow_evidence, "trainer_class", lambda run: Trainer)
    monkeypatch.setattr(flow_evidence, "read_jsonl", lambda path: [])
    flow_evidence.train(flow_evidence.training(name, 1))
    assert seen == ["FlowGRPOSampler" if "GRPO" in name else "FlowSampler", "FlowSampler"]


@pytest.mark.parametrize("path", sorted(flow_evidence.results.glob("*.jsonl")), ids=lambda path: path.stem)
def test_no_line_stands_there_twice(path):
    lines = [json.dumps(line, sort_keys=True) for line in read_jsonl(path)]
    assert len({*lines}) == len(lines)
