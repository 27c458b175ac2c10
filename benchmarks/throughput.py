"""Where the time of an epoch goes: network, decoder, reward and the rest, for every method and model size.

    python benchmarks/throughput.py                                        # the embedded model, every recipe
    python benchmarks/throughput.py --recipes sdpo --micro_batch 1 4 8
    python benchmarks/throughput.py --policy FOLDER --recipes sdpo --precision bf16 --reward jpeg_compressibility --output mine.jsonl

Each line first runs `--epochs` epochs undisturbed (the seconds), then one with a clock around every call of network, decoder
and reward (the shares; clocks wait for a GPU to finish, so they are not used for the seconds), and one under a counter of
floating-point operations. On a CPU the clocks count processor time, which other programs on the machine disturb little.
`of peak` divides the operations by the time in which the network ran and by what a plain matrix product reaches on the same
machine in the same run. One JSON line a row is added to `--output`: the committed results, unless another file is named.
"""

import argparse
import os
import platform
import resource
import statistics
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from sdpo_nb.config import TrainConfig, resolve
from sdpo_nb.files import append_jsonl
from sdpo_nb.models import load_policy, precisions
from sdpo_nb.trainer import Trainer, versions

results = Path(__file__).parent / "results"


def now(device) -> float:
    "Seconds on a clock that fits the device: of the wall once a GPU is idle, of the processor without one"
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


class Clock:
    "Seconds spent inside some functions, by name; what is called inside a timed call counts for the outer one only"

    def __init__(self, device):
        self.device, self.seconds, self.inside, self.phase = device, {}, False, None

    def timed(self, function, name):
        def run(*args, **options):
            if self.inside:
                return function(*args, **options)
            started, self.inside = now(self.device), True
            try:
                return function(*args, **options)
            finally:
                self.inside, label = False, name() if callable(name) else name
                self.seconds[label] = self.seconds.get(label, 0.0) + now(self.device) - started

        return run


@contextmanager
def clocks(trainer):
    "A clock around network, gradient, decoder and reward of a trainer"
    clock, policy, reward = Clock(trainer.policy.device), trainer.policy, trainer.reward

    def in_phase(function, phase):
        def run(*args):
            clock.phase = phase
            return function(*args)

        return run

    trainer.rollout, trainer.update = in_phase(trainer.rollout, "sampling"), in_phase(trainer.update, "training")
    policy.predict = clock.timed(policy.predict, lambda: f"unet, {clock.phase}")
    policy.decode = clock.timed(policy.decode, "decode")
    trainer.accelerator.backward = clock.timed(trainer.accelerator.backward, "unet, training")
    trainer.reward = clock.timed(reward, "reward")
    trainer.reward.name = reward.name
    try:
        yield clock
    finally:
        for owner, name in (
            (policy, "predict"),
            (policy, "decode"),
            (trainer.accelerator, "backward"),
            (trainer, "rollout"),
            (trainer, "update"),
        ):
            delattr(owner, name)
        trainer.reward = reward


def matrix_rate(device, dtype, repeats=20) -> float:
    "Floating-point operations per second of plain matrix products"
    size, products = (
        (8192, 10) if device.type == "cuda" else (2048, 1)
    )  # one small product on a GPU would time its launch
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(repeats):
        started = now(device)
        for _ in range(products):
            a @ b
        best = min(best, now(device) - started)
    return 2 * size**3 * products / best


def peak_memory(device) -> float:
    "Gigabytes: of the GPU since the last reset, or of this process"
    return (
        torch.cuda.max_memory_allocated(device) / 1e9
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    )


def epoch(trainer):
    "Both halves of an epoch, on noise of its own"
    rollout = trainer.rollout(trainer.counts["epoch"])
    trainer.update(rollout, trainer.counts["epoch"])
    trainer.counts["epoch"] += 1
    return rollout


def measure(policy, config, epochs, rate) -> dict:
    "One row"
    trainer = Trainer(policy, config.reward, config.prompts, config, callbacks=[])
    device = policy.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    epoch(trainer)  # the first one warms up
    times = []
    for _ in range(epochs):
        started, wall = now(device), time.perf_counter()
        epoch(trainer)
        times.append((now(device) - started, time.perf_counter() - wall))
    seconds, walls = [statistics.median(column) for column in zip(*times)]
    memory = peak_memory(device)
    with clocks(trainer) as clock:
        started = now(device)
        rollout = epoch(trainer)
        clocked = now(device) - started
    with FlopCounterMode(display=False) as sampling:
        rollout = trainer.rollout(1000)
    with FlopCounterMode(display=False) as training:
        trainer.update(rollout, 1000)
    shares = {
        name: clock.seconds.get(name, 0.0) / clocked
        for name in ("unet, sampling", "unet, training", "decode", "reward")
    }
    shares["everything else"] = 1 - sum(shares.values())
    trajectories, steps = rollout.log_prob.shape[0] * rollout.log_prob.shape[1], config.num_steps
    with FlopCounterMode(display=False) as decoding:
        trainer.score(rollout, 1000)
    of_peak = {
        "sampling": (sampling.get_total_flops() - decoding.get_total_flops())
        / (clock.seconds["unet, sampling"] * rate),
        "training": training.get_total_flops() / (clock.seconds["unet, training"] * rate),
    }
    return {
        "seconds_per_epoch": seconds,
        "wall_seconds_per_epoch": walls,
        "all_seconds": times,
        "sampled_steps_per_second": trajectories * steps / clock.seconds["unet, sampling"],
        "trained_steps_per_second": trajectories * len(trainer.trained_steps) / clock.seconds["unet, training"],
        "shares": shares,
        "flops": {"rollout": sampling.get_total_flops(), "update": training.get_total_flops()},
        "matrix_flops_per_second": rate,
        "of_peak": of_peak,
        "peak_memory_gb": memory,
        "optimizer_steps_per_epoch": trainer.counts["optimizer_steps"] / trainer.counts["epoch"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="tiny", help="as load_policy takes it")
    parser.add_argument("--recipes", nargs="+", default=["sdpo", "sdpo_gain", "ddpo", "d3po", "rebel"])
    parser.add_argument("--reward", default="shapes_aesthetic")
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=precisions)
    parser.add_argument("--micro_batch", type=int, nargs="+", default=[8])
    parser.add_argument("--num_steps", type=int, default=10)
    parser.add_argument("--pairs_per_epoch", type=int, default=16)
    parser.add_argument("--pairs_per_update", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--output", type=Path, default=results / "throughput.jsonl")
    given = parser.parse_args()
    print(
        f"{'recipe':<15}{'precision':<10}{'micro':>6}{'s/epoch':>9}"
        + "".join(f"{name:>16}" for name in ("unet, sampling", "unet, training", "decode", "reward", "everything else"))
        + f"{'of peak':>14}{'GB':>7}"
    )
    for precision in given.precision:
        policy = load_policy(given.policy, precision=precision)
        rate = matrix_rate(policy.device, policy.dtype)
        for recipe in given.recipes:
            for micro in given.micro_batch:
                with tempfile.TemporaryDirectory() as folder:
                    config = resolve(
                        TrainConfig(
                            policy=given.policy,
                            recipe=recipe,
                            reward=given.reward,
                            precision=precision,
                            micro_batch=micro,
                            num_steps=given.num_steps,
                            pairs_per_epoch=given.pairs_per_epoch,
                            pairs_per_update=given.pairs_per_update,
                            output_dir=f"{folder}/run",
                        )
                    )
                    row = measure(policy, config, given.epochs, rate)
                print(
                    f"{recipe:<15}{precision:<10}{micro:>6}{row['seconds_per_epoch']:>9.2f}"
                    + "".join(f"{share:>16.1%}" for share in row["shares"].values())
                    + f"{row['of_peak']['sampling']:>7.0%}{row['of_peak']['training']:>7.0%}{row['peak_memory_gb']:>7.1f}",
                    flush=True,
                )
                device = torch.cuda.get_device_name() if policy.device.type == "cuda" else platform.machine()
                append_jsonl(
                    given.output,
                    {
                        "recipe": recipe,
                        "reward": given.reward,
                        "seed": config.seed,
                        "config": {**asdict(config), "output_dir": None},
                        "versions": versions(),
                        "machine": {
                            "device": device,
                            "system": platform.system(),
                            "cores": os.cpu_count(),
                            "threads": torch.get_num_threads(),
                        },
                        **row,
                        "evaluations": [],
                    },
                )


if __name__ == "__main__":
    main()
