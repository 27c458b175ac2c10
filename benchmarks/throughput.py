"""Where the time of an epoch goes: network, decoder, reward and the rest, for every method and model size.

    python benchmarks/throughput.py                                        # the embedded model, every recipe
    python benchmarks/throughput.py --recipes sdpo --micro_batch 1 4 8
    python benchmarks/throughput.py --policy FOLDER --recipes sdpo --precision bf16 --reward jpeg_compressibility

Each line first runs `--epochs` epochs undisturbed (the seconds), then one with a clock around every call of
network, decoder and reward (the shares; clocks wait for a GPU to finish, so they are not used for the seconds), and
one under a counter of floating-point operations. On a CPU the clocks count processor time, which other programs on
the machine disturb little. `of peak` divides the operations by the time in which the network ran and by what a
plain matrix product reaches on the same machine in the same run. One JSON line a row is added to `--output`: the
committed results, unless another file is named.
"""

import argparse
import itertools
import resource
import statistics
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from halves import first_half, machine, second_half
from torch.utils.flop_counter import FlopCounterMode

from sdpo_nb.config import TrainConfig, resolve
from sdpo_nb.files import append_jsonl, versions
from sdpo_nb.models import load_policy, precisions
from sdpo_nb.trainer import Trainer

results = Path(__file__).parent / "results"
parts = ("unet, sampling", "unet, training", "decode", "reward")


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
        ):
            delattr(owner, name)
        trainer.reward = reward


def matrix_rate(device, dtype, repeats=20) -> float:
    "Floating-point operations per second of plain matrix products"
    # one small product on a GPU would time its launch
    size, products = (8192, 10) if device.type == "cuda" else (2048, 1)
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


def epoch(trainer, clock=None):
    "Both halves of an epoch, on noise of its own"
    number, clock = trainer.counts["epoch"], clock or Clock(trainer.policy.device)
    clock.phase = "sampling"
    rollout = first_half(trainer, number)
    clock.phase = "training"
    second_half(trainer, rollout)
    trainer.counts["epoch"] = number + 1
    return rollout


def timed_epochs(trainer, epochs) -> list:
    "Seconds of each, on the device's clock and on the wall's; the first one, which warms up, does not count"
    device, times = trainer.policy.device, []
    for _ in range(epochs + 1):
        started, wall = now(device), time.perf_counter()
        epoch(trainer)
        times.append((now(device) - started, time.perf_counter() - wall))
    return times[1:]


def operations(work, *arguments):
    "Floating-point operations of a call, and what it returns"
    with FlopCounterMode(display=False) as counter:
        found = work(*arguments)
    return counter.get_total_flops(), found


def counted(trainer) -> dict:
    "Operations of both halves of an epoch, and of scoring, which the first half contains"
    sampling, rollout = operations(first_half, trainer, 1000)
    training, _ = operations(second_half, trainer, rollout)
    scoring, _ = operations(trainer.score, rollout)
    return {"rollout": sampling, "update": training, "scoring": scoring}


def measure(policy, config, epochs, rate, flops=None) -> dict:
    "One row; `flops` as `counted` gives them, if they are known"
    trainer, device = Trainer(policy, config.reward, config.prompts, config, callbacks=[]), policy.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = timed_epochs(trainer, epochs)
    seconds, walls = [statistics.median(column) for column in zip(*times)]
    memory = peak_memory(device)
    with clocks(trainer) as clock:
        started = now(device)
        rollout = epoch(trainer, clock)
        whole = now(device) - started
    shares, flops = {name: clock.seconds.get(name, 0.0) / whole for name in parts}, flops or counted(trainer)
    reached = {
        "sampling": (flops["rollout"] - flops["scoring"]) / (clock.seconds["unet, sampling"] * rate),
        "training": flops["update"] / (clock.seconds["unet, training"] * rate),
    }
    trajectories = rollout.log_prob.shape[0] * rollout.log_prob.shape[1]
    trained = trajectories * len(trainer.trained_steps)
    return {
        "seconds_per_epoch": seconds,
        "wall_seconds_per_epoch": walls,
        "all_seconds": times,
        "sampled_steps_per_second": trajectories * config.num_steps / clock.seconds["unet, sampling"],
        "trained_steps_per_second": trained / clock.seconds["unet, training"],
        "shares": shares | {"everything else": 1 - sum(shares.values())},
        "peak_memory_gb": memory,
        "optimizer_steps_per_epoch": trainer.counts["optimizer_steps"] / trainer.counts["epoch"],
        "flops": flops,
        "matrix_flops_per_second": rate,
        "of_peak": reached,
    }


def arguments():
    "What the command line says"
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
    return parser.parse_args()


def show(recipe, precision, micro, row):
    "A line of the table"
    seconds = "".join(f"{share:>16.1%}" for share in row["shares"].values())
    reached = "".join(f"{row['of_peak'][half]:>7.0%}" for half in ("sampling", "training"))
    memory = f"{row['peak_memory_gb']:>7.1f}"
    print(
        f"{recipe:<15}{precision:<10}{micro:>6}{row['seconds_per_epoch']:>9.2f}{seconds}{reached}{memory}", flush=True
    )


def main():
    given = arguments()
    same = {
        name: getattr(given, name) for name in ("policy", "reward", "num_steps", "pairs_per_epoch", "pairs_per_update")
    }
    head = "".join(f"{name:>16}" for name in (*parts, "everything else"))
    print(f"{'recipe':<15}{'precision':<10}{'micro':>6}{'s/epoch':>9}{head}{'of peak':>14}{'GB':>7}")
    for precision in given.precision:
        policy = load_policy(given.policy, precision=precision)
        rate = matrix_rate(policy.device, policy.dtype)
        for recipe, micro in itertools.product(given.recipes, given.micro_batch):
            with tempfile.TemporaryDirectory() as folder:
                own = dict(recipe=recipe, precision=precision, micro_batch=micro, output_dir=f"{folder}/run")
                config = resolve(TrainConfig(**same, **own))
                row = measure(policy, config, given.epochs, rate)
            show(recipe, precision, micro, row)
            line = {"recipe": recipe, "reward": given.reward, "seed": config.seed}
            line |= {"config": {**asdict(config), "output_dir": None}, "versions": versions()}
            append_jsonl(given.output, {**line, "machine": machine(policy), **row, "evaluations": []})


if __name__ == "__main__":
    main()
