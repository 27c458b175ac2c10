"""Where the variance of returns comes from, and what each way of normalising leaves of it: no training, only sampling.

    python benchmarks/advantage_variance.py               # seeds 0 to 4 -> results/experiments/advantage_variance.jsonl
    python benchmarks/advantage_variance.py --seeds 7 8

One line a seed and reward. What is there already is left alone, so an interrupted call goes on where it stopped. A
minute a seed on one core: 36 epochs of 16 pairs from the embedded model as it is shipped, each scored by three
rewards.
"""

import argparse
import platform
import time
from dataclasses import asdict
from pathlib import Path

import torch

from sdpo_nb.advantages import normalizers, rows_by_prompt, variance_parts
from sdpo_nb.config import TrainConfig
from sdpo_nb.files import append_jsonl, read_jsonl, versions
from sdpo_nb.models import load_policy
from sdpo_nb.rewards import get_reward
from sdpo_nb.trainer import Trainer

results = Path(__file__).parent / "results" / "experiments" / "advantage_variance.jsonl"
rewards = ("shapes_aesthetic", "shapes_alignment", "warmth")
# the memory of 12 prompts is half full after 6 epochs and full after 12, on average
epochs, first, settled = 36, slice(0, 6), slice(12, 36)


def rounded(table: torch.Tensor) -> list:
    "A table as nested lists of four significant digits: more would be noise"
    return [[float(f"{value:.4g}") for value in row] for row in table.tolist()]


def collect(seed: int) -> tuple[Trainer, list, dict]:
    "Prompts of each epoch's pairs, and by reward each epoch's returns `[2,B,T]` with their cost; nothing is trained"
    trainer = Trainer(
        load_policy("tiny", device="cpu"),
        rewards[0],
        "shapes",
        TrainConfig(seed=seed, normalizer="none", epochs=epochs),
        callbacks=[],
    )
    empty, prompts = dict(seconds=0.0, reward_queries=0), []
    found = {name: dict(reward=get_reward(name), returns=[], **empty) for name in rewards}
    for epoch in range(epochs):
        started, trainer.counts["epoch"] = time.perf_counter(), epoch
        rollout = trainer.sample()
        sampling = time.perf_counter() - started
        prompts.append(rollout.prompts)
        for record in found.values():
            started, rollout.queries = time.perf_counter(), 0
            trainer.reward = record["reward"]
            trainer.score(rollout)
            trainer.credit(rollout)  # without a normaliser the advantages are the returns
            record["returns"].append(rollout.advantages)
            record["seconds"] += sampling + time.perf_counter() - started
            record["reward_queries"] += rollout.queries
    return trainer, prompts, found


def advantages_by(name: str, prompts: list, returns: list) -> list:
    "What a normaliser makes of the returns, epoch by epoch, `[2,B,T]` each"
    normalizer = normalizers[name]()
    return [
        normalizer.update(names * 2, values.flatten(0, 1)).view_as(values) for names, values in zip(prompts, returns)
    ]


def by_prompt_and_step(values: torch.Tensor, prompts: list, names: list, advantage_clip: float) -> dict:
    "For every prompt and step `[P,T]`: the mean, and the root mean square difference in pairs after the loss's clip"
    groups = rows_by_prompt(prompts)
    held = values.clamp(-advantage_clip, advantage_clip)
    means = [values[:, groups[name]].mean((0, 1)) for name in names]
    differences = [(held[0] - held[1])[groups[name]].square().mean(0).sqrt() for name in names]
    return {"mean": rounded(torch.stack(means)), "difference": rounded(torch.stack(differences))}


def report(name: str, prompts: list, returns: list, names: list, advantage_clip: float) -> dict:
    "One normaliser: parts of the variance early and late, the scale of every prompt and step, and what the clip takes"
    advantages = advantages_by(name, prompts, returns)

    def joined(epochs):
        return torch.cat(advantages[epochs], 1), sum(prompts[epochs], [])

    parts = {}
    for phase, epochs in (("first", first), ("settled", settled)):
        values, pair_prompts = joined(epochs)
        parts[phase] = variance_parts(values.flatten(0, 1), pair_prompts * 2)
    return {
        **parts,
        "beyond_clip": (values.abs() > advantage_clip).float().mean().item(),
        **by_prompt_and_step(values, pair_prompts, names, advantage_clip),
    }


def run(seed: int) -> list:
    "One record for each reward"
    trainer, prompts, found = collect(seed)
    config = trainer.config
    return [
        {
            "group": "advantage_variance",
            "recipe": config.recipe,
            "reward": name,
            "seed": seed,
            "config": {**asdict(config), "reward": name},
            "versions": versions(),
            "machine": {"processor": platform.machine(), "system": platform.system()},
            "seconds": round(record["seconds"], 1),
            "samples": epochs * 2 * config.pairs_per_epoch,
            "reward_queries": record["reward_queries"],
            "optimizer_steps": 0,
            "epochs": {"first": [first.start, first.stop], "settled": [settled.start, settled.stop]},
            "prompts": trainer.prompts,
            "normalizers": {
                kind: report(kind, prompts, record["returns"], trainer.prompts, config.advantage_clip)
                for kind in normalizers
            },
        }
        for name, record in found.items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    for seed in parser.parse_args().seeds:
        done = {(line["reward"], line["seed"]) for line in (read_jsonl(results) if results.is_file() else [])}
        wanted = [name for name in rewards if (name, seed) not in done]
        for record in run(seed) if wanted else []:
            if record["reward"] in wanted:
                append_jsonl(results, record)
        print(f"seed {seed}: {', '.join(wanted) or 'nothing'} added")


if __name__ == "__main__":
    main()
