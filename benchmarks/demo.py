"""Run the demo once per seed and keep each run's evaluation.

    python benchmarks/demo.py              # seeds 10, 11, 12: benchmarks/results/demo/, and the README's picture
    python benchmarks/demo.py --seeds 1 2
    python benchmarks/demo.py --preset tiny_flow   # the same for the flow model: benchmarks/results/flow/demo/
    python benchmarks/demo.py --trials     # how the KL penalty was chosen: benchmarks/results/tuning/demo.jsonl
    python benchmarks/demo.py --base       # the copy of the evaluation before that comes with the package

Nothing else should run meanwhile, as times are reported, too. The picture, nbs/images/demo.png, is that of the first
seed. A seed whose result is there already is left alone, so an interrupted call goes on where it stopped.
"""

import argparse
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from sdpo_nb import callbacks
from sdpo_nb.config import preset_config, resolve
from sdpo_nb.evaluate import step_generalization, usual_steps
from sdpo_nb.files import append_jsonl, read_json, read_jsonl, versions, write_json
from sdpo_nb.models import load_policy
from sdpo_nb.run import Callback
from sdpo_nb.trainer import Trainer

here = Path(__file__).parent / "results"
results, tried = {"tiny": here / "demo", "tiny_flow": here / "flow" / "demo"}, here / "tuning" / "demo.jsonl"
trials = (  # what is changed in the preset; seeds, which are not reported; when to measure
    ({"kl_coefficient": 0.0}, (101,), (18, 22, 25, 28)),
    ({"kl_coefficient": 0.0}, (102,), (18, 22)),
    ({"kl_coefficient": 0.05}, (101, 102, 103), (28,)),
    ({"kl_coefficient": 0.1}, (101,), (28, 32)),
    ({"kl_coefficient": 0.0, "reward": "1*shapes_warmth+0.8*shapes_alignment"}, (101,), (24,)),
)
picture = Path(__file__).parents[1] / "nbs" / "images" / "demo.png"


def keep_base():
    "Evaluate the embedded model as the demo does before training, for the copy that comes with the package."
    with tempfile.TemporaryDirectory() as folder:
        config = preset_config("tiny", output_dir=folder)
        trainer = Trainer(load_policy("tiny", device="cpu"), config.reward, config.prompts, config, callbacks=[])
        watcher = callbacks.EvaluationCallback()
        key = callbacks._evaluation_key(trainer, watcher.pairs(trainer))
        with trainer.policy.without_lora():
            found = watcher.both(trainer, "before")
    callbacks._keep_copy(callbacks._shipped, key, found)


def cpu_seconds() -> float:
    "What the processes started from here have used so far, once they have ended."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def evaluations(evaluation: dict, counts: dict) -> list:
    "Both tables of an evaluation, before and after, with what had been spent by then."
    return [
        {
            "sampler": sampler,
            "when": when,
            **(dict.fromkeys(counts, 0) if when == "before" else counts),
            "steps": table["steps"],
            "mean": table[when]["mean"],
            "std": table[when]["std"],
            "n": table["n"],
            "pairs": table["pairs"],
        }
        for sampler, table in (("ddim", evaluation), ("own", evaluation["own_scheduler"]))
        for when in ("before", "after")
    ]


def run(seed: int, picture: Path = None, words=(), preset="tiny") -> dict:
    "One `sdpo-train` of a preset, with more `words`, by itself: settings, versions, machine, times, log, evaluation."
    with tempfile.TemporaryDirectory() as folder:
        started, used = time.perf_counter(), cpu_seconds()
        words = [preset, "--seed", str(seed), "--output_dir", f"{folder}/run", *words]
        command = [sys.executable, "-c", "from sdpo_nb.cli import train_command; train_command()", *words]
        subprocess.run(command, check=True)
        seconds, used = time.perf_counter() - started, cpu_seconds() - used
        metrics = read_jsonl(f"{folder}/run/metrics.jsonl")
        evaluation = read_json(f"{folder}/run/evaluation.json")
        if picture:
            shutil.copy(f"{folder}/run/pictures/step_grid.png", picture)
    config = asdict(resolve(preset_config(preset, seed=seed)))
    counts = {name: metrics[-1][name] for name in ("samples", "reward_queries", "optimizer_steps")}
    return {
        "recipe": config["recipe"],
        "reward": config["reward"],
        "seed": seed,
        "config": config,
        "versions": versions(),
        "machine": {"processor": platform.machine(), "system": platform.system()},
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used, 1),
        "metrics": metrics,
        "evaluation": evaluation,
        "evaluations": evaluations(evaluation, counts),
    }


def summary(seed: int, found: dict) -> str:
    "Gains in standard deviations of the reward before training, and what happened to agreement."
    table = found["evaluation"]
    gains = [gain / std for gain, std in zip(table["gain"]["mean"], table["before"]["std"])]
    changes = [after - before for before, after in zip(table["agreement"]["before"], table["agreement"]["after"])]
    told = ", ".join(f"{gain:+.2f} ({100 * change:+.1f})" for gain, change in zip(gains, changes))
    what = f"gain in standard deviations (points of agreement) at {table['steps']} steps"
    return f"seed {seed}: {found['seconds']:.0f} s, {found['cpu_seconds']:.0f} CPU s; {what}: {told}"


class Trial(Callback):
    "Measures after some epochs: gains in standard deviations before training, and changes of agreement"

    def __init__(self, seed, changes, epochs):
        self.epochs, self.told = epochs, {"seed": seed, "changes": changes}

    def measure(self, run):
        step_counts = list(usual_steps)
        pairs = dict(steps=step_counts, samples=run.config.eval_samples, seed=run.config.eval_seed)
        return step_generalization(run.policy, run.reward, run.prompts, **pairs)

    def before_train(self, run):
        with run.policy.without_lora():
            self.before = self.measure(run)

    def after_epoch(self, run, metrics):
        if metrics["epoch"] in self.epochs:
            before, after = self.before, self.measure(run)
            gain, change = (after.mean - before.mean) / before.std, after.agreement - before.agreement
            line = self.told | {"epoch": metrics["epoch"], "steps": list(after.steps), "pairs": run.config.eval_samples}
            append_jsonl(tried, line | {"gain": gain.tolist(), "agreement": change.tolist()})


def try_settings():
    "The trials that are not in the file yet."
    done = [(line["seed"], line["changes"]) for line in (read_jsonl(tried) if tried.is_file() else [])]
    for changes, seeds, epochs in trials:
        for seed in (seed for seed in seeds if (seed, changes) not in done):
            with tempfile.TemporaryDirectory() as folder:
                changed = changes | {"seed": seed, "epochs": max(epochs), "output_dir": f"{folder}/run"}
                config, policy = preset_config("tiny", **changed), load_policy("tiny", device="cpu")
                watchers = [Trial(seed, changes, epochs)]
                Trainer(policy, config.reward, config.prompts, config, callbacks=watchers).train()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--preset", default="tiny", choices=list(results))
    parser.add_argument("--base", action="store_true", help="evaluate the model before training, and nothing else")
    parser.add_argument("--trials", action="store_true", help="the trials behind the preset, and nothing else")
    given = parser.parse_args()
    if given.base or given.trials:
        return keep_base() if given.base else try_settings()
    for number, seed in enumerate(given.seeds):
        path, first = results[given.preset] / f"seed_{seed}.json", given.preset == "tiny" and number == 0
        if not path.is_file():
            write_json(path, run(seed, picture if first else None, preset=given.preset))
        print(summary(seed, read_json(path)))


if __name__ == "__main__":
    main()
