"""Predicted against true rewards at every step: how well do a few queries tell what all of them would have told?

    python benchmarks/dense_rewards.py                         # seeds 1 to 5 -> results/experiments/dense_rewards.jsonl
    python benchmarks/dense_rewards.py --seeds 7 8 --cases shipped,10

One line a seed and case. A case is a policy and a number of steps: the embedded model as it is shipped, or after
the training of `sdpo-train tiny` under the same seed, which is run here without its evaluation. What is there
already is left alone, so an interrupted call goes on where it stopped. Three minutes a seed on one core, more than
half of it for the training.
"""

import argparse
import platform
import tempfile
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch

from sdpo_nb.advantages import discounted_returns, rows_by_prompt
from sdpo_nb.config import preset_config
from sdpo_nb.dense import (
    latent_similarities,
    nearest_weights,
    query_indices,
    rank_correlation,
    select_anchor,
    step_similarities,
    time_weights,
    weighted_rewards,
)
from sdpo_nb.files import append_jsonl, read_jsonl, versions
from sdpo_nb.mdp import pair_noise, sample_trajectories
from sdpo_nb.models import Policy, load_policy
from sdpo_nb.prompts import prompt_lists
from sdpo_nb.rewards import checked, get_reward
from sdpo_nb.trainer import Trainer

results = Path(__file__).parent / "results" / "experiments" / "dense_rewards.jsonl"
rewards = ("shapes_aesthetic", "shapes_alignment", "jpeg_compressibility", "warmth")
pairs_per_prompt, gamma = 8, 0.99
rules = {  # queried steps -> ways to fill the steps between
    "last": ("time",),  # level in time: the reward of the finished picture at every step
    "ends": ("similarity", "time"),
    "interior": ("similarity", "inverse distance", "time", "nearest in similarity", "nearest in time"),
    "middle": ("similarity", "inverse distance", "time", "nearest in similarity", "nearest in time"),
    "all": ("similarity", "time"),
    "random": ("similarity", "time"),
    "interior, 5": ("similarity", "inverse distance", "time"),
    "even, 5": ("similarity", "inverse distance", "time"),
}


@cache
def load(kind: str, seed: int) -> tuple[Policy, dict]:
    "The policy as it is shipped, or trained as the preset says; and the settings of the training"
    policy = load_policy("tiny", device="cpu")
    if kind == "shipped":
        return policy, {}
    with tempfile.TemporaryDirectory() as folder:
        config = preset_config("tiny", seed=seed, output_dir=f"{folder}/run", eval_samples=0)
        trainer = Trainer(policy, config.reward, config.prompts, config, callbacks=[])
        trainer.train()
    return policy, {**asdict(trainer.config), "output_dir": None}


@torch.no_grad()
def sample(policy: Policy, seed: int, num_steps: int) -> tuple[list, torch.Tensor, torch.Tensor]:
    "Prompts of the pairs, clean latents `[2,B,T,C,H,W]` and their pictures, pair by pair of every prompt"
    prompts = [p for p in prompt_lists["shapes"] for _ in range(pairs_per_prompt)]
    sampler, latents, pictures = policy.sampler(num_steps), [], []
    for chunk in torch.arange(len(prompts)).split(16):
        initial, noises = pair_noise(seed, -1, chunk, num_steps, policy.latent_shape)  # no training has an epoch -1
        condition = policy.embed([prompts[i] for i in chunk]).repeat(2)
        predict = lambda x, t: policy.predict(x, t, condition)
        found = sample_trajectories(predict, sampler, initial.flatten(0, 1), noises.flatten(0, 1))
        latents.append(found.pred_x0.unflatten(0, (2, -1)))
        pictures.append(policy.decode(found.pred_x0.flatten(0, 1)).unflatten(0, (2, len(chunk), num_steps)))
    return prompts, torch.cat(latents, 1), torch.cat(pictures, 1)


def queried_steps(where: str, pred_x0: torch.Tensor, seed: int = 0) -> torch.Tensor:
    "Steps to query `[B,Q]`, first, anchors…, last"
    B, T = pred_x0.shape[:2]
    fixed = {
        "last": [T - 1],
        "ends": [0, T - 1],
        "middle": [0, T // 2, T - 1],
        "even, 5": [0, *((T - 1) * q // 4 for q in (1, 2, 3)), T - 1],
    }
    if where in fixed:
        return torch.tensor(fixed[where]).expand(B, -1)
    among, _, queries = where.partition(", ")
    return query_indices(pred_x0, int(queries or 3), among, torch.Generator().manual_seed(seed))


def fill(how: str, pred_x0: torch.Tensor, indices: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    "Dense rewards `[B,T]` from the true ones at the queried steps"
    T = pred_x0.shape[1]
    if how == "time":
        weights = time_weights(indices, T)
    elif how == "nearest in time":
        weights = nearest_weights(-(torch.arange(T) - indices[..., None]).abs().float())
    else:
        weights = step_similarities(pred_x0, indices)
        if how == "nearest in similarity":
            weights = nearest_weights(weights)
        elif how == "inverse distance":  # no knob to turn: 1 - cosine is half the squared distance of unit latents
            weights = 1 / (1 - weights).clamp(min=1e-6)
    return weighted_rewards(weights, indices, true.gather(1, indices))


def within_prompt(values: torch.Tensor) -> torch.Tensor:
    "From `[2,B,T]`, by prompt and step: `[P,T,N]` with the N trajectories of a prompt"
    return values.unflatten(1, (-1, pairs_per_prompt)).permute(1, 3, 0, 2).flatten(2)


def within_pair(values: torch.Tensor) -> torch.Tensor:
    "From `[2,B,T]`, by step: `[T,2B]` differences of the pairs, both ways round: nobody says who is a and who is b"
    difference = (values[0] - values[1]).T
    return torch.cat([difference, -difference], 1)


def agreement(predicted: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    "Rank correlation along the last axis; 0 where the prediction alone is constant, NaN where there is nothing to tell"
    found = rank_correlation(predicted, true)
    return torch.where(found.isnan() & ~rank_correlation(true, true).isnan(), 0.0, found)


def compare(predicted: torch.Tensor, true: torch.Tensor) -> dict:
    """By step: errors, and rank correlations over all trajectories, those of a prompt, differences within pairs.

    And the rank correlations of the returns, as means over steps."""
    centred = within_prompt(predicted - true)
    centred = centred - centred.mean(-1, keepdim=True)
    returns = [discounted_returns(values.flatten(0, 1), gamma).view_as(values) for values in (predicted, true)]
    last = true.shape[-1] - 1  # the return of the last step is the last reward, which every rule knows
    return {
        "error": rounded((predicted - true).square().mean((0, 1)).sqrt()),
        # minus the mean of prompt and step, as advantages are
        "error_centred": rounded(centred.square().mean((0, 2)).sqrt()),
        "rank": rounded(agreement(*(values.flatten(0, 1).T for values in (predicted, true)))),
        "rank_prompt": rounded(agreement(*map(within_prompt, (predicted, true))).nanmean(0)),
        "rank_pair": rounded(agreement(*map(within_pair, (predicted, true)))),
        "return_prompt": rounded(agreement(*map(within_prompt, returns))[:, :last].nanmean()),
        "return_pair": rounded(agreement(*map(within_pair, returns))[:last].nanmean()),
    }


def assumption(pred_x0: torch.Tensor, true: torch.Tensor, prompts: list) -> dict:
    """Do latents that look less alike have rewards that differ more?

    Over the pairs of steps of a trajectory, and over the trajectories of a prompt at the same two steps."""
    one, other = torch.triu_indices(true.shape[1], true.shape[1], 1)
    every = torch.arange(true.shape[1]).expand(len(true), -1)
    unlike = 1 - step_similarities(pred_x0, every)[:, one, other]  # `[B, pairs of steps]`
    apart = (true[:, one] - true[:, other]).abs()
    groups = torch.tensor(list(rows_by_prompt(prompts).values()))
    return {
        "along_similarity": rounded(rank_correlation(unlike, apart).nanmean()),
        "along_time": rounded(rank_correlation((other - one).expand_as(apart).float(), apart).nanmean()),
        "same_steps": rounded(
            rank_correlation(unlike[groups].transpose(1, 2), apart[groups].transpose(1, 2)).nanmean()
        ),
    }


def rounded(values: torch.Tensor):
    "Three significant digits: more would be noise"
    return [rounded(value) for value in values] if values.ndim else float(f"{values.item():.3g}")


def report(name: str, prompts: list, pred_x0: torch.Tensor, pictures: torch.Tensor, seed: int) -> dict:
    "One reward: what it says itself, whether it follows the latents, and how well each rule predicts it"
    true = checked(
        get_reward(name), pictures.flatten(0, 2), [p for p in prompts for _ in range(pred_x0.shape[1])]
    ).view(len(prompts), -1)
    true[len(prompts) // 2 :, 0] = true[
        : len(prompts) // 2, 0
    ]  # a pair shares its first predicted clean sample: one query for both
    by_pair = true.unflatten(0, (2, -1))
    predicted = {
        where: {
            how: compare(fill(how, pred_x0, queried_steps(where, pred_x0, seed), true).view_as(by_pair), by_pair)
            for how in ways
        }
        for where, ways in rules.items()
    }
    return {
        "mean": rounded(true.mean(0)),
        "spread": rounded(within_prompt(by_pair).var(-1).mean(0).sqrt()),
        "assumption": assumption(pred_x0, true, prompts),
        "predicted": predicted,
    }


def run(kind: str, seed: int, num_steps: int) -> dict:
    "One line"
    started = time.perf_counter()
    policy, training = load(kind, seed)
    prompts, pred_x0, pictures = sample(policy, seed, num_steps)
    pred_x0, prompts = pred_x0.flatten(0, 1), prompts * 2
    anchor = select_anchor(pred_x0)
    config = {
        "policy": "tiny",
        "prompts": "shapes",
        "num_steps": num_steps,
        "eta": 1.0,
        "gamma": gamma,
        "pairs_per_prompt": pairs_per_prompt,
        "training": training,
    }
    return {
        "group": "dense_rewards",
        "policy": kind,
        "seed": seed,
        "num_steps": num_steps,
        "config": config,
        "versions": versions(),
        "machine": {"processor": platform.machine(), "system": platform.system()},
        "samples": len(prompts),
        "queries": {where: queried_steps(where, pred_x0).shape[1] for where in rules},
        "anchors": anchor.bincount(minlength=num_steps).tolist(),
        "least_divisor": rounded(sum(latent_similarities(pred_x0, anchor)).min()),
        "rewards": {name: report(name, prompts, pred_x0, pictures, seed) for name in rewards},
        "seconds": round(time.perf_counter() - started, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--cases", nargs="+", default=["shipped,10", "shipped,25", "trained,10"], help="policy,steps")
    asked = parser.parse_args()
    for seed in asked.seeds:
        for kind, num_steps in (case.split(",") for case in asked.cases):
            done = {
                (line["policy"], line["seed"], line["num_steps"])
                for line in (read_jsonl(results) if results.is_file() else [])
            }
            if (kind, seed, int(num_steps)) not in done:
                append_jsonl(results, run(kind, seed, int(num_steps)))
            print(f"seed {seed}, {kind} policy, {num_steps} steps: done", flush=True)


if __name__ == "__main__":
    main()
