"""How much the credit of one action knows of what that action did: SDPO's pairs against branches, no training.

    python benchmarks/one_action_credit.py            # seeds 0 to 4 -> results/experiments/one_action_credit.jsonl

What an action did is found by Monte Carlo: from the state that it led to, sampling goes on to the end several times
with fresh noise, and the rewards of the last predicted clean samples are averaged. One line a seed, number of steps
and reward, with sums from which correlations follow; what is there already is left alone. Four minutes a seed.
"""

import argparse
import platform
from pathlib import Path

import torch

from sdpo_nb.advantages import discounted_returns
from sdpo_nb.files import append_jsonl, read_jsonl, versions
from sdpo_nb.mdp import keyed_noise, pair_noise, sample_trajectories
from sdpo_nb.models import load_policy
from sdpo_nb.prompts import prompt_lists
from sdpo_nb.rewards import get_reward
from sdpo_nb.tree import branch_noise, sample_tree

results = Path(__file__).parent / "results" / "experiments" / "one_action_credit.jsonl"
rewards = ("shapes_aesthetic", "0.3*shapes_aesthetic+0.7*shapes_alignment")
counts, groups, ends, gamma = (4, 10), 16, 8, 0.99


class World:
    "The embedded model at T steps, and R rewards"

    def __init__(self, policy, num_steps):
        self.policy, self.sampler, self.rewards = policy, policy.sampler(num_steps), [*map(get_reward, rewards)]

    def predict(self, prompts):
        embedding = self.policy.embed(prompts)
        return lambda x, t: self.policy.predict(x, t, embedding.repeat(len(x) // len(prompts)))

    @torch.no_grad()
    def score(self, latents, prompts):  # `[N,C,H,W]` -> `[N,R]`
        found = []
        for part, at in zip(latents.split(256), range(0, len(latents), 256)):
            images, names = self.policy.decode(part), prompts[at : at + len(part)]
            found.append(torch.stack([reward(images, names) for reward in self.rewards], 1))
        return torch.cat(found).double()

    @torch.no_grad()
    def ends(self, states, start, prompts, stream):  # `[N,C,H,W]` of step `start` -> rewards `[R,N,ends,T-start]`
        "Rewards of the predicted clean samples of fresh ends, from every state"
        T, shape = self.sampler.num_steps, self.policy.latent_shape
        x, names = states.repeat_interleave(ends, 0), [p for p in prompts for _ in range(ends)]
        noise = keyed_noise(0, range(len(x)), (T - start, *shape), stream)
        predict, found = self.predict(names), []
        for i in range(start, T):
            step = self.sampler.step(predict(x, self.sampler.timesteps[i].item()), x, i, noise=noise[:, i - start])
            found.append(self.score(step.pred_x0, names))
            x = step.prev_sample
        return torch.stack(found, 1).permute(2, 0, 1).view(len(self.rewards), len(states), ends, T - start)


def sums(credit, truth, halves) -> dict:  # differences `[N]`; the truth by each half of the ends `[2,N]`
    "What correlations are computed from, seeds together"
    return {
        "n": len(credit),
        "credit": credit.square().sum().item(),
        "truth": truth.square().sum().item(),
        "both": (credit * truth).sum().item(),
        "halves": (halves[0] * halves[1]).sum().item(),  # the truth's own variance, without the noise of its ends
    }


def branches(world, prompts, seed) -> list:  # for each reward a record of each step
    "Two actions from one state: the difference of their own rewards, and of what follows"
    T, shape, N, own = world.sampler.num_steps, world.policy.latent_shape, len(prompts), []
    branching, drawn = torch.arange(T) < T - 1, branch_noise(seed, 0, range(N), 2, T, shape)

    def score(x, t):
        own.append(world.score(x, prompts * 2).T.view(-1, 2, N))
        return own[-1][0]  # sampling goes on at random: nothing depends on it

    tree = sample_tree(world.predict(prompts), score, world.sampler, *drawn, branching)
    found = [[] for _ in rewards]
    for i in range(T - 1):
        later = world.ends(tree.actions[:, :, i].flatten(0, 1), i + 1, prompts * 2, f"{seed} branch {i}")[..., -1]
        for records, value, scores in zip(found, later.view(-1, 2, N, ends), own[i]):
            first, second = (value[0] - value[1]).view(-1, 2, ends // 2).mean(2).unbind(1)
            records.append(
                {"step": i, "luck": 0.0, **sums(scores[0] - scores[1], (first + second) / 2, (first, second))}
            )
    return found


def pairs(world, prompts, seed) -> list:  # for each reward a record of each step
    "Two trajectories from one noise: the difference of their returns from a step on, and of what their actions did"
    T, shape, N = world.sampler.num_steps, world.policy.latent_shape, len(prompts)
    initial, noises = (x.flatten(0, 1) for x in pair_noise(seed, 0, range(N), T, shape))
    t = sample_trajectories(world.predict(prompts), world.sampler, initial, noises)
    dense = world.score(t.pred_x0.flatten(0, 1), [p for p in prompts * 2 for _ in range(T)]).T.view(-1, 2 * N, T)
    after = [world.ends(t.latents[:, i], i, prompts * 2, f"{seed} pair {i}") for i in range(T)]
    found = [[] for _ in rewards]
    for i in range(T - 1):
        weights = gamma ** torch.arange(1, T - i, dtype=torch.float64)
        for r, records in enumerate(found):
            did = after[i + 1][r, ..., -1] - after[i][r, ..., -1]
            first, second = did.view(2, N, 2, ends // 2).mean(3).diff(dim=0)[0].unbind(1)
            credit = discounted_returns(dense[r], gamma)[:, i].view(2, N).diff(dim=0)[0]
            # luck: how much the return changes with the noise that comes after this action
            luck = 2 * (after[i + 1][r] * weights).sum(2).var(1).mean().item() * N
            records.append({"step": i, "luck": luck, **sums(credit, (first + second) / 2, (first, second))})
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    policy, machine = load_policy("tiny", device="cpu"), {"processor": platform.machine(), "system": platform.system()}
    done = {(d["seed"], d["num_steps"]) for d in (read_jsonl(results) if results.is_file() else [])}
    seeds = parser.parse_args().seeds
    for T in counts:
        for seed in (seed for seed in seeds if (seed, T) not in done):
            prompts, world = (list(prompt_lists["shapes"]) * groups)[:groups], World(policy, T)
            where = {"seed": seed, "num_steps": T, "groups": groups, "ends": ends, "gamma": gamma}
            for name, one, two in zip(rewards, branches(world, prompts, seed), pairs(world, prompts, seed)):
                found = {"reward": name, "branches": one, "pairs": two}
                append_jsonl(results, {**where, **found, "versions": versions(), "machine": machine})
            print(f"seed {seed}, {T} steps: done", flush=True)


if __name__ == "__main__":
    main()
