"""What holds for a flow transformer: the embedded flow model under every kernel, its dense rewards, and trained.

    python benchmarks/flow_evidence.py                          # every group below, in this order, on its own seeds
    python benchmarks/flow_evidence.py kernels --seeds 7 8

Each group is a file benchmarks/results/flow/GROUP.jsonl. A line that is there already is not measured again, so an
interrupted call goes on where it stopped. The groups: kernels (reward and agreement of the untrained model by the rule
for fresh noise and by step count), fidelity (the predicted clean sample's reward against the last picture's, and the
filled-in rewards against true ones, beside the UNet's), training (methods of `experiments.py` on the flow model, and
SDPO with other rules for fresh noise; gain and agreement at every step count, after at most 1,280 reward queries),
early (the first quarter of a run again, measured twice, for methods of which a seed had lost more than 3 points of
agreement at half), rates (the learning rates of five methods, halved and doubled; neither their seeds, 101 and 102,
nor the pairs that they are judged on are reported elsewhere).
"""

import argparse
import os
import platform
import tempfile
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from statistics import mean

import torch
from dense_rewards import agreement, compare, fill, queried_steps, rounded, sample, within_prompt
from experiments import (
    Measure,
    Method,
    evaluation_seed,
    frontier_methods,
    frontier_queries,
    measure,
    queries_of,
    search_evaluation_seed,
    shorten,
    shuffled,
    trainer_class,
)
from experiments import Run as Training

from sdpo_nb.cli import method_settings
from sdpo_nb.config import resolve
from sdpo_nb.evaluate import read_attributes
from sdpo_nb.files import append_jsonl, read_jsonl, versions
from sdpo_nb.frontier import frontier_path
from sdpo_nb.models import load_policy
from sdpo_nb.rewards import checked, get_reward
from sdpo_nb.samplers import FlowSampler
from sdpo_nb.shapes import all_captions, load_network

results = Path(__file__).parent / "results" / "flow"
quality, alignment = "shapes_aesthetic", "shapes_alignment"
machine = {"processor": platform.machine(), "system": platform.system(), "cores": os.cpu_count()}


def lines(group) -> list:
    "What a group has so far"
    path = results / f"{group}.jsonl"
    return read_jsonl(path) if path.is_file() else []


# --- kernels -------------------------------------------------------------------------------------


class FlowGRPOSampler(FlowSampler):
    """The step of Flow-GRPO (arXiv 2505.05470; `sd3_sde_with_logprob.py` of its code), a = 0.7.

    It keeps the clean sample's share, but the total noise exceeds that of the level. At σ = 1 its formula divides by
    zero; as the code does, 1 - σ is that of the second level there."""

    def tables(self, timesteps, dtype):
        s, after = self.sigmas[:-1], self.sigmas[1:]
        low = torch.where(s == 1, self.sigmas[1], s) if len(s) > 1 else torch.full_like(s, 0.99)
        squared, h = 0.7**2 * s / (1 - low), s - after
        of_x, of_v = 1 - squared * h / (2 * s), h * (1 + squared * (1 - s) / (2 * s))
        std = (squared * h).sqrt()
        std[-1] = 0.0  # the picture is not noised
        of_x[-1], of_v[-1] = 1.0, h[-1]
        kept = of_x * s - of_v
        return 1 - s, s, of_x * (1 - s) + of_v, (kept**2 + std**2).sqrt(), std, kept


kernels = {
    "ODE": lambda levels: FlowSampler(levels, eta=0.0),
    "CPS 0.5": lambda levels: FlowSampler(levels, eta=0.5),
    "CPS 0.8": lambda levels: FlowSampler(levels, eta=0.8),
    "CPS 1": lambda levels: FlowSampler(levels, eta=1.0),
    "DDIM rule": lambda levels: FlowSampler(levels, eta=1.0, rule="ddim"),
    "Flow-GRPO": FlowGRPOSampler,
}
kernel_steps, kernel_pictures = (1, 2, 4, 8, 16, 50), 96


@cache
def untrained():
    "The policy as it is shipped, the oracle, and rewards"
    judges = {name: get_reward(name) for name in (quality, alignment)}
    return load_policy("tiny_flow", device="cpu"), load_network("oracle"), judges


def use_kernel(policy, name):
    "The policy samples by this rule from now on, whatever the settings say of its noise"
    policy.sampler = lambda num_steps, *rest, **options: kernels[name](policy.noise_levels(num_steps))


def measure_kernel(name, num_steps, seed) -> dict:
    "One line: the untrained model's pictures of full captions"
    (policy, oracle, judges), captions = untrained(), all_captions()
    use_kernel(policy, name)
    prompts = [captions[(seed * 31 + index * 7) % len(captions)] for index in range(kernel_pictures)]
    images = policy.sample(prompts, num_steps, seeds=[seed * 10_000 + index for index in range(kernel_pictures)])
    right = read_attributes(oracle, images, prompts)
    sampler = policy.sampler(num_steps)
    return {
        "rewards": {r: checked(judge, images, prompts).mean().item() for r, judge in judges.items()},
        "agreement": torch.stack([*right.values()]).prod(0).mean().item(),
        "attributes": {attribute: values.mean().item() for attribute, values in right.items()},
        "std": sampler.std.tolist() if num_steps <= 16 else None,
        "excess": ((sampler.std**2 + sampler.direction**2).sqrt() - sampler.sigmas[1:]).max().item(),
        "pictures": kernel_pictures,
    }


def kernel_lines(seeds):
    known = {(line["kernel"], line["num_steps"], line["seed"]) for line in lines("kernels")}
    for seed in seeds:
        for num_steps in kernel_steps:
            for name in kernels:
                if (name, num_steps, seed) not in known:
                    yield {"kernel": name, "num_steps": num_steps, "seed": seed} | measure_kernel(name, num_steps, seed)


# --- fidelity ------------------------------------------------------------------------------------


@torch.no_grad()
def fidelity(policy, num_steps, seed) -> dict:
    "By reward and step: what a predicted clean sample's reward tells of the picture's, and what filling in adds"
    prompts, pred_x0, pictures = sample(load_policy(policy, device="cpu"), seed, num_steps)
    pred_x0, prompts, found = pred_x0.flatten(0, 1), prompts * 2, {}
    for name in (quality, alignment):
        asked = [prompt for prompt in prompts for _ in range(num_steps)]
        true = checked(get_reward(name), pictures.flatten(0, 2), asked).view(len(prompts), -1)
        by_pair = true.unflatten(0, (2, -1))
        filled = fill("similarity", pred_x0, queried_steps("interior", pred_x0, seed), true).view_as(by_pair)
        last = by_pair[..., -1:].expand_as(by_pair)
        found[name] = {
            "mean": rounded(true.mean(0)),
            "of_the_last": rounded(agreement(within_prompt(by_pair), within_prompt(last)).nanmean(0)),
            "filled": compare(filled, by_pair),
        }
    return found


def fidelity_lines(seeds):
    known = {(line["policy"], line["num_steps"], line["seed"]) for line in lines("fidelity")}
    for seed in seeds:
        for num_steps in (4, 10):
            for policy in ("tiny", "tiny_flow"):
                if (policy, num_steps, seed) not in known:
                    what = {"policy": policy, "num_steps": num_steps, "seed": seed}
                    yield what | {"rewards": fidelity(policy, num_steps, seed)}


# --- training ------------------------------------------------------------------------------------

many = dict(learning_rate=1e-3, pairs_per_update=4)  # of 16 pairs: what the UNet's searches liked; see the rates
few = dict(learning_rate=3e-3)  # where an epoch is one update
trainings = {
    "SDPO, T=2": (Method("sdpo", dict(num_steps=2)), many),
    "SDPO, T=4": (Method("sdpo", dict(num_steps=4)), many),
    "Branch, mixed T + KL": (frontier_methods["Branch, mixed T + KL"], many),
    "DDPO, even steps, T=2": (frontier_methods["DDPO, T=2"], many),
    "DDPO, even steps, T=4": (frontier_methods["DDPO, T=4"], many),
    "DDPO as published, T=2": (Method("ddpo", dict(num_steps=2)), few),
    "DDPO as published, T=4": (Method("ddpo", dict(num_steps=4)), few),
    "SDPO, T=10": (Method("sdpo"), many),
    "SDPO, T=4, CPS 0.8": (Method("sdpo", dict(num_steps=4, eta=0.8)), many),
    "SDPO, T=4, CPS 0.5": (Method("sdpo", dict(num_steps=4, eta=0.5)), many),
    "SDPO, T=4, DDIM rule": (Method("sdpo", dict(num_steps=4)), many),
    "SDPO, T=4, Flow-GRPO": (Method("sdpo", dict(num_steps=4)), many),
    "Branch, T=10 + KL": (Method("sdpo_branch", dict(num_steps=10)), many),  # that penalty is the recipe's own
    "DDPO as published, T=10": (Method("ddpo"), few),
    "DDPO, even steps, T=10": (Method("ddpo", shuffled), many),
}
sampled_by = {name: name.removeprefix("SDPO, T=4, ") for name in trainings if name.endswith(("DDIM rule", "Flow-GRPO"))}
final = {64: (1, 2, 4), 48: (8,), 32: (16,), 16: (50,)}  # pairs -> step counts measured on so many


def training(name, seed, factor=1) -> Training:
    "Settings of a run, for as many epochs as the queries last; where the number of steps is drawn, in the mean"
    method, rates = trainings[name]
    given = dict(recipe=method.recipe, reward=quality, prompts="shapes", seed=seed, policy="tiny_flow")
    given |= dict(eval_samples=0) | rates | method.changes
    given["learning_rate"] *= factor
    config = method_settings(method.recipe)(**given)
    epochs = int(frontier_queries / queries_of(config, mean) + (queries_of(config) != queries_of(config, mean)))
    return Training("training", name, replace(config, epochs=epochs, checkpoint_every=epochs))


@cache
def before(samples, steps, pairs_seed) -> dict:
    "The untrained model on the pairs of the end"
    return measure(load_policy("tiny_flow", device="cpu"), "trained", steps, samples, pairs_seed, quality)


class MeasureAfter(Measure):
    "Before training, and after these epochs"

    def __init__(self, epochs, pairs_seed):
        super().__init__()
        self.epochs, self.pairs_seed = epochs, pairs_seed

    def before_train(self, trainer):
        for samples, steps in final.items():
            self.note(trainer, before(samples, steps, self.pairs_seed))

    def after_epoch(self, trainer, metrics):
        started = time.perf_counter()
        if metrics["epoch"] in self.epochs:
            for samples, steps in final.items():
                self.note(trainer, measure(trainer.policy, "trained", steps, samples, self.pairs_seed, quality))
        self.seconds += time.perf_counter() - started


def train(run, times=(1 / 2, 1), pairs_seed=evaluation_seed) -> dict:
    "Train as far as the last of these shares of the epochs, and measure at each: a line"
    epochs = {max(1, int(share * run.config.epochs)) for share in times}
    measuring, started = MeasureAfter(epochs, pairs_seed), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = replace(run.config, epochs=max(epochs), output_dir=f"{folder}/run")
        policy = load_policy("tiny_flow", device="cpu")
        if run.name in sampled_by:
            use_kernel(policy, sampled_by[run.name])
        trainer = trainer_class(run)(policy, config.reward, config.prompts, config, callbacks=[measuring])
        policy.__dict__.pop("sampler", None)  # the trainer keeps its sampler; all runs are measured with the policy's
        trainer.train()
        metrics = read_jsonl(f"{folder}/run/metrics.jsonl")
    config = asdict(resolve(config)) | {"output_dir": None}
    seconds = {"all": time.perf_counter() - started, "evaluation": measuring.seconds}
    return shorten({"config": config, "seconds": seconds, "metrics": metrics, "evaluations": measuring.evaluations})


def training_lines(seeds):
    for seed in seeds:
        for name in trainings:  # another process may be at work, too
            if (name, seed) not in {(line["name"], line["seed"]) for line in lines("training")}:
                yield {"name": name, "seed": seed} | train(training(name, seed))


def lost_early() -> set:
    "Methods of which a seed had lost more than 3 points of agreement at half"
    return {line["name"] for line in lines("training") if frontier_path(line).agreement[1].mean() < -0.03}


def early_lines(seeds):
    "Between the start and the half of a run that has lost much by then, a straight line says too little"
    known = {(line["name"], line["seed"]) for line in lines("early")}
    for name in (name for name in trainings if name in lost_early()):
        for seed in seeds:
            if (name, seed) not in known:
                yield {"name": name, "seed": seed} | train(training(name, seed), times=(1 / 8, 1 / 4))


# --- learning rates ------------------------------------------------------------------------------

searched = (
    "SDPO, T=2",
    "DDPO, even steps, T=2",
    "DDPO as published, T=2",
    "Branch, mixed T + KL",
    "SDPO, T=4",
)
factors = (1, 0.5, 2)


def rate_lines(seeds):
    known = {(line["name"], line["factor"], line["seed"]) for line in lines("rates")}
    for seed in seeds:
        for name in searched:
            for factor in factors:
                if (name, factor, seed) not in known:
                    line = train(training(name, seed, factor), pairs_seed=search_evaluation_seed)
                    del line["metrics"]
                    yield {"name": name, "factor": factor, "seed": seed} | line


groups = {  # name -> lines, and seeds
    "kernels": (kernel_lines, (1, 2, 3)),
    "fidelity": (fidelity_lines, (1, 2, 3)),
    "training": (training_lines, (1, 2, 3)),
    "early": (early_lines, (1, 2, 3)),
    "rates": (rate_lines, (101, 102)),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(groups))
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the group's own")
    given = parser.parse_args()
    for name in given.groups:
        if name not in groups:
            parser.error(f"GROUP is {name!r}; choose among {', '.join(groups)}")
    torch.set_num_threads(1)
    for name in given.groups or groups:
        measured, seeds = groups[name]
        for line in measured(given.seeds or seeds):
            append_jsonl(results / f"{name}.jsonl", {"group": name} | line | dict(versions=versions(), machine=machine))
            told = ("kernel", "policy", "name", "factor", "num_steps", "seed")
            print(name, *[line[key] for key in told if key in line])


if __name__ == "__main__":
    main()
