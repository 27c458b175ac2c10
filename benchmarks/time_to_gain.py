"""Processor seconds until a visible gain: this package's default, SDPO as published, DDPO, and TRL's DDPOTrainer.

    python benchmarks/time_to_gain.py                  # every method, three seeds; up to an hour and a half of one core
    python benchmarks/time_to_gain.py --methods default ddpo --seeds 1
    python benchmarks/time_to_gain.py --show           # only the table of what is there

Reward and prompts are those of the preset `tiny`, for everybody. A run ends when the gain in reward exceeds one
standard deviation of the reward before training at *every* number of sampling steps (1, 2, 4, 8, 16, 50), over the
same pairs of prompt and noise for everybody, or when its budget of processor seconds is spent ("> budget"). It is
measured after each epoch, with the fewest steps first, until one falls short; so a time is exact to one epoch.
Counted are the seconds inside epochs: sampling, scoring, updates. Not counted, for anybody: imports, loading, and
this evaluation. `network samples` are latents that the UNet saw, in sampling and in training together.

Each method's learning rate is the best of three on a seed that is not reported (`search` lines), by this very
measure; where no rate arrives, by the smallest gain over all step counts at the end. A search run that has spent more
than the best one before it stops there. Then the methods take turns, seed by seed, in this one process, on one thread.

TRL runs in an environment of its own, made on the first call in `--cache` (1.5 GB: torch of the version at hand,
trl 0.23.1, diffusers 0.36, transformers 4.57), on the same weights, by the child process of trl_ddpo.py; its LoRA is
loaded into our policy and evaluated there. Where that cannot be made, a line says why, and the table "not measured".
TRL gets the batch sizes of our loop: 16 samples a pass, 32 an epoch in two updates; at its defaults, one sample a
pass, it needs several times as long. Rows of `2 steps` sample as few steps as the preset does. To say that something
takes n times as long as the default, `--budget` has to be n times what the default needs. One JSON line a run is
added to `--output`; what is there is not repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from halves import machine
from safetensors.torch import load_file, save_file
from trl_ddpo import Calls, probe

from sdpo_nb.cli import method_settings, method_trainer
from sdpo_nb.config import preset_config, resolve
from sdpo_nb.evaluate import paired_gain, step_generalization
from sdpo_nb.files import append_jsonl, read_json, read_jsonl, versions
from sdpo_nb.models import load_policy
from sdpo_nb.prompts import prompt_lists

here = Path(__file__).parent
steps, search_seed, evaluation_seed = (1, 2, 4, 8, 16, 50), 901, 3000
pinned = ("trl==0.23.1", "diffusers==0.36.*", "transformers==4.57.*", "accelerate", "peft", "fastcore")
even_steps = dict(order="step_shuffled", train_last_step=False, log_ratio_scale="per_step")


@dataclass(frozen=True)
class Method:
    "An entry of the race: what the table calls it, the rates that are tried, what differs from the preset or recipe"

    title: str
    rates: tuple = (1e-3, 3e-3, 1e-2)  # None: a third, once and three times that of the preset
    recipe: str = None  # None: the preset `tiny` as it is
    changes: dict = field(default_factory=dict)


two_updates = dict(pairs_per_epoch=16, pairs_per_update=8, micro_batch=8)  # 32 trajectories, 16 a pass: as TRL here
methods = {
    "default": Method("this package's default", None),
    "sdpo_reference": Method("SDPO as published", recipe="sdpo_reference", changes=dict(num_steps=10)),
    "ddpo": Method("DDPO in our loop", (3e-3, 1e-2, 3e-2), "ddpo", dict(num_steps=10, **two_updates)),
    "ddpo_even": Method("DDPO, even steps", recipe="ddpo", changes=dict(num_steps=10, **two_updates, **even_steps)),
    "ddpo_2": Method("DDPO, even steps, 2 steps", None, "ddpo", dict(num_steps=2, **two_updates, **even_steps)),
    "trl": Method("TRL 0.23.1, DDPOTrainer", (3e-3, 1e-2, 3e-2), "trl", dict(sample_num_steps=10)),
    "trl_2": Method("TRL 0.23.1, DDPOTrainer, 2 steps", (3e-3, 1e-2, 3e-2), "trl", dict(sample_num_steps=2)),
}
trl_settings = dict(
    num_epochs=1,
    save_freq=10**9,
    mixed_precision="no",
    sample_eta=1.0,
    sample_guidance_scale=1.0,
    sample_batch_size=16,
    sample_num_batches_per_epoch=2,
    train_batch_size=16,
    train_gradient_accumulation_steps=1,
    train_cfg=False,
    train_clip_range=5e-3,
    per_prompt_stat_tracking=True,
    per_prompt_stat_tracking_buffer_size=32,
    per_prompt_stat_tracking_min_count=16,
    log_with=None,
)


class NotMeasured(Exception):
    "Why a method could not run here"


# --- what is run ---------------------------------------------------------------------------------


class OurRun:
    "A training of this package, an epoch at a time"

    def __init__(self, config, prompts):
        self.policy, self.folder, self.seconds = load_policy("tiny"), tempfile.TemporaryDirectory(), 0.0
        config = replace(config, output_dir=f"{self.folder.name}/run")
        kind = method_trainer(config.recipe)
        self.trainer = kind(self.policy, config.reward, prompts, config, callbacks=[])
        self.calls, self.counts = Calls(self.policy.denoiser), {}

    def epoch(self) -> dict:
        "Train one, and say what all of them have cost"
        before, started = dict(self.calls.counts), time.process_time()
        self.trainer.train_epoch()
        self.seconds += time.process_time() - started
        new = {name: count - before[name] for name, count in self.calls.counts.items()}  # not those of the evaluation
        self.counts = {name: self.counts.get(name, 0) + count for name, count in new.items()}
        counted = ("epoch", "samples", "reward_queries", "optimizer_steps")
        counts = {name: self.trainer.counts[name] for name in counted}
        return {"cpu_seconds": self.seconds, **self.counts, **counts}

    def close(self):
        self.folder.cleanup()


class TRLRun:
    "The same by TRL, in a process of its own environment; its LoRA is loaded into our policy after each epoch"

    def __init__(self, python, spec):
        self.policy, self.spec = load_policy("tiny"), spec
        command = [python, str(here / "trl_ddpo.py"), json.dumps(spec)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, **{**pipes, "stderr": self.errors})
        self.first = self.answer()
        ours = probe(self.policy.pipeline, spec["prompts"][0])
        self.difference = max(abs(a - b) for a, b in zip(ours, self.first["probe"]))
        if self.difference > 1e-3 * max(map(abs, ours)):
            self.close()
            raise NotMeasured(f"the weights give another output there: it differs by {self.difference:.2g}")

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            said = self.errors.read().strip().splitlines() or ["nothing was said"]
            raise NotMeasured(f"TRL's process ended: {said[-1][:300]}")
        return json.loads(line)

    def epoch(self) -> dict:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        found = self.answer()
        self.policy.load_lora(self.spec["lora"])
        return found

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# --- TRL's environment ---------------------------------------------------------------------------


def environment(cache) -> Path:
    "The interpreter of TRL's environment, made where it is missing. Raises `NotMeasured` with the last line of pip"
    folder = Path(cache).expanduser() / "trl"
    python, done = folder / "bin" / "python", folder / "complete"
    torch_version = f"torch=={torch.__version__.split('+')[0]}"
    if not done.is_file() or done.read_text() != " ".join((torch_version, *pinned)):
        print(f"making TRL's environment in {folder}: some minutes", flush=True)
        install = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", torch_version, *pinned]
        for command in ([sys.executable, "-m", "venv", folder], install):
            ran = subprocess.run(command, capture_output=True, text=True)
            if ran.returncode:
                said = ran.stderr.strip().splitlines() or ["nothing was said"]
                raise NotMeasured(f"TRL's environment cannot be made: {said[-1][:300]}")
        done.write_text(" ".join((torch_version, *pinned)))
    return python


def saved_model(cache) -> Path:
    "The embedded model in float32, as a folder that older diffusers and transformers load"
    folder = Path(cache).expanduser() / "tiny"
    load_policy("tiny").pipeline.save_pretrained(folder)
    settings = folder / "tokenizer" / "tokenizer_config.json"
    known = {name: value for name, value in read_json(settings).items() if name not in ("backend", "is_local")}
    settings.write_text(json.dumps(known))
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})  # its names there
    index = read_json(folder / "model_index.json")
    index["tokenizer"] = ["transformers", "CLIPTokenizerFast"]  # there the plain one reads other files
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


# --- one run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    "A method at a rate on a seed"

    method: str
    seed: int
    rate: float
    budget: float
    phase: str  # search or report


def settings(job, given) -> dict:
    "Everything that decides the run's numbers"
    method = methods[job.method]
    if method.recipe == "trl":
        return {**trl_settings, **method.changes, "train_learning_rate": job.rate}
    same = dict(reward=given.reward, prompts=given.prompts, seed=job.seed, learning_rate=job.rate)
    same |= dict(epochs=10**6, checkpoint_every=10**6, eval_samples=0)
    if method.recipe is None:
        return asdict(resolve(preset_config("tiny", **same)))
    kind = method_settings(method.recipe)
    return asdict(resolve(kind(recipe=method.recipe, **same, **method.changes)))


def specification(job, given, folder) -> dict:
    "What trl_ddpo.py is told"
    config, prompts = settings(job, given), list(prompt_lists[given.prompts])
    places = dict(model=str(saved_model(given.cache)), lora=f"{folder}/lora", package=str(here.parent))
    return dict(config=config, seed=job.seed, reward=given.reward, prompts=prompts, **places)


def start(job, given, folder):
    "The run, before its first epoch"
    if methods[job.method].recipe == "trl":
        return TRLRun(environment(given.cache), specification(job, given, folder))
    config = settings(job, given)
    kind = method_settings(config["recipe"])
    return OurRun(kind(**config), list(prompt_lists[given.prompts]))


def evaluated(policy, given, number):
    "Rewards `[n]` of the fixed pairs at one number of steps"
    prompts = list(prompt_lists[given.prompts])
    options = dict(samples=given.pairs, seed=evaluation_seed)
    return step_generalization(policy, given.reward, prompts, steps=(number,), **options).rewards


def gains(measure, before, counts, until_short=True) -> list:
    "Gain over the standard deviation before training, by step count, up to the first that falls short"
    found = []
    for number in counts:
        gain = paired_gain(before[number], measure(number))["mean"][0]
        found.append(gain / before[number].std().item())
        if until_short and found[-1] <= 1:
            break
    return found


def measure(job, given, before) -> dict:
    "Train until the gain is there or the budget is spent"
    curve, reached = [], False
    with tempfile.TemporaryDirectory() as folder, closing(start(job, given, folder)) as run:
        look = partial(evaluated, run.policy, given)
        while not reached and (not curve or curve[-1]["cpu_seconds"] < job.budget):
            curve.append(run.epoch())
            curve[-1]["gain_over_std"] = gains(look, before, steps)
            reached = len(curve[-1]["gain_over_std"]) == len(steps) and curve[-1]["gain_over_std"][-1] > 1
        at_end = curve[-1]["gain_over_std"] if reached else gains(look, before, steps[:-1], until_short=False)
        told = dict(trl=run.first["versions"], probe_difference=run.difference) if isinstance(run, TRLRun) else {}
        last = {name: value for name, value in curve[-1].items() if name != "gain_over_std"}
        return dict(reached=reached, **last, at_end=at_end, curve=curve, machine=machine(run.policy), **told)


def described(job, given, before, found) -> dict:
    "The line of a run"
    spread = {f"{number}": [rewards.mean().item(), rewards.std().item()] for number, rewards in before.items()}
    recipe = methods[job.method].recipe or preset_config("tiny").recipe
    counts = {name: found.get(name) for name in ("samples", "reward_queries", "optimizer_steps")}
    mean = [spread[f"{number}"][0] + gain * spread[f"{number}"][1] for number, gain in zip(steps, found["at_end"])]
    evaluation = dict(**counts, steps=steps[: len(mean)], mean=mean, std=None, n=given.pairs)
    who = dict(method=job.method, phase=job.phase, recipe=recipe, reward=given.reward, seed=job.seed)
    how = dict(learning_rate=job.rate, budget=job.budget, pairs=given.pairs, config=settings(job, given))
    return {**who, **how, **found, "before": spread, "versions": versions(), "evaluations": [evaluation]}


# --- bookkeeping ---------------------------------------------------------------------------------


def key(line, fields) -> str:
    "What decides a run's numbers, as far as these settings"
    names = ("method", "phase", "seed", "learning_rate", "reward", "pairs")
    config = {name: value for name, value in line["config"].items() if name != "output_dir" and name in fields}
    return json.dumps([[line[name] for name in names], config], sort_keys=True)


def is_of(line, job, given) -> bool:
    "Is it the line of such a run, with the settings of today? An older line may know fewer of them"
    if "skipped" in line:
        return False
    wanted = dict(method=job.method, phase=job.phase, seed=job.seed, learning_rate=job.rate)
    wanted |= dict(reward=given.reward, pairs=given.pairs, config=settings(job, given))
    fields = line["config"].keys() & wanted["config"].keys()
    return key(line, fields) == key(wanted, fields)


def known(job, given) -> dict:
    "The line of this run, if it is there and its budget was large enough; else None"
    for line in reversed(read_jsonl(given.output) if given.output.is_file() else []):
        if is_of(line, job, given) and (line["reached"] or line["budget"] >= job.budget):
            return line


def execute(job, given, before) -> dict:
    "The line of this run, from the file or from a training. Raises `NotMeasured`"
    if (line := known(job, given)) is not None:
        return line
    line = json.loads(json.dumps(described(job, given, before, measure(job, given, before))))
    append_jsonl(given.output, line)
    at, near = f"{line['cpu_seconds']:.1f} s", " ".join(f"{gain:.2f}" for gain in line["at_end"])
    outcome = f"reached after {at}" if line["reached"] else f"not reached in {at}, gains {near} of a deviation"
    print(f"{job.phase}: {job.method}, seed {job.seed}, rate {job.rate:g}: {outcome}", flush=True)
    return line


def merit(line) -> tuple:
    "The larger the better: to have arrived, in few seconds; else how far the slowest step count has come"
    return (True, -line["cpu_seconds"]) if line["reached"] else (False, min(line["at_end"]))


def searched(name, given, before) -> float:
    "The best rate of a method"
    lines, budget, usual_rate = [], given.search_budget, preset_config("tiny").learning_rate
    for rate in methods[name].rates or [float(f"{usual_rate * factor:.2g}") for factor in (1 / 3, 1, 3)]:
        lines.append(execute(Job(name, search_seed, rate, budget, "search"), given, before))
        if lines[-1]["reached"]:
            budget = min(budget, lines[-1]["cpu_seconds"])
    return max(lines, key=merit)["learning_rate"]


def race(given, before) -> dict:
    "Lines of the reported seeds by method, or why there are none; methods alternate"
    rates, found = {}, {name: [] for name in given.methods}
    for seed in (None, *given.seeds):
        for name in given.methods:
            try:
                if isinstance(found[name], str):
                    continue
                if seed is None:
                    rates[name] = searched(name, given, before)
                else:
                    job = Job(name, seed, rates[name], given.budget, "report")
                    found[name].append(execute(job, given, before))
            except NotMeasured as problem:
                found[name] = str(problem)
                append_jsonl(given.output, dict(method=name, skipped=str(problem), versions=versions()))
                print(f"{name}: not measured, {problem}", flush=True)
    return found


def shown(line) -> str:
    return f"{line['cpu_seconds']:.1f}" if line["reached"] else f"> {line['budget']:g}"


def table(found) -> str:
    "By method: seconds of each seed, median, network samples, and how many times the default's median"
    rows = [f"{'method':<34}{'rate':>8}{'seconds by seed':>26}{'median':>9}{'network samples':>17}{'× default':>11}"]
    medians = {}
    for name, lines in found.items():
        title = methods[name].title
        if isinstance(lines, str) or not lines:
            rows.append(f"{title:<34}  not measured" + (f": {lines}" if lines else ""))
            continue
        bound = "" if sum(line["reached"] for line in lines) * 2 > len(lines) else "> "
        seconds = statistics.median(min(line["cpu_seconds"], line["budget"]) for line in lines)
        samples = statistics.median(line["network_samples"] for line in lines)
        medians[name] = seconds
        ratio = f"{bound}{seconds / medians['default']:.1f}" if "default" in medians else ""
        seeds = ", ".join(map(shown, lines))
        rate = f"{lines[0]['learning_rate']:g}"
        columns = f"{rate:>8}{seeds:>26}{bound + format(seconds, '.1f'):>9}{bound + format(samples, ',.0f'):>17}"
        rows.append(f"{title:<34}{columns}{ratio:>11}")
    return "\n".join(rows)


def committed(given) -> dict:
    "What the file holds of the reported seeds, the newest of each seed and method, with the settings of today"
    lines = read_jsonl(given.output) if given.output.is_file() else []
    found = {}
    for name in given.methods:
        own = [line for line in lines if line["method"] == name]
        reported = {}
        for line in (line for line in own if line.get("phase") == "report"):
            if is_of(line, Job(name, line["seed"], line["learning_rate"], line["budget"], "report"), given):
                reported[line["seed"]] = line
        skipped = [line["skipped"] for line in own if "skipped" in line]
        found[name] = [reported[seed] for seed in sorted(reported)] or (skipped[-1] if skipped else [])
    return found


def arguments(words=None):
    "What the command line says"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(methods), choices=list(methods))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    preset = preset_config("tiny")
    parser.add_argument("--reward", default=preset.reward, help="a name or mixture; without it the preset's")
    parser.add_argument("--prompts", default=preset.prompts, choices=list(prompt_lists))
    parser.add_argument("--pairs", type=int, default=48, help="of prompt and noise, in the evaluation")
    parser.add_argument("--budget", type=float, default=120.0, help="processor seconds of a reported run")
    parser.add_argument("--search_budget", type=float, default=45.0, help="of a run of the search")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/sdpo_nb"), help="of TRL's environment")
    parser.add_argument("--output", type=Path, default=here / "results" / "time_to_gain.jsonl")
    parser.add_argument("--show", action="store_true", help="run nothing; print the table of what is there")
    given = parser.parse_args(words)
    if search_seed in given.seeds:
        parser.error(f"--seeds holds {search_seed}, on which the rates are searched; report other seeds.")
    return given


def main(words=None):
    given = arguments(words)
    if given.show:
        return print(table(committed(given)))
    torch.set_num_threads(1)
    policy = load_policy("tiny")
    before = {number: evaluated(policy, given, number) for number in steps}
    print(table(race(given, before)))


if __name__ == "__main__":
    main()
