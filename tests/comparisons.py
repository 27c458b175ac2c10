"""When two runs, or two outputs of a network, are the same."""

import torch

from sdpo_nb.files import read_jsonl


def weights(trainer):
    return trainer.policy.lora_state()


def same_weights(first, second):
    "Are the LoRA weights of two trainers equal, bit by bit?"
    first, second = weights(first), weights(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def without_clock(run):
    "What a run noted, its seconds left out"
    return [
        {name: value for name, value in record.items() if not name.startswith("seconds/")}
        for record in read_jsonl(run / "metrics.jsonl")
    ]


def same_learning(first, second, alone, untrained):
    """Two processes agree bit by bit, and with one process nearly.

    AdamW divides by the size of the gradient, so rounding shows where it is tiny; compare with all that was learnt."""
    assert all(torch.equal(first[name], second[name]) for name in first)
    moved = max((alone[name] - start).abs().max().item() for name, start in untrained.items())
    assert moved > 0 and max((first[name] - alone[name]).abs().max().item() for name in first) < 0.05 * moved


def near(one, other):
    "Are two outputs equal, up to the rounding of float32 in a network of this depth?"
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-4 * other.abs().max())


def apart(one, other):
    "Do two outputs differ by more than rounding?"
    return bool((one - other).abs().max() > 1e-3 * other.abs().max())
