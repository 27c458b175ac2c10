"""LaSRO on the embedded model: how much a batch knows about the way up at few steps, and runs with parts changed.

    python benchmarks/lasro.py                   # everything, seeds 1, 2, 3 -> results/experiments/lasro.jsonl
    python benchmarks/lasro.py --groups runs --names LaSRO --seeds 7
    python benchmarks/lasro.py --groups tuning   # its two settings, seed 101 -> results/tuning/lasro.jsonl

Each line is one measurement (group "gradients") or one training (group "runs"). What is there already is left
alone, so an interrupted call goes on where it stopped. On one idle core the whole takes about half an hour, a run a
little less than one minute.
"""

import argparse
import platform
import tempfile
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from evaluations import progress, table
from experiments import shorten
from halves import backward, first_half, take_gradient, updates

from sdpo_nb.config import TrainConfig, resolve
from sdpo_nb.evaluate import step_generalization
from sdpo_nb.files import append_jsonl, read_jsonl, versions
from sdpo_nb.lasro import LaSROConfig, LaSROTrainer
from sdpo_nb.models import load_policy
from sdpo_nb.prompts import balanced
from sdpo_nb.run import Callback
from sdpo_nb.shapes import all_captions
from sdpo_nb.trainer import Trainer

results = Path(__file__).parent / "results"
reward, other = "shapes_aesthetic", "shapes_alignment"
unseen = [caption for caption in all_captions() if caption not in balanced][::7][:24]
steps = (1, 2, 4, 8, 16, 50)  # up to 8 for unseen captions, as the long ones take most of the time
common = dict(reward=reward, eval_samples=0, checkpoint_every=1000)  # all else by default; no bearing on what is learnt
defaults = LaSROConfig()
# 1,272 reward queries: 26*6*2 before the first round and 8*6*2 in each of ten. SDPO asks 1,280 in 16 epochs
variants = {  # name -> what is changed
    "LaSRO": {},
    "no online adaptation": {"surrogate_steps": 0},  # nothing learns from the rounds' 960 queries: they only watch
    "no anchor": {"reference_penalty": 0.0},
    "three times the learning rate": {"learning_rate": 3 * defaults.learning_rate},
    "only the head learns, ten times as fast": {  # a head alone is slow
        "surrogate_learns": "head",
        "surrogate_learning_rate": 10 * defaults.surrogate_learning_rate,
    },
    "no gradient through the re-noising": {"through_noise": False},
    # twice the prompts, as each sample is one query instead of two
    "one step": {"num_steps": 1, "pretrain_prompts": 52, "pairs_per_epoch": 16},
}
tuning = {
    f"learning rate {rate:g}, anchor {weight:g}": {"learning_rate": rate, "reference_penalty": weight}
    for rate, weight in ((1e-3, 1.5), (3e-3, 1.5), (1e-3, 0.5), (3e-3, 15.0))
}


# --- runs ----------------------------------------------------------------------------------------


def measure(policy, prompts) -> dict:
    "Reward, alignment, agreement and diversity at every step count, on fixed pairs of prompt and noise"
    found = step_generalization(
        policy,
        reward,
        list(prompts),
        steps=steps if prompts is balanced else steps[:4],
        samples=48,
        seed=2000,
        other_rewards={other: other},
    )
    return {
        "prompts": "trained" if prompts is balanced else "unseen",
        **table(found),
        "other_rewards": {other: found.other_rewards[other].mean(1).tolist()},
    }


@cache
def measure_before() -> list:
    "The same before training, whatever the run"
    policy = load_policy("tiny", device="cpu")
    return [measure(policy, prompts) for prompts in (balanced, unseen)]


class Measure(Callback):
    "Before the first and after the last round"

    def __init__(self):
        self.evaluations = []

    def note(self, trainer, found):
        self.evaluations += [{**progress(trainer), **record} for record in found]

    def before_train(self, trainer):
        self.note(trainer, measure_before())

    def after_train(self, trainer):
        self.note(trainer, [measure(trainer.policy, prompts) for prompts in (balanced, unseen)])


def line(group, name, config, started, **found) -> dict:
    "What every line holds"
    return {
        "group": group,
        "name": name,
        "recipe": config.recipe,
        "reward": reward,
        "seed": config.seed,
        "config": {**asdict(config), "output_dir": None},
        "versions": versions(),
        "machine": {"processor": platform.machine(), "system": platform.system()},
        "cpu_seconds": round(time.process_time() - started, 1),
        **shorten(found),
    }


def run(group, name, changes, seed) -> dict:
    "One training, watched by the reward that it trains for and by others"
    started, watcher = time.process_time(), Measure()
    with tempfile.TemporaryDirectory() as folder:
        config = resolve(LaSROConfig(**{**common, **changes}, seed=seed, output_dir=f"{folder}/run"))
        LaSROTrainer(load_policy("tiny", device="cpu"), reward, "shapes", config, [watcher]).train()
        metrics = read_jsonl(f"{folder}/run/metrics.jsonl")
    return line(group, name, config, started, metrics=metrics, evaluations=watcher.evaluations)


# --- gradients -----------------------------------------------------------------------------------

batches, trajectories = 8, 32


def policy_gradients(recipe, num_steps, seed, **changes) -> tuple:
    "Gradients of independent batches, all trained steps of all trajectories in each; the trainer that made them"
    if num_steps == 1:
        # without these SDPO has no signal at one step, and says so
        changes |= dict(credit="reward_to_go", train_last_step=True)
    config = TrainConfig(
        recipe=recipe,
        reward=reward,
        num_steps=num_steps,
        pairs_per_epoch=trajectories // 2,
        order="step_accumulated",
        eval_samples=0,
        seed=seed,
        **changes,
    )
    trainer, gradients = Trainer(load_policy("tiny", device="cpu"), reward, "shapes", config, []), []
    for epoch in range(batches):
        rollout = first_half(trainer, epoch)
        (update,) = updates(trainer, rollout)
        backward(trainer, rollout, update)
        gradients.append(take_gradient(trainer))
    return torch.stack(gradients), trainer


def surrogate_gradients(num_steps, seed) -> tuple:
    "The same of a surrogate that was fitted once"
    settings = {**common, "reference_penalty": 0.0, "generator_batch": trajectories}
    config = LaSROConfig(**settings, num_steps=num_steps, seed=seed)
    trainer, gradients = LaSROTrainer(load_policy("tiny", device="cpu"), reward, "shapes", config, []), []
    trainer.pretrain()
    trainer.scale.update(trainer.surrogate_scores(trainer.before["outputs"], trainer.before["prompts"]), recentre=True)
    trainer.surrogate.learning(False)
    trainer.optimizer_step = lambda: gradients.append(take_gradient(trainer)) or 0.0
    for number in range(batches):
        trainer.generator_step(number)
    return torch.stack(gradients), trainer


def signal_and_noise(gradients) -> tuple:
    "Unbiased squared length of the expected gradient, and mean squared distance of a batch's gradient from it"
    count, total = len(gradients), gradients.square().sum(1)
    signal = ((gradients.sum(0).square().sum() - total.sum()) / (count * (count - 1))).item()
    return signal, total.mean().item() - signal


@torch.no_grad()
def reward_of_a_step(trainer, gradient, moved=0.1) -> dict:
    """The change of reward, by step count, when the weights go against the gradient.

    They go until one-step outputs have moved by so much (root mean square)."""
    policy, prompts, seeds = trainer.policy, list(balanced) * 4, list(range(48))
    start = [parameter.clone() for parameter in trainer.parameters]

    def outputs(count):
        return policy.sample(prompts, count, seeds=seeds, return_latents=True)

    def go(length):
        parts = gradient.split([parameter.numel() for parameter in trainer.parameters])
        for parameter, origin, part in zip(trainer.parameters, start, parts):
            parameter.copy_(origin - length * part.view_as(parameter) / gradient.norm())

    def rewards():
        return {count: trainer.score_latents(outputs(count), prompts) for count in (1, 2)}

    before, first = rewards(), outputs(1)
    go(length := 0.01)
    for _ in range(3):
        go(length := length * moved / (outputs(1) - first).square().mean().sqrt().item())
    change = {count: after - before[count] for count, after in rewards().items()}
    return {
        "steps": [1, 2],
        "mean": [change[count].mean().item() for count in (1, 2)],
        "standard_error": [(change[count].std() / len(prompts) ** 0.5).item() for count in (1, 2)],
    }


apart = {"sampling": "independent_pair"}  # the two of a pair begin with noise of their own; all else as SDPO
methods = {
    f"{label}, T={count}": (recipe, count, changes)
    for label, recipe, changes in (
        ("SDPO", "sdpo", {}),
        ("SDPO unpaired", "sdpo", apart),
        ("DDPO", "ddpo", {}),
        ("surrogate", None, {}),
    )
    for count in (10, 2, 1)
    if recipe or count <= 2
}


def gradients(name, seed) -> dict:
    "How much of a batch's gradient is signal, and what its direction is worth"
    started, (recipe, count, changes) = time.process_time(), methods[name]
    found, trainer = policy_gradients(recipe, count, seed, **changes) if recipe else surrogate_gradients(count, seed)
    signal, noise = signal_and_noise(found)
    return line(
        "gradients",
        name,
        trainer.config,
        started,
        num_steps=count,
        batches=batches,
        trajectories=trajectories,
        signal=signal,
        noise=noise,
        reward_queries=trainer.counts["reward_queries"],
        change=reward_of_a_step(trainer, found.mean(0)),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", nargs="+", choices=("gradients", "runs", "tuning"), default=["gradients", "runs"])
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument(
        "--names", nargs="+", help="of the measurements, settings or variants; all of the group without it"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    for group in given.groups:
        work = {"gradients": methods, "runs": variants, "tuning": tuning}[group]
        path = results / "tuning" / "lasro.jsonl" if group == "tuning" else results / "experiments" / "lasro.jsonl"
        for seed in given.seeds or ([101] if group == "tuning" else [1, 2, 3]):
            for name in given.names or work:
                done = {
                    (record["group"], record["name"], record["seed"])
                    for record in (read_jsonl(path) if path.is_file() else [])
                }
                if name not in work or (group, name, seed) in done:
                    continue
                found = gradients(name, seed) if group == "gradients" else run(group, name, work[name], seed)
                append_jsonl(path, found)
                if group == "gradients":
                    summary = f"signal/noise {found['signal'] / found['noise']:.4f}, change {found['change']['mean']}"
                else:
                    before, after = (
                        [e["mean"] for e in found["evaluations"] if e["prompts"] == "trained"][i] for i in (0, -1)
                    )
                    summary = "gain " + ", ".join(f"{b - a:+.3f}" for a, b in zip(before, after)) + f" at {steps}"
                print(f"{group}, {name}, seed {seed}: {found['cpu_seconds']:.0f} CPU s, {summary}", flush=True)


if __name__ == "__main__":
    main()
