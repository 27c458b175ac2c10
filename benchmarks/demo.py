"""Run the demo once per seed and keep each run's evaluation.

    python benchmarks/demo.py                 # seeds 1, 2, 3 -> benchmarks/results/demo/
    python benchmarks/demo.py --seeds 7 8 9

A seed whose result is there already is left alone, so an interrupted call goes on where it stopped.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from sdpo_nb.config import preset_config, resolve
from sdpo_nb.files import read_json, read_jsonl, versions, write_json

results = Path(__file__).parent / "results" / "demo"


def run(seed: int) -> dict:
    "One `sdpo-train tiny` in a process of its own: settings, versions, machine, wall time, log and evaluation."
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = ["tiny", "--seed", str(seed), "--output_dir", f"{folder}/run"]
        subprocess.run(
            [sys.executable, "-c", "from sdpo_nb.cli import train_command; train_command()", *command], check=True
        )
        seconds = time.perf_counter() - started
        metrics = read_jsonl(f"{folder}/run/metrics.jsonl")
        evaluation = read_json(f"{folder}/run/evaluation.json")
    config = asdict(resolve(preset_config("tiny", seed=seed)))
    counts = {name: metrics[-1][name] for name in ("samples", "reward_queries", "optimizer_steps")}
    evaluations = [
        {
            "sampler": sampler,
            "when": when,
            **(dict.fromkeys(counts, 0) if when == "before" else counts),
            "steps": table["steps"],
            "mean": table[when]["mean"],
            "std": table[when]["std"],
            "n": table["n"],
        }
        for sampler, table in (("ddim", evaluation), ("own", evaluation["own_scheduler"]))
        for when in ("before", "after")
    ]
    return {
        "recipe": config["recipe"],
        "reward": config["reward"],
        "seed": seed,
        "config": config,
        "versions": versions(),
        "machine": {"processor": platform.machine(), "system": platform.system()},
        "seconds": round(seconds, 1),
        "metrics": metrics,
        "evaluation": evaluation,
        "evaluations": evaluations,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    for seed in parser.parse_args().seeds:
        path = results / f"seed_{seed}.json"
        if not path.is_file():
            write_json(path, run(seed))
        found = read_json(path)
        gains = " ".join(
            f"{g:+.2f}±{e:.2f}" for g, e in zip(found["evaluation"]["gain"]["mean"], found["evaluation"]["gain"]["se"])
        )
        print(f"seed {seed}: {found['seconds']:.0f} s, paired gain at {found['evaluation']['steps']} steps: {gains}")


if __name__ == "__main__":
    main()
