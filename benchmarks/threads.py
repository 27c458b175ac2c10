"""One thread or two, on idle and on busy cores: seconds of an epoch of the embedded model, on the clock on the wall.

    python benchmarks/threads.py                       # one and two threads, beside none and two busy processes
    python benchmarks/threads.py --threads 1 2 4 --busy 0

The numbers of threads take turns, epoch by epoch. `busy` processes count in a loop meanwhile. What else runs on the
machine is not stopped: the load average at the start of a row stands beside it, and of one process more than the
busy ones a quiet machine shows none. One JSON line a row is added to `--output`.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from halves import first_half, machine, second_half

from sdpo_nb.config import TrainConfig
from sdpo_nb.files import append_jsonl, versions
from sdpo_nb.models import load_policy
from sdpo_nb.trainer import Trainer


def count():
    while True:
        pass


@contextmanager
def busy(number):
    "So many processes that use a core each, as far as they get one"
    processes = [multiprocessing.get_context("fork").Process(target=count, daemon=True) for _ in range(number)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def epoch(trainer, number) -> tuple:
    "Seconds on the wall and of the processor"
    started = time.perf_counter(), time.process_time()
    second_half(trainer, first_half(trainer, number))
    return time.perf_counter() - started[0], time.process_time() - started[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "threads.jsonl")
    given = parser.parse_args()
    here = machine(SimpleNamespace(device=torch.device("cpu")))
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(num_steps=2, pairs_per_epoch=16, eval_samples=0, output_dir=folder)
        trainer = Trainer(load_policy("tiny", device="cpu"), "shapes_aesthetic", "shapes", config, callbacks=[])
        for number in given.busy:
            found, load = {threads: [] for threads in given.threads}, os.getloadavg()[0]
            with busy(number):
                for repeat in range(given.epochs + 1):
                    for threads, times in found.items():
                        torch.set_num_threads(threads)
                        times.append(epoch(trainer, repeat))
            for threads, times in found.items():
                wall, cpu = (statistics.median(column) for column in zip(*times[1:]))  # the first warms up
                row = dict(
                    threads=threads, busy=number, wall=wall, cpu=cpu, load_before=round(load, 1), times=times[1:]
                )
                print(
                    f"{threads} threads, {number} busy processes: {wall:.2f} s, {cpu:.2f} of the processor", flush=True
                )
                append_jsonl(given.output, {**row, "machine": here, "versions": versions()})


if __name__ == "__main__":
    main()
