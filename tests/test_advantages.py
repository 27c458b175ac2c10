"Returns, credit rules and advantages: the reference vectors, plain loops, exact resume."

import importlib.util
import inspect
import io
import math
import random
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch

from sdpo_nb.advantages import (
    StepPromptNormalizer,
    action_returns,
    credit_names,
    credit_rule,
    credit_rules,
    discounted_returns,
    normalizers,
    variance_parts,
)
from sdpo_nb.files import read_jsonl
from sdpo_nb.recipes import Recipe

VECTORS = Path(__file__).parent / "reference_vectors" / "sdpo_vectors.npz"
SCRIPT = Path(__file__).parent.parent / "benchmarks" / "advantage_variance.py"
NAMES = ["cat", "dog", "fish", "bee", "ant"]


@pytest.fixture(scope="module")
def vectors():
    with np.load(VECTORS) as archive:
        return {name: archive[name] for name in archive.files if name.startswith("adv/")}


def epochs(count, rows=24, num_steps=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        chosen = torch.randint(len(NAMES), (rows,), generator=generator).tolist()
        yield [NAMES[i] for i in chosen], torch.randn(rows, num_steps, generator=generator) * 3 + 5


def assert_within(actual, reference, tolerance):
    actual, reference = np.asarray(actual, dtype=float), np.asarray(reference, dtype=float)
    assert (np.abs(actual - reference) <= tolerance * np.maximum(1, np.abs(reference))).all()


def deque_loop(memory, prompts, returns, by_prompt, by_step, buffer_size, min_count, divide_by_std):
    "One (prompt, step) at a time, in numpy's float64."
    returns = returns.double().numpy()
    advantages = np.empty_like(returns)
    for prompt in dict.fromkeys(prompts):
        rows = [i for i, p in enumerate(prompts) if p == prompt]
        known = memory.setdefault(prompt, deque(maxlen=buffer_size))
        known.extend(returns[rows])
        table = np.stack(known) if by_prompt and len(known) >= min_count else returns
        mean, std = (table.mean(0), table.std(0)) if by_step else (table.mean(), table.std())
        advantages[rows] = (returns[rows] - mean) / (std + 1e-6 if divide_by_std else 1.0)
    return advantages


def test_returns_equal_the_reference(vectors):
    for epoch in range(6):
        dense = torch.from_numpy(vectors[f"adv/ep{epoch}/dense"])
        assert_within(discounted_returns(dense, 0.99), vectors[f"adv/ep{epoch}/returns"], 1e-5)


def test_advantages_equal_the_reference_over_six_epochs(vectors):
    normalizer = StepPromptNormalizer(buffer_size=32, min_count=16)
    for epoch in range(6):
        prompts = [str(p) for p in vectors[f"adv/ep{epoch}/prompts"]]
        returns = torch.from_numpy(vectors[f"adv/ep{epoch}/returns"])
        assert_within(normalizer.update(prompts, returns), vectors[f"adv/ep{epoch}/advantages"], 1e-5)


@pytest.mark.parametrize("gamma", [-0.1, 1.01, float("nan")])
def test_gamma_outside_its_range_is_refused(gamma):
    with pytest.raises(ValueError, match="gamma is .*between 0 and 1"):
        discounted_returns(torch.ones(1, 3), gamma)


def test_defaults_are_those_of_the_recipes():
    defaults = {name: parameter.default for name, parameter in inspect.signature(action_returns).parameters.items()}
    assert credit_rule(defaults["credit"]) is credit_rule(Recipe().credit)
    assert all(defaults[name] == getattr(Recipe(), name) for name in ("gamma", "gae_lambda"))


@pytest.mark.parametrize("num_steps, final", [(1, True), (2, True), (2, False), (7, True), (7, False)])
def test_credit_rules_as_plain_sums(num_steps, final):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(4, num_steps, generator=generator, dtype=torch.float64)
    last = torch.randn(4, generator=generator, dtype=torch.float64) if final else None
    gamma, decay = 0.9, 0.7
    returns = action_returns(rewards, gamma=gamma)
    to_go = action_returns(rewards, credit="reward_to_go", gamma=gamma, final_reward=last)
    gae = action_returns(rewards, credit="gae", gae_lambda=decay, final_reward=last)
    for b in range(4):
        R = rewards[b].tolist() + ([last[b].item()] if final else [])
        for i in range(num_steps):
            sums = (
                (returns, sum(gamma ** (j - i) * R[j] for j in range(i, num_steps))),
                (to_go, sum(gamma ** (j - i - 1) * R[j] for j in range(i + 1, len(R)))),
                (gae, sum(decay ** (j - i) * (R[j + 1] - R[j]) for j in range(i, len(R) - 1))),
            )
            assert all(math.isclose(found[b, i], expected, abs_tol=1e-12) for found, expected in sums)


@pytest.mark.parametrize("name", list(credit_rules))
def test_aliases_mean_the_same_and_the_input_is_left_alone(name):
    rewards, final = torch.randn(3, 5), torch.randn(3) if credit_rules[name].uses_final else None
    before = rewards.clone()
    found = [action_returns(rewards, credit=each, final_reward=final) for each in (name, *credit_rules[name].aliases)]
    assert len(found) > 1 and all(torch.equal(found[0], other) for other in found)
    assert torch.equal(rewards, before)


def test_a_rule_of_ones_own_is_known_everywhere(monkeypatch):
    monkeypatch.setitem(credit_rules, "terminal", credit_rule("paper"))
    assert "terminal" in credit_names() and credit_rule("terminal").option == "gamma"


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(credit="mine"), "credit is 'mine'; use one of 'return', .*'gain'"),
        (dict(credit="paper", final_reward=torch.zeros(2)), "final_reward is given, but credit 'paper'"),
        (dict(credit="causal", final_reward=torch.zeros(3)), r"final_reward has shape \[3\]"),
        (dict(credit="gae", gae_lambda=1.5), "between 0 and 1"),
    ],
)
def test_impossible_credit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        action_returns(torch.zeros(2, 5), **options)


@pytest.mark.parametrize("divide_by_std", [True, False])
@pytest.mark.parametrize(
    "name, by_prompt, by_step",
    [("step_prompt", True, True), ("prompt", True, False), ("step", False, True), ("batch", False, False)],
)
def test_every_grouping_equals_a_deque_loop(name, by_prompt, by_step, divide_by_std):
    settings = {"buffer_size": 12, "min_count": 6, "divide_by_std": divide_by_std}
    normalizer, memory = normalizers[name](**settings), {}
    for prompts, returns in epochs(5):
        expected = deque_loop(memory, prompts, returns, by_prompt, by_step, **settings)
        assert_within(normalizer.update(prompts, returns), expected, 1e-6)


def test_current_returns_enter_before_the_statistics_are_read():
    normalizer = StepPromptNormalizer(buffer_size=4, min_count=4)
    advantages = normalizer.update(["cat"] * 4 + ["dog"], torch.tensor([[0.0], [0.0], [2.0], [2.0], [100.0]]))
    torch.testing.assert_close(advantages[:4, 0], torch.tensor([-1.0, -1.0, 1.0, 1.0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("count, own", [(15, False), (16, True)])
def test_statistics_change_hands_at_the_minimum_count(count, own):
    returns = torch.cat([torch.randn(count, 3, generator=torch.Generator().manual_seed(0)), torch.full((4, 3), 50.0)])
    advantages = StepPromptNormalizer().update(["cat"] * count + ["dog"] * 4, returns)
    assert (advantages[:count].mean(0).abs().max() < 1e-4) == own


@pytest.mark.parametrize("name", list(normalizers))
def test_resume_is_exact(name):
    straight, first = normalizers[name](), normalizers[name]()
    data = list(epochs(6))
    for prompts, returns in data[:3]:
        straight.update(prompts, returns)
        first.update(prompts, returns)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second = normalizers[name]()
    second.load_state_dict(state)
    for prompts, returns in data[3:]:
        assert torch.equal(second.update(prompts, returns), straight.update(prompts, returns))
    ours, theirs = second.state_dict(), straight.state_dict()
    assert torch.equal(ours.pop("numbers"), theirs.pop("numbers")) and ours == theirs


def test_a_saved_state_does_not_follow_later_updates():
    normalizer = StepPromptNormalizer()
    (prompts, returns), later = epochs(2)
    normalizer.update(prompts, returns)
    state = normalizer.state_dict()
    before = state["numbers"].clone()
    normalizer.update(*later)
    assert torch.equal(state["numbers"], before)


def test_a_state_of_many_prompts_is_a_few_objects():
    "Ten thousand prompts took four seconds to write as lists, after every epoch"
    normalizer, prompts = StepPromptNormalizer(), [f"prompt {number}" for number in range(2000)]
    normalizer.update(prompts, torch.randn(2000, 4))
    state = normalizer.state_dict()
    assert state["numbers"].shape == (8000,) and not any(isinstance(value, dict) for value in state.values())


def test_row_order_does_not_matter_before_anything_is_forgotten():
    prompts, returns = next(epochs(1, rows=40))
    order = list(range(40))
    random.Random(0).shuffle(order)
    straight = StepPromptNormalizer(min_count=5).update(prompts, returns.double())
    shuffled = StepPromptNormalizer(min_count=5).update([prompts[i] for i in order], returns.double()[order])
    torch.testing.assert_close(shuffled, straight[order], rtol=0, atol=1e-12)


def test_every_process_computes_the_same_bits():
    copies = [StepPromptNormalizer() for _ in range(3)]
    for prompts, returns in epochs(3):
        first, *others = [normalizer.update(prompts, returns) for normalizer in copies]
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_dtype_is_kept_and_no_gradient_enters_the_memory(dtype):
    returns = torch.randn(20, 3).to(dtype).requires_grad_()
    normalizer = StepPromptNormalizer()
    advantages = normalizer.update(["cat"] * 20, returns)
    assert advantages.dtype == dtype and not advantages.requires_grad and not normalizer.buffers["cat", 3].requires_grad


@pytest.mark.parametrize(
    "prompts, returns, message",
    [
        (["cat"], torch.ones(2, 3), "for 1 prompts; pass one row"),
        (["cat"], torch.ones(1), "pass one row"),
        ([], torch.ones(0, 3), "pass one row"),
        (["cat", "dog"], torch.tensor([[1.0], [float("inf")]]), "row 1 .prompt 'dog'. are not finite"),
    ],
)
@pytest.mark.parametrize("name", list(normalizers))
def test_bad_returns_are_refused_and_not_remembered(name, prompts, returns, message):
    normalizer = normalizers[name]()
    with pytest.raises(ValueError, match=message):
        normalizer.update(prompts, returns)
    assert normalizer.buffers == {}


@pytest.mark.parametrize("settings", [{"min_count": 0}, {"buffer_size": 8, "min_count": 9}])
def test_impossible_buffers_are_refused(settings):
    with pytest.raises(ValueError, match="1 <= min_count <= buffer_size"):
        StepPromptNormalizer(**settings)


@pytest.mark.parametrize("rows", [1, 7])
def test_variance_parts_add_up(rows):
    prompts, returns = next(epochs(1, rows=rows, seed=rows))
    parts = variance_parts(returns, prompts)
    assert min(parts.values()) >= 0
    assert sum(parts.values()) == pytest.approx(returns.double().var(correction=0).item(), rel=1e-9)


@pytest.mark.parametrize(
    "name, removed",
    [
        ("step", ["step"]),
        ("prompt", ["prompt"]),
        ("step_prompt", ["step", "prompt", "prompt × step"]),
        ("batch", []),
        ("none", []),
    ],
)
def test_each_normalizer_removes_its_part_of_the_variance(name, removed):
    prompts, noise = next(epochs(1, rows=200))
    level = torch.tensor([float(NAMES.index(prompt)) for prompt in prompts])[:, None]
    returns = noise + (10 + 5 * level) * torch.arange(7, 0, -1)
    parts = variance_parts(normalizers[name](buffer_size=200).update(prompts, returns.double()), prompts)
    assert {part for part, value in parts.items() if value < 1e-9} == set(removed)


@pytest.mark.parametrize(
    "prompts, returns",
    [(["cat"], torch.ones(2, 3)), (["cat"], torch.ones(1)), (["cat"], torch.tensor([[float("nan")]]))],
)
def test_variance_parts_refuse_bad_values(prompts, returns):
    with pytest.raises(ValueError, match="returns (has shape|of row)"):
        variance_parts(returns, prompts)


def test_an_offset_of_prompt_and_step_is_not_seen():
    prompts, returns = next(epochs(1, rows=60))
    offset = torch.stack([100.0 * NAMES.index(prompt) + torch.arange(7.0) for prompt in prompts]).double()
    plain, shifted = (
        StepPromptNormalizer(min_count=1, buffer_size=60).update(prompts, values)
        for values in (returns.double(), returns.double() + offset)
    )
    torch.testing.assert_close(shifted, plain, rtol=0, atol=1e-9)


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    "The script of the experiment, writing elsewhere and in small"
    spec = importlib.util.spec_from_file_location("advantage_variance", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "results", tmp_path / "variance.jsonl")
    monkeypatch.setattr(script, "rewards", ("warmth",))
    for name, value in (("epochs", 2), ("first", slice(0, 1)), ("settled", slice(0, 2))):
        monkeypatch.setattr(script, name, value)
    return script


def test_the_experiment_runs_and_resumes(benchmark, monkeypatch):
    monkeypatch.setattr("sys.argv", ["advantage_variance.py", "--seeds", "3"])
    benchmark.main()
    (line,) = read_jsonl(benchmark.results)
    assert (line["reward"], line["seed"], line["samples"]) == ("warmth", 3, 64)
    for name, found in line["normalizers"].items():
        assert set(found) == {"first", "settled", "beyond_clip", "mean", "difference"}, name
    monkeypatch.setattr(benchmark, "collect", None)  # nothing is sampled twice
    benchmark.main()
    assert read_jsonl(benchmark.results) == [line]


def test_committed_results_are_complete():
    lines = read_jsonl(SCRIPT.parent / "results" / "experiments" / "advantage_variance.jsonl")
    assert len({line["reward"] for line in lines}) >= 2 and len({line["seed"] for line in lines}) >= 5
    assert (
        len({(line["reward"], line["seed"]) for line in lines})
        == len(lines)
        == len({line["reward"] for line in lines}) * len({line["seed"] for line in lines})
    )
    for line in lines:
        assert {"recipe", "config", "versions", "machine", "seconds"} <= set(line) and set(line["normalizers"]) == set(
            normalizers
        )
        for found in line["normalizers"].values():
            assert (
                np.shape(found["mean"])
                == np.shape(found["difference"])
                == (len(line["prompts"]), line["config"]["num_steps"])
            )
