"""Train the embedded model under many settings, one process per core, and keep every run's numbers.

    python benchmarks/experiments.py                        # every group below, in this order
    python benchmarks/experiments.py order main --workers 4 --seeds 1 2 3
    python benchmarks/experiments.py --check                # fails if a run is missing

Each group is a file benchmarks/results/experiments/GROUP.jsonl with one line a run. A run that is there already is
not repeated, in whichever group it was made, so an interrupted call goes on where it stopped. A run takes about 90
s on a core. The groups: search (learning rate and clip of each method for each reward, on a seed of its own), order
and normalizers (for their pages), main (methods x seeds x rewards), factors (order of updates against treatment of
steps), spo (its own choices), queries, ablations, steps, few_steps (every method trained at one and two steps, at
equal reward queries), frontier_search and frontier (gain against the agreement that it cost, at equal reward queries;
a run is measured on its way, and ends early where it has lost much), switches (of a branch method, measured likewise).
"""

import argparse
import hashlib
import json
import os
import platform
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from statistics import mean

import torch

from sdpo_nb.advantages import credit_rules
from sdpo_nb.cli import method_settings, method_trainer
from sdpo_nb.config import RunConfig, resolve, step_counts
from sdpo_nb.evaluate import coverage, step_generalization
from sdpo_nb.files import append_jsonl, read_json, read_jsonl, versions, write_json
from sdpo_nb.frontier import frontier_path, gain_at_loss
from sdpo_nb.models import load_policy
from sdpo_nb.plan import batch_plan
from sdpo_nb.prompts import prompt_lists
from sdpo_nb.rewards import get_reward
from sdpo_nb.run import Callback
from sdpo_nb.shapes import all_captions, assets, load_network

results = Path(__file__).parent / "results" / "experiments"
quality, alignment = "shapes_aesthetic", "shapes_alignment"
watched = (quality, alignment, "jpeg_compressibility")
epochs, curve_epochs = 16, (2, 4, 8)
curve_steps, all_steps = (1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 50)
search_steps, search_seed = (1, 4, 16), 201
evaluation_seed, pairs = 1000, 48
search_evaluation_seed = 2000  # from now on; the committed searches were judged on the pairs that are reported
# The captions that the shipped model follows worst, `hardest_captions()`: the twelve balanced ones it follows so well
# that no method improved them.
hardest = (
    "a green star on a white background",
    "a green star on a black background",
    "a cyan square on a black background",
    "a blue star on a white background",
    "a yellow star on a white background",
    "a red star on a gray background",
    "a cyan star on a black background",
    "a cyan triangle on a brown background",
    "a blue star on a brown background",
    "a green star on a gray background",
    "a magenta star on a black background",
    "a yellow star on a gray background",
)
trained_prompts = {quality: prompt_lists["shapes"], alignment: hardest}
unseen_prompts = {
    reward: [c for c in all_captions() if c not in trained][::7][:24] for reward, trained in trained_prompts.items()
}
mixture, size = "0.5*shapes_aesthetic+0.5*shapes_alignment", "shapes_size"  # of the frontier
mostly_quality = "0.7*shapes_aesthetic+0.3*shapes_alignment"
trained_prompts |= dict.fromkeys((mixture, mostly_quality, size), prompt_lists["shapes"])
open_prompts = ("", "a circle", "a square", "a star")

# What SDPO does about the steps of a trajectory, which can be given to any other method as well.
even_steps = dict(train_last_step=False, log_ratio_scale="per_step")
shuffled = dict(order="step_shuffled", **even_steps)


def tree(candidates) -> dict:
    """SPO's sampling for at most 32 trajectories an epoch.

    With three ordinary steps of ten a tree costs 0.8, 0.7, 0.65 of what it is counted as (k = 2, 4, 8)."""
    trees = 32 // candidates
    return dict(candidates=candidates, pairs_per_epoch=trees, pairs_per_update=min(trees, 8))


@dataclass(frozen=True)
class Method:
    "An entry of the race: a recipe, what is changed in it, and the clips that the search may try"

    recipe: str
    changes: dict = field(default_factory=dict)
    clips: tuple = ()  # none where an epoch makes one update, from fresh samples: no clip can act on log-ratios of 0


methods = {
    "SDPO": Method("sdpo", {}, (1e-3, 2e-2)),
    "SDPO, gain credit": Method("sdpo_gain", {}, (1e-3, 2e-2)),
    "SDPO, step-accumulated": Method("sdpo", {"order": "step_accumulated"}),
    "DDPO": Method("ddpo"),
    "DDPO, step-shuffled": Method("ddpo", shuffled, (1e-3, 2e-2)),
    "D3PO": Method("d3po", {}, (0.02, 0.4)),
    "D3PO, step-shuffled": Method("d3po", shuffled, (0.02, 0.4)),
    "PRDP/REBEL": Method("rebel"),
    "PRDP/REBEL, 8 updates": Method("rebel", dict(pairs_per_update=2, **even_steps), (5e-3, 2e-2)),
    "SPO": Method("spo", tree(2), (0.05, 0.2)),
}
race = [name for name in methods if name != "SDPO, step-accumulated"]
# The same at one and two steps, each for as many epochs as 1,280 reward queries last.
updates = dict(pairs_per_update=4)  # an epoch of two steps would be a single update of 16 pairs otherwise
two_steps, one_step = dict(num_steps=2, **updates), dict(num_steps=1, **updates)
few_step_methods = {
    "LaSRO, 2 steps": Method("lasro", dict(epochs=10)),
    "SPO, 2 steps": Method("spo", dict(epochs=16, **{**tree(2), **two_steps})),
    "SDPO, 2 steps": Method("sdpo", dict(epochs=26, **two_steps)),
    "DDPO, 2 steps": Method("ddpo", dict(epochs=40, **two_steps)),
    "D3PO, 2 steps": Method("d3po", dict(epochs=40, **two_steps)),
    "PRDP/REBEL, 2 steps": Method("rebel", dict(epochs=40, **two_steps)),
    "LaSRO, 1 step": Method("lasro", dict(epochs=10, num_steps=1, pretrain_prompts=52, pairs_per_epoch=16)),
    "SDPO, 1 step": Method("sdpo", dict(epochs=26, credit="reward_to_go", train_last_step=True, **one_step)),
    "DDPO, 1 step": Method("ddpo", dict(epochs=40, **one_step)),
}
methods |= few_step_methods
# The frontier: all for 1,280 queries at most, all with SDPO's treatment of steps but SPO, which has its own.
one_by_one = dict(pairs_per_epoch=8, pairs_per_update=8)  # trees of four candidates
cheap = dict(preference_model="reward", candidates=4, **one_by_one)
free = dict(kl_coefficient=0.0)  # a branch has a penalty unless it is told otherwise
frontier_methods = {
    "SDPO, T=2": Method("sdpo", dict(num_steps=2)),
    "SDPO, T=10": Method("sdpo"),
    "SDPO, mixed T": Method("sdpo_mixed"),
    "Branch, T=4": Method("sdpo_branch", dict(num_steps=4, **free)),
    "Branch, mixed T": Method("sdpo_branch", dict(num_steps=(2, 3, 4), **free)),
    "Branch, T=4, k=4": Method("sdpo_branch", dict(num_steps=4, candidates=4, **free, **one_by_one)),
    "Branch late, T=4, k=4": Method(
        "sdpo_branch", dict(num_steps=4, divert_start=1, candidates=4, **free, **one_by_one)
    ),
    "SPO cheap, T=4": Method("spo", dict(num_steps=4, **cheap)),
    "SPO cheap, mixed T": Method("spo", dict(num_steps=(2, 3, 4), **cheap)),
    "DDPO, T=2": Method("ddpo", dict(num_steps=2, **shuffled)),
    "DDPO, T=4": Method("ddpo", dict(num_steps=4, **shuffled)),
    "D3PO, T=2": Method("d3po", dict(num_steps=2, **shuffled)),
    "D3PO, T=4": Method("d3po", dict(num_steps=4, **shuffled)),
    "PRDP/REBEL, T=2": Method("rebel", dict(num_steps=2, **even_steps)),
    "PRDP/REBEL, T=4": Method("rebel", dict(num_steps=4, **even_steps)),
}
for name in ("Branch, mixed T", "SPO cheap, T=4", "SDPO, T=2"):  # with a penalty, at the settings searched without it
    changes = {**frontier_methods[name].changes, "kl_coefficient": 0.3}
    frontier_methods[f"{name} + KL"] = replace(frontier_methods[name], changes=changes)
begun = {"SDPO, T=10": 4, "Branch, T=4, k=4": 4, "Branch late, T=4, k=4": 5}  # settings tried; these are not reported
begun |= {"D3PO, T=2": 3, "PRDP/REBEL, T=2": 3}  # these are
borrowed = {
    f"{name}, T=4": f"{name}, T=2" for name in ("DDPO", "D3PO", "PRDP/REBEL")
}  # not searched anew at four steps
borrowed |= {name: name.removesuffix(" + KL") for name in frontier_methods if name.endswith(" + KL")}
frontier_seeds = (11, 12, 13, 14, 15)
five, three = frontier_seeds, frontier_seeds[:3]
bar_seeds, bar_rewards = (21, 22, 23, 24, 25), {quality: 5, mixture: 3}  # how many seeds
bar_method = "Branch, mixed T + KL"
frontier_plan = {  # reward -> setting -> training seeds
    quality: {
        "Branch, mixed T + KL": five,
        "SPO cheap, T=4": five,
        "Branch, mixed T": five,
        "SDPO, T=2": five,
        "SDPO, mixed T": five,
        "SPO cheap, mixed T": three,
        "Branch, T=4": five,
        "DDPO, T=2": three,
        "DDPO, T=4": three,
        "D3PO, T=2": three,
        "D3PO, T=4": three,
        "PRDP/REBEL, T=2": three,
        "PRDP/REBEL, T=4": three,
        "SPO cheap, T=4 + KL": three,
        "SDPO, T=2 + KL": three,
    },
    mixture: dict.fromkeys(("SPO cheap, T=4", "Branch, mixed T", "SDPO, T=2", "Branch, mixed T + KL"), three),
    size: dict.fromkeys(("SPO cheap, T=4", "Branch, mixed T + KL", "SDPO, T=2"), three),
}
switched = "Branch, mixed T"  # what the group `switches` changes
frontier_queries = 1280
frontier_times = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # of the epochs
frontier_pairs = {64: (1, 2, 4), 48: (8,), 32: (16,), 16: (50,)}  # pairs -> step counts measured on so many
search_times, search_pairs = (1 / 3, 2 / 3, 1), {48: (1, 4), 24: (16,)}
bar_times, bar_pairs = (3 / 4, 1), {128: (1, 2, 4, 8, 16), 64: (50,)}  # few pictures cannot tell 3 points from 9
lost_enough = 0.1  # agreement, at which a run of the frontier ends


@dataclass(frozen=True)
class Run:
    "One training: where its line goes, and its settings"

    group: str
    name: str
    config: RunConfig
    bound: float = None  # of the divergence of a transition, where `trust_region.TrustRegionTrainer` is to train

    @property
    def key(self) -> str:
        return key_of(asdict(self.config))


renamed = {"lasro": {"anchor_weight": "reference_penalty", "pairs_per_update": "surrogate_batch"}}  # since they ran
aliases = {alias: name for name, rule in credit_rules.items() for alias in rule.aliases}


@cache
def settings_class(recipe) -> type:
    return method_settings(recipe)


def key_of(settings: dict) -> str:
    """What decides the numbers of a run: the settings that its method obeys, under the names of today.

    A run that is older than a setting had its default; a setting that is gone was not obeyed."""
    return resolved_key(json.dumps(settings))


@cache
def resolved_key(text) -> str:
    settings = json.loads(text)
    kind, names = settings_class(settings["recipe"]), renamed.get(settings["recipe"], {})
    given = {names.get(name, name): value for name, value in settings.items() if name not in ("output_dir", "resume")}
    found = asdict(resolve(kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given})))
    if "credit" in found:
        found["credit"] = aliases.get(found["credit"], found["credit"])
    return json.dumps(found, sort_keys=True)


def make_run(group, name, method, seed, reward=quality, **changes) -> Run:
    "Settings of a method, with its searched learning rate and clip unless `changes` says otherwise"
    method = {**methods, **frontier_methods}[method]
    prompts = "shapes" if reward == quality else list(trained_prompts[reward])
    if method.recipe == "spo" and reward != quality:
        changes = {"preference_model": "reward", **changes}  # the shipped judge knows only the other
    return Run(
        group,
        name,
        method_settings(method.recipe)(
            **{
                **dict(
                    recipe=method.recipe,
                    reward=reward,
                    prompts=prompts,
                    seed=seed,
                    epochs=epochs,
                    eval_samples=0,
                    checkpoint_every=epochs,
                ),
                **method.changes,
                **changes,
            }
        ),
    )


# --- measuring -----------------------------------------------------------------------------------


def plan(config) -> list:
    "What is measured when: (epoch, which prompts, step counts, pairs, seed of the pairs)"
    if config.seed == search_seed:
        return [(config.epochs, "trained", search_steps, 48, search_evaluation_seed)]
    return [
        *((epoch, "trained", curve_steps, pairs, evaluation_seed) for epoch in curve_epochs),
        (config.epochs, "trained", all_steps, pairs, evaluation_seed),
        (config.epochs, "unseen", search_steps, 48, evaluation_seed),
    ]


def measure(policy, which, steps, samples, seed, reward) -> dict:
    "Rewards, agreement, diversity and coverage at these step counts, on fixed pairs of prompt and noise"
    others = {name: get_reward(name) for name in watched}
    prompts = list((trained_prompts if which == "trained" else unseen_prompts)[reward])
    found = step_generalization(
        policy,
        others.get(reward) or get_reward(reward),
        prompts,
        steps=steps,
        samples=samples,
        seed=seed,
        other_rewards={name: other for name, other in others.items() if name != reward},
    )
    return {
        "prompts": which,
        "steps": list(steps),
        "n": samples,
        "mean": found.mean.tolist(),
        "std": found.std.tolist(),
        "other_rewards": {name: values.mean(1).tolist() for name, values in found.other_rewards.items()},
        "agreement": found.agreement.tolist(),
        "diversity": found.diversity.tolist(),
        "agreed": [bits(row) for row in (torch.stack([*found.correct.values()]).nan_to_num(1.0) == 1).all(0)],
    }


def bits(row) -> str:
    "Which of the pairs, the first one first, as hexadecimal digits: from these an error of a change can be computed"
    return f"{int(''.join(str(int(bit)) for bit in row), 2):0{-(-len(row) // 4)}x}"


def measure_coverage(policy) -> dict:
    "The effective number of shapes, colours and backgrounds in pictures of captions that leave them open, at 4 steps"
    images = {p: policy.sample([p] * 24, 4, seeds=list(range(24))) for p in open_prompts}
    oracle = load_network("oracle")
    named = torch.cat([images[p] for p in open_prompts[1:]])
    of_shapes, of_colors = coverage(oracle, images[""]), coverage(oracle, named)
    return {"shape": of_shapes["shape"], "color": of_colors["color"], "background": of_colors["background"]}


def hardest_captions(count=12, pictures=4, steps=8) -> tuple:
    "The captions with the lowest mean alignment before training, of all 180; these pictures are used for nothing else"
    captions = all_captions()
    images = load_policy("tiny").sample(captions * pictures, steps, seeds=list(range(len(captions) * pictures)))
    scores = get_reward(alignment)(images, captions * pictures).view(pictures, -1).mean(0)
    return tuple(captions[index] for index in scores.argsort()[:count])


@cache
def base() -> Path:
    "Where measurements of the untrained model are kept between runs: a folder for each state of the shipped model"
    weights = b"".join(path.read_bytes() for path in sorted(assets.rglob("*.safetensors")))
    return Path(tempfile.gettempdir()) / f"sdpo_nb_before_{hashlib.sha256(weights).hexdigest()[:12]}"


def measure_before(policy, which, steps, samples, seed, reward) -> dict:
    "The same of the model before training; measured once, then remembered"
    path = base() / f"{which}_{'_'.join(map(str, steps))}_{samples}_{seed}_{reward}.json"
    if not path.is_file():
        write_json(path, measure(policy, which, steps, samples, seed, reward))
    return read_json(path)


@contextmanager
def merged(policy):
    "Inside, the adapter is part of the weights, which saves a quarter of the time; afterwards all is as before"
    layers = [layer for layer in policy.denoiser.modules() if hasattr(layer, "merged_adapters")]
    kept = [layer.base_layer.weight.detach().clone() for layer in layers]
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        for layer, weight in zip(layers, kept):
            layer.merged_adapters.clear()
            layer.base_layer.weight.data.copy_(weight)


class Measure(Callback):
    "Measures before training, and after the epochs of the plan"

    def __init__(self):
        self.evaluations, self.seconds = [], 0.0

    def note(self, trainer, record):
        counts = {name: trainer.counts[name] for name in ("epoch", "samples", "reward_queries", "optimizer_steps")}
        self.evaluations.append({**counts, **record})

    def before_train(self, trainer):
        with trainer.policy.without_lora():
            for request in dict.fromkeys(entry[1:] for entry in plan(trainer.config)):
                self.note(trainer, measure_before(trainer.policy, *request, trainer.config.reward))
            if trainer.config.seed != search_seed:
                self.evaluations[0]["coverage"] = measure_coverage(trainer.policy)

    def after_epoch(self, trainer, metrics):
        started = time.perf_counter()
        for epoch, *request in plan(trainer.config):
            if epoch == metrics["epoch"]:
                self.note(trainer, measure(trainer.policy, *request, trainer.config.reward))
        if metrics["epoch"] == trainer.config.epochs and trainer.config.seed != search_seed:
            last = next(e for e in self.evaluations if e["epoch"] == metrics["epoch"] and e["prompts"] == "trained")
            last["coverage"] = measure_coverage(trainer.policy)
        self.seconds += time.perf_counter() - started


def queries_of(config, of=max) -> float:
    "Reward queries of an epoch: where the number of steps is drawn anew, of the dearest draw, or the mean"
    plans = [batch_plan(replace(config, num_steps=count)) for count in step_counts(resolve(config).num_steps)]
    return of([next(number for name, number in plan.items() if "queries" in name) for plan in plans])


def along(config, fine=False) -> list:
    "As `plan`, for a run of the frontier; fine: with many pairs, late in the run"
    search = config.seed == search_seed
    times, counts = (search_times, search_pairs) if search else (frontier_times, frontier_pairs)
    times, counts = (bar_times, bar_pairs) if fine else (times, counts)
    seed = search_evaluation_seed if search else evaluation_seed
    epochs = sorted({max(1, round(time * config.epochs)) for time in times})
    return [(epoch, "trained", steps, samples, seed) for epoch in epochs for samples, steps in counts.items()]


class MeasureAlong(Measure):
    "Measures a run on its way and counts calls of the network; ends it where it lost much, or asked all it may"

    def __init__(self, fine=False):
        super().__init__()
        self.calls, self.counting, self.fine = 0, False, fine

    def count(self, denoiser, args, kwargs):
        "Called before the network is"
        self.calls += self.counting * len(args[0] if args else next(iter(kwargs.values())))

    def note(self, trainer, record):
        super().note(trainer, record)
        self.evaluations[-1]["network_calls"] = self.calls

    def before_train(self, trainer):
        with trainer.policy.without_lora():
            for request in dict.fromkeys(entry[1:] for entry in along(trainer.config, self.fine)):
                self.note(trainer, measure_before(trainer.policy, *request, trainer.config.reward))
        trainer.policy.denoiser.register_forward_pre_hook(self.count, with_kwargs=True)
        self.counting = True

    def after_epoch(self, trainer, metrics):
        config, started, self.counting = trainer.config, time.perf_counter(), False
        spent = metrics["reward_queries"] + queries_of(config) > frontier_queries
        now = config.epochs if spent else metrics["epoch"]
        requests = [request for epoch, *request in along(config, self.fine) if epoch == now]
        with merged(trainer.policy):
            for request in requests:
                self.note(trainer, measure(trainer.policy, *request, config.reward))
        if spent or (requests and self.lost() > lost_enough):
            trainer.config = replace(config, epochs=metrics["epoch"])
        self.counting, self.seconds = True, self.seconds + time.perf_counter() - started

    def lost(self):
        "Agreement, mean over step counts"
        path = frontier_path({"name": "", "seed": 0, "evaluations": self.evaluations})
        return -path.agreement[-1].mean().item()


def shorten(value):
    "Six digits are enough for numbers that are drawn and averaged"
    if isinstance(value, dict):
        return {name: shorten(item) for name, item in value.items()}
    if isinstance(value, list):
        return [shorten(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def along_frontier(group) -> bool:
    "Are the runs of a group measured on their way? A line is copied only between groups that measure alike"
    return group.startswith("frontier") or group in ("switches", "bar")


def trainer_class(run) -> type:
    "That of the method, or the one with a trust region"
    if run.bound is None:
        return method_trainer(run.config.recipe)
    from trust_region import TrustRegionTrainer

    return type("TrustRegionTrainer", (TrustRegionTrainer,), {"bound": run.bound})


def execute(run: Run) -> dict:
    "Train and measure"
    torch.set_num_threads(1)
    started, measuring = (
        time.perf_counter(),
        MeasureAlong(run.group == "bar") if along_frontier(run.group) else Measure(),
    )
    with tempfile.TemporaryDirectory() as folder:
        config = type(run.config)(**{**asdict(run.config), "output_dir": f"{folder}/run"})
        trainer = trainer_class(run)(load_policy("tiny"), config.reward, config.prompts, config, callbacks=[measuring])
        trainer.train()
        metrics = read_jsonl(f"{folder}/run/metrics.jsonl")
    config = asdict(resolve(run.config)) | {"output_dir": None}
    measured = shorten(
        {
            "seconds": {"all": time.perf_counter() - started, "evaluation": measuring.seconds},
            "metrics": metrics,
            "evaluations": measuring.evaluations,
        }
    )
    return {
        "group": run.group,
        "name": run.name,
        "recipe": config["recipe"],
        "reward": config["reward"],
        "seed": config["seed"],
        "config": config,
        "versions": versions(),
        "machine": {"processor": platform.machine(), "system": platform.system(), "cores": os.cpu_count()},
        **measured,
    }


# --- the groups ----------------------------------------------------------------------------------


def lines(group) -> list:
    "What a group has so far"
    path = results / f"{group}.jsonl"
    return read_jsonl(path) if path.is_file() else []


def final_gain(line) -> float:
    "Gain of the trained reward at the end, averaged over step counts"
    trained = [e for e in line["evaluations"] if e["prompts"] == "trained"]
    last = trained[-1]
    before = next(e for e in trained if e["samples"] == 0 and e["steps"] == last["steps"])
    return sum(a - b for a, b in zip(last["mean"], before["mean"])) / len(last["steps"])


def tried(line) -> str:
    "What the search varies"
    config = line["config"]
    clip = f", clip {config['clip_range']:g}" if config.get("clip_range") is not None else ""
    return f"learning rate {config['learning_rate']:g}{clip}"


def candidates(name, reward) -> list:
    "What the search has tried for a method and a reward"
    return [line for line in lines("search") if line["name"] == name and line["reward"] == reward]


def search_runs(name, reward) -> list:
    """Four learning rates, for half of the epochs; one beyond the edge if the best lies there; then other clips.

    Six settings at most; the clips are tried at the best learning rate."""
    half = methods[name].changes.get("epochs", epochs) // 2

    def run(**changes):
        return make_run("search", name, name, search_seed, reward, epochs=half, checkpoint_every=half, **changes)

    clip = searchable(resolve(make_run("", "", name, 0).config))
    found = {
        line["config"]["learning_rate"]: final_gain(line)
        for line in candidates(name, reward)
        if "clip_range" not in clip or line["config"]["clip_range"] == clip["clip_range"]
    }
    rates = [3e-4, 1e-3, 3e-3, 1e-2]
    runs = [run(learning_rate=rate) for rate in rates]
    if not all(rate in found for rate in rates):
        return runs
    best = max(rates, key=found.get)
    if best in (rates[0], rates[-1]):
        best_and_beyond = 3e-2 if best == rates[-1] else 1e-4
        runs.append(run(learning_rate=best_and_beyond))
        if best_and_beyond not in found:
            return runs
        best = max((best, best_and_beyond), key=found.get)
    return runs + [run(learning_rate=best, clip_range=clip) for clip in methods[name].clips][: 6 - len(runs)]


def searchable(config) -> dict:
    "What the search varies, where the method obeys it"
    return {name: getattr(config, name) for name in ("learning_rate", "clip_range") if hasattr(config, name)}


def searched(name, reward=quality) -> dict:
    "The best setting that the search found for a method and a reward. Raises SystemExit where it has not run"
    tried = candidates(name, reward)
    if not tried:
        raise SystemExit(f"{name} has not been searched for {reward}; run the group 'search' first.")
    best, obeyed = max(tried, key=final_gain)["config"], searchable(settings_class(methods[name].recipe)())
    return {setting: best[setting] for setting in obeyed}


def search(seeds):
    return [
        run
        for reward in (quality, alignment)
        for name in (methods if reward == quality else race)
        for run in search_runs(name, reward)
    ]  # grows with what was found


def order(seeds):
    same = searched("SDPO")
    return [
        make_run("order", name, "SDPO", seed, **{**same, **changes})
        for seed in seeds[:3]
        for name, changes in {
            "shuffled": {},
            "accumulated": {"order": "step_accumulated"},
            "accumulated, own learning rate": {"order": "step_accumulated", **searched("SDPO, step-accumulated")},
            "accumulated, 2 pairs an update": {"order": "step_accumulated", "pairs_per_update": 2},
        }.items()
    ]


def normalizers(seeds):
    return [
        make_run("normalizers", name, "SDPO", seed, normalizer=name, **searched("SDPO"))
        for seed in seeds[:3]
        for name in ("step_prompt", "prompt", "batch", "step")
    ]


def main_race(seeds):
    return [
        make_run("main", name, name, seed, reward, **searched(name, reward))
        for seed in seeds
        for reward in (quality, alignment)
        for name in race
    ]


def factors(seeds):
    plain = dict(train_last_step=True, log_ratio_scale="none")
    accumulated = {"SDPO": "SDPO, step-accumulated", "DDPO, step-shuffled": "DDPO"}
    return [
        make_run(
            "factors",
            f"{name.split(',')[0]}, {order.replace('_', '-')}, {treatment}",
            name,
            seed,
            **{**searched(name if order == "step_shuffled" else accumulated[name]), "order": order, **steps},
        )
        for seed in seeds[:3]
        for name in accumulated
        for order in ("step_shuffled", "step_accumulated")
        for treatment, steps in (("even steps", even_steps), ("steps as they are", plain))
    ]


def ablations(seeds):
    switches = {
        "SDPO": {},
        "anchor among all": {"anchor": "all"},
        "random anchor": {"anchor": "random"},
        "no anchor (first and last)": {"queries": "terminal"},
        "causal credit": {"credit": "reward_to_go"},
        "gamma 0.9": {"gamma": 0.9},
        "gamma 1": {"gamma": 1.0},
        "lambda 1 (no weights)": {"step_weight": 1.0},
        "lambda reversed": {"step_weight": 1 / 0.99},
        "lambda 0.9": {"step_weight": 0.9},
        "no clip": {"clip_range": 0.0},
        "last step trained": {"train_last_step": True},
        "log-ratios unscaled": {"log_ratio_scale": "none"},
        "independent initial noise": {"sampling": "independent_pair"},
        "not divided by std": {"divide_by_std": False},
    }
    gain = {
        "gain credit": {},
        "gain credit, all queries": {"queries": "all"},
        "gain credit, not divided by std": {"divide_by_std": False},
    }
    return [
        make_run("ablations", name, method, seed, **{**searched(method), **changes})
        for seed in seeds[:3]
        for method, group in (("SDPO", switches), ("SDPO, gain credit", gain))
        for name, changes in group.items()
    ]


def steps(seeds):
    same = searched("SDPO")
    return [
        *(
            make_run("steps", f"T={count}", "SDPO", seed, num_steps=count, **same)
            for count in (10, 4, 2)
            for seed in seeds[:3]
        ),
        *(
            make_run(
                "steps",
                "T=1, causal credit",
                "SDPO",
                seed,
                num_steps=1,
                credit="reward_to_go",
                train_last_step=True,
                **same,
            )
            for seed in seeds[:3]
        ),
        *(make_run("steps", "T=50", "SDPO", seed, num_steps=50, **same) for seed in seeds[:3]),
    ]


def queries(seeds):
    return [
        make_run("queries", f"{count} queries", "SDPO", seed, queries=count, **searched("SDPO"))
        for seed in seeds[:3]
        for count in ("terminal", "3", "5", "all")
    ]


def few_steps(seeds):
    return [
        make_run("few_steps", name, name, seed, **searched(name)) for seed in seeds[:3] for name in few_step_methods
    ]


# Made by `python -m sdpo_nb.preference judges` in about five minutes; relative, so run this from the folder that has it
untold = "judges/untold"


def spo(seeds):
    switches = {
        "SPO, k=2": {},
        "SPO, k=4": tree(4),
        "SPO, k=8": tree(8),
        "k=4, from the winner": dict(continue_from="winner", **tree(4)),
        "k=4, from the loser": dict(continue_from="loser", **tree(4)),
        "k=4, cheap mode": dict(preference_model="reward", **tree(4)),
        "k=4, every step branches": dict(divert_start=0, **tree(4)),
        "k=4, MSPO of 2 steps": dict(segment_steps=2, **tree(4)),
        "k=4, threshold 0.6": dict(preference_threshold=0.6, **tree(4)),
        "k=2, 5 trees an epoch": dict(pairs_per_epoch=5, pairs_per_update=5),  # as many questions in all as SDPO asks
        "k=4, judge not told the time": dict(preference_model=untold, **tree(4)),
    }
    return [
        make_run("spo", name, "SPO", seed, **{**searched("SPO"), **changes})
        for seed in seeds[:3]
        for name, changes in switches.items()
    ]


def frontier_run(group, name, seed, reward, **changes) -> Run:
    "As `make_run`, for as many epochs as the queries last; where the number of steps is drawn, in the mean"
    one = make_run(group, name, name, seed, reward, **changes).config
    last = int(frontier_queries / queries_of(one, mean) + (queries_of(one) != queries_of(one, mean)))
    return Run(group, name, replace(one, epochs=last, checkpoint_every=last))


def frontier_number(line) -> float:
    "What the search goes by: the mean gain by the time that 3 points of agreement are lost"
    return gain_at_loss(frontier_path(line)).gain.mean().item()


def frontier_tried(name, reward) -> list:
    return [line for line in lines("frontier_search") if line["name"] == name and line["reward"] == reward]


def frontier_search_runs(name, reward) -> list:
    "Six settings: two of a ladder from slow to fast, the neighbours of the better one, and two of many small updates"
    every = frontier_methods[name].changes.get("pairs_per_epoch", 16)
    ladder = [
        (1e-3, every),
        (3e-3, every),
        (1e-3, every // 4),
        (3e-3, every // 2),
        (3e-3, every // 4),
        (1e-3, every // 8),
        (5e-4, every // 8),
    ]
    runs = [
        frontier_run("frontier_search", name, search_seed, reward, learning_rate=rate, pairs_per_update=size)
        for rate, size in ladder
    ]
    known = {key_of(line["config"]): frontier_number(line) for line in frontier_tried(name, reward)}
    first, second = runs[1], runs[3]
    if not (first.key in known and second.key in known):
        return [first, second]
    neighbour = runs[0] if known[first.key] > known[second.key] else runs[4]
    return [first, second, runs[2], neighbour, *runs[5:]][: begun.get(name)]


def frontier_searched(name) -> dict:
    "The best setting, searched on image quality without a penalty. Raises SystemExit where the search has not run"
    tried = frontier_tried(borrowed.get(name, name), quality)
    if not tried:
        raise SystemExit(f"{name} has not been searched; run the group 'frontier_search' first.")
    best = max(tried, key=frontier_number)["config"]
    return {setting: best[setting] for setting in ("learning_rate", "pairs_per_update")}


def frontier_search(seeds):
    searched_for = [name for name in frontier_methods if name not in borrowed]
    return [run for name in searched_for for run in frontier_search_runs(name, quality)]


def frontier(seeds):
    return [
        frontier_run("frontier", name, seed, reward, **frontier_searched(name))
        for reward, settings in frontier_plan.items()
        for seed in frontier_seeds
        for name, of_setting in settings.items()
        if seed in of_setting
    ]


def switches(seeds):
    "What the field found to help, on a setting of ours: each alone, against the same seed of `frontier`"
    changes = {
        "KL 3": dict(kl_coefficient=3.0),
        "KL 30": dict(kl_coefficient=30.0),
        "clip 0.1": dict(clip_range=0.1),
        "trust region 1e-5": dict(clip_range=0.0),
    }
    found = []
    for seed in frontier_seeds[:1]:
        for name, change in changes.items():
            one = frontier_run("", switched, seed, quality, **frontier_searched(switched), **change)
            bound = float(name.split()[-1]) if "trust" in name else None
            found.append(Run("switches", name, one.config, bound))
    return found


def bar(seeds):
    "The setting that comes closest to 2.0 at no loss, on seeds of its own, with enough pictures to tell"
    return [
        frontier_run("bar", bar_method, seed, reward, **frontier_searched(bar_method))
        for number, seed in enumerate(bar_seeds)
        for reward, count in bar_rewards.items()
        if number < count
    ]


groups = {
    "search": search,
    "order": order,
    "normalizers": normalizers,
    "main": main_race,
    "factors": factors,
    "queries": queries,
    "ablations": ablations,
    "steps": steps,
    "spo": spo,
    "few_steps": few_steps,
    "frontier_search": frontier_search,
    "frontier": frontier,
    "switches": switches,
    "bar": bar,
}


# --- running -------------------------------------------------------------------------------------


def known_lines() -> dict:
    "Every run of every group by what decides its numbers"
    found = {}
    for group in groups:
        for line in lines(group):
            found.setdefault(key_of(line["config"]), {})[group, line["name"]] = line
    return found


def missing(runs) -> list:
    "Runs without a line in their group"
    known = known_lines()
    return [run for run in runs if (run.group, run.name) not in known.get(run.key, {})]


def copy_lines(runs) -> list:
    "What another group has trained already is copied; the rest is returned, each training once"
    known, left = known_lines(), {}
    for run in missing(runs):
        found = known.get(run.key, {}).items()
        alike = [line for (group, _), line in found if along_frontier(group) == along_frontier(run.group)]
        alike = [] if run.group in ("switches", "bar") else alike  # a trust region's bound is in no line's settings
        alike = [line for line in alike if line["group"] != "bar"]  # it has other pairs
        if alike:
            append_jsonl(results / f"{run.group}.jsonl", {**alike[0], "group": run.group, "name": run.name})
        else:
            left.setdefault(run.key, run)
    return list(left.values())


def work(runs, workers):
    "Run what is missing, several at a time; lines are written as they come"
    left = copy_lines(runs)
    with ProcessPoolExecutor(workers) as pool:
        jobs = {pool.submit(execute, run): run for run in left}
        for number, job in enumerate(as_completed(jobs), 1):
            line, run = job.result(), jobs[job]
            append_jsonl(results / f"{run.group}.jsonl", line)
            print(
                f"{run.group} {number}/{len(left)}: {run.name}, {line['reward']}, seed {line['seed']}, {tried(line)}: "
                f"gain {(frontier_number if along_frontier(run.group) else final_gain)(line):+.3f} "
                f"in {line['seconds']['all']:.0f} s",
                flush=True,
            )
    copy_lines(runs)


def check(names, seeds) -> str:
    "What is missing, in words; None where nothing is"
    left = {name: missing(groups[name](seeds)) for name in names}
    for name, runs in left.items():
        print(f"{name}: {len(lines(name))} runs" + (f", {len(runs)} missing" if runs else ""))
    return (
        "; ".join(
            f"{name} lacks {', '.join(f'{run.name} ({run.config.reward}, seed {run.config.seed})' for run in runs)}"
            for name, runs in left.items()
            if runs
        )
        or None
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(groups))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--check", action="store_true", help="train nothing; fail if a run of these groups is missing")
    given = parser.parse_args()
    for name in given.groups:
        if name not in groups:
            parser.error(f"GROUP is {name!r}; choose among {', '.join(groups)}")
    if given.check:
        raise SystemExit(check(given.groups or groups, given.seeds))
    for name in given.groups or groups:
        while missing(runs := groups[name](given.seeds)):
            work(runs, given.workers)


if __name__ == "__main__":
    main()
