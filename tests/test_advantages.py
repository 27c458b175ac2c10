"Returns and advantages: parity with the reference vectors, a slow deque loop, exact resume."

import importlib.util
import io
import json
import random
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch

from sdpo_nb.advantages import StepPromptNormalizer, discounted_returns, normalizers, variance_parts
from sdpo_nb.files import read_jsonl

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
    "One cell at a time, in numpy's float64."
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


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 50])
def test_returns_are_the_discounted_sums(gamma, num_steps):
    rewards = torch.randn(5, num_steps, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.stack(
        [sum(gamma ** (j - i) * rewards[:, j] for j in range(i, num_steps)) for i in range(num_steps)], dim=1
    )
    torch.testing.assert_close(discounted_returns(rewards, gamma), expected, rtol=1e-12, atol=1e-12)


def test_returns_leave_the_rewards_alone():
    rewards = torch.ones(2, 4)
    discounted_returns(rewards, 0.9)
    assert torch.equal(rewards, torch.ones(2, 4))


@pytest.mark.parametrize("gamma", [-0.1, 1.01, float("nan")])
def test_gamma_outside_its_range_is_refused(gamma):
    with pytest.raises(ValueError, match="gamma is .*between 0 and 1"):
        discounted_returns(torch.ones(1, 3), gamma)


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


def test_none_passes_the_returns_on():
    prompts, returns = next(epochs(1))
    advantages = normalizers["none"]().update(prompts, returns)
    assert torch.equal(advantages, returns)
    assert advantages.data_ptr() != returns.data_ptr()


def test_one_terminal_reward_per_trajectory():
    "With T=1 the per-prompt and the per-(prompt, step) statistics are the same thing."
    step_prompt, prompt = normalizers["step_prompt"](), normalizers["prompt"]()
    for prompts, returns in epochs(4, num_steps=1):
        assert torch.equal(step_prompt.update(prompts, returns), prompt.update(prompts, returns))


def test_current_returns_enter_before_the_statistics_are_read():
    normalizer = StepPromptNormalizer(buffer_size=4, min_count=4)
    advantages = normalizer.update(["cat"] * 4 + ["dog"], torch.tensor([[0.0], [0.0], [2.0], [2.0], [100.0]]))
    torch.testing.assert_close(advantages[:4, 0], torch.tensor([-1.0, -1.0, 1.0, 1.0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("count, own", [(15, False), (16, True)])
def test_statistics_change_hands_at_the_minimum_count(count, own):
    returns = torch.cat([torch.randn(count, 3, generator=torch.Generator().manual_seed(0)), torch.full((4, 3), 50.0)])
    advantages = StepPromptNormalizer().update(["cat"] * count + ["dog"] * 4, returns)
    assert (advantages[:count].mean(0).abs().max() < 1e-4) == own


def test_oldest_returns_are_forgotten():
    normalizer = StepPromptNormalizer(buffer_size=3, min_count=1)
    normalizer.update(["cat"] * 5, torch.arange(5.0)[:, None])
    assert normalizer.buffers["cat"].flatten().tolist() == [2.0, 3.0, 4.0]
    normalizer.update(["cat"], torch.tensor([[9.0]]))
    assert normalizer.buffers["cat"].flatten().tolist() == [3.0, 4.0, 9.0]


@pytest.mark.parametrize("name", list(normalizers))
@pytest.mark.parametrize("carrier", ["json", "torch"])
def test_resume_is_exact(name, carrier):
    straight, first = normalizers[name](), normalizers[name]()
    data = list(epochs(6))
    for prompts, returns in data[:3]:
        straight.update(prompts, returns)
        first.update(prompts, returns)
    if carrier == "json":
        state = json.loads(json.dumps(first.state_dict()))
    else:
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    second = normalizers[name]()
    second.load_state_dict(state)
    for prompts, returns in data[3:]:
        assert torch.equal(second.update(prompts, returns), straight.update(prompts, returns))
    assert second.state_dict() == straight.state_dict()


def test_a_saved_state_does_not_follow_later_updates():
    normalizer = StepPromptNormalizer()
    (prompts, returns), later = epochs(2)
    normalizer.update(prompts, returns)
    state = normalizer.state_dict()
    before = json.dumps(state)
    normalizer.update(*later)
    assert json.dumps(state) == before


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
    assert advantages.dtype == dtype and not advantages.requires_grad and not normalizer.buffers["cat"].requires_grad


def test_constant_returns_give_zero_advantages():
    for name in ["step_prompt", "prompt", "step", "batch"]:
        assert normalizers[name]().update(["cat"] * 20, torch.full((20, 4), 0.1)).abs().max() < 1e-6


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


def test_another_number_of_steps_is_refused():
    normalizer = StepPromptNormalizer()
    normalizer.update(["cat"], torch.ones(1, 4))
    with pytest.raises(ValueError, match="2 steps but earlier calls had 4"):
        normalizer.update(["dog"], torch.ones(1, 2))


@pytest.mark.parametrize("settings", [{"min_count": 0}, {"buffer_size": 8, "min_count": 9}])
def test_impossible_buffers_are_refused(settings):
    with pytest.raises(ValueError, match="1 <= min_count <= buffer_size"):
        StepPromptNormalizer(**settings)


def test_variance_parts_by_hand():
    table = torch.tensor([[10.0, 4.0], [4.0, 2.0], [12.0, 6.0], [6.0, 4.0]])
    parts = variance_parts(table, ["cat", "dog", "cat", "dog"])
    assert parts == {"step": 4.0, "prompt": 4.0, "prompt × step": 1.0, "among equals": 1.0}


@pytest.mark.parametrize("rows", [1, 7, 200])
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


@pytest.mark.parametrize("name", [name for name in normalizers if name != "none"])
def test_the_mean_cancels_in_pairs(name):
    prompts, returns = next(epochs(1, rows=24))
    returns = returns.double()
    advantages = normalizers[name](divide_by_std=False).update(prompts * 2, torch.cat([returns, returns.flip(1)]))
    torch.testing.assert_close(advantages[:24] - advantages[24:], returns - returns.flip(1), rtol=0, atol=1e-9)


def test_an_offset_of_prompt_and_step_is_not_seen():
    prompts, returns = next(epochs(1, rows=60))
    offset = torch.stack([100.0 * NAMES.index(prompt) + torch.arange(7.0) for prompt in prompts]).double()
    plain, shifted = (
        StepPromptNormalizer(min_count=1, buffer_size=60).update(prompts, values)
        for values in (returns.double(), returns.double() + offset)
    )
    torch.testing.assert_close(shifted, plain, rtol=0, atol=1e-9)


@pytest.mark.parametrize("count", [16, 32])
def test_no_advantage_exceeds_the_root_of_n_minus_one(count):
    returns = torch.zeros(count, 1, dtype=torch.float64)
    returns[0] = 1e6
    advantages = StepPromptNormalizer(buffer_size=count).update(["cat"] * count, returns)
    assert advantages.max().item() == pytest.approx((count - 1) ** 0.5, rel=1e-6)


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
