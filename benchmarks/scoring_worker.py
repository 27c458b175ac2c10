"""What it saves to score in a thread while sampling goes on: rounds of both, with and without, in one run.

    python benchmarks/scoring_worker.py          # the embedded model: a reward that waits, and one that computes
    python benchmarks/scoring_worker.py --waits 0.5 1 2 --micro_batch 2
    python benchmarks/scoring_worker.py --policy FOLDER --precision bf16 --rewards jpeg_compressibility warmth

`--waits` stand for a reward elsewhere: it sleeps, in all for so many times as long as sampling itself takes in this
run. Once in proportion to the pictures, as another GPU would take, and once for as long at each call, however many
pictures it has, as a distant server may. `--rewards` are real ones, which want the same processor (or, on a GPU,
may not). The two ways take turns, `--rounds` times each, and the table gives the median of the ratios. The most
that can be saved is the shorter of the two, sampling or scoring, for all groups of batches but one. One JSON line a
row is added to `--output`.
"""

import argparse
import math
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from halves import first_half, machine

from sdpo_nb.config import TrainConfig, resolve
from sdpo_nb.files import append_jsonl, versions
from sdpo_nb.models import load_policy, precisions
from sdpo_nb.trainer import Trainer


def waiting(of_picture=0.0, of_call=0.0):
    "A reward that lets others work for so many seconds"

    def wait(images, prompts):
        time.sleep(of_picture * len(images) + of_call)
        return images.mean((1, 2, 3))

    return wait


def clock(device) -> float:
    "Seconds of the wall, once a GPU is idle"
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def round_seconds(trainer, epoch):
    "Of the wall, for sampling, scoring and credit"
    device = trainer.policy.device
    started = clock(device)
    first_half(trainer, epoch)
    return clock(device) - started


def make(policy, reward, given, worker, folder):
    config = TrainConfig(
        policy=given.policy,
        precision=given.precision,
        num_steps=given.num_steps,
        pairs_per_epoch=given.pairs_per_epoch,
        pairs_per_update=given.pairs_per_epoch,
        micro_batch=given.micro_batch,
        reward_worker=worker,
        output_dir=f"{folder}/run",
    )
    return Trainer(policy, reward, "shapes", resolve(config), callbacks=[])


def compare(policy, reward, given) -> dict:
    "One row"
    with tempfile.TemporaryDirectory() as folder:
        pairs, trainers = [], {}
        for number in range(-1, given.rounds):  # the first one warms up
            seconds = {}
            for worker in (False, True)[:: 1 if number % 2 else -1]:
                trainers[worker] = make(policy, reward, given, worker, folder)
                seconds[worker] = round_seconds(trainers[worker], number + 1)
            if number >= 0:
                pairs.append((seconds[False], seconds[True]))
    return dict(
        seconds_after_each_other=[a for a, _ in pairs],
        seconds_in_a_thread=[b for _, b in pairs],
        ratio=statistics.median(a / b for a, b in pairs),
        queries=trainers[True].counts["reward_queries"],
        config={**asdict(trainers[True].config), "output_dir": None},
    )


def sampling_seconds(policy, given):
    "What sampling alone takes, and how many pictures a round scores"
    with tempfile.TemporaryDirectory() as folder:
        trainer, times = make(policy, waiting(), given, False, folder), []
        for number in range(3):
            started, trainer.counts["epoch"] = clock(policy.device), number
            rollout = trainer.sample()
            times.append(clock(policy.device) - started)
            trainer.score(rollout)
    return statistics.median(times), rollout.queries


def arguments():
    "What the command line says"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="tiny", help="as load_policy takes it")
    parser.add_argument("--precision", default="fp32", choices=precisions)
    parser.add_argument("--waits", type=float, nargs="*", default=[0.5, 1.0, 2.0], help="as multiples of sampling")
    parser.add_argument("--rewards", nargs="*", default=["jpeg_compressibility", "shapes_aesthetic"])
    parser.add_argument("--micro_batch", type=int, default=4)
    parser.add_argument("--num_steps", type=int, default=10)
    parser.add_argument("--pairs_per_epoch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "scoring_worker.jsonl")
    return parser.parse_args()


def waits(times, alone, pictures):
    "Rewards that wait, by what the table calls them"
    for times_sampling in times:
        seconds = times_sampling * alone
        yield f"waits {times_sampling:g} × sampling, by the picture", waiting(of_picture=seconds / pictures)
        yield f"waits {times_sampling:g} × sampling, by the call", waiting(of_call=seconds / math.ceil(pictures / 64))


def main():
    given = arguments()
    policy = load_policy(given.policy, precision=given.precision)
    alone, pictures = sampling_seconds(policy, given)
    batches = given.pairs_per_epoch // given.micro_batch
    print(f"sampling alone {alone:.2f} s a round of {batches} batches")
    print(f"{'reward':<38}{'after':>10}{'meanwhile':>12}{'times as fast':>15}")
    for name, reward in [*waits(given.waits, alone, pictures), *((name, name) for name in given.rewards)]:
        row = compare(policy, reward, given)
        after, meanwhile = (statistics.median(row[f"seconds_{how}"]) for how in ("after_each_other", "in_a_thread"))
        print(f"{name:<38}{after:>8.2f} s{meanwhile:>10.2f} s{row['ratio']:>14.2f}×", flush=True)
        found = {"reward": name, "sampling_seconds": alone, **row}
        append_jsonl(given.output, {**found, "machine": machine(policy), "versions": versions()})


if __name__ == "__main__":
    main()
