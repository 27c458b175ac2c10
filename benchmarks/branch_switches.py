"""What else the field does to hold a policy back, tried on `sdpo_branch`, on seeds that no reported run uses.

    python benchmarks/branch_switches.py      # -> results/experiments/branch_switches.jsonl, about half an hour

First one switch at a time on one seed, each line measured along its run as those of `experiments.py frontier` are.
Then what moved the frontier, stronger and together, on three seeds, measured as `experiments.py bar` is: late in the
run, with enough pictures to tell three points of agreement from nine. What is there already is left alone.
"""

import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from experiments import MeasureAlong, frontier_run, mixture, mostly_quality, quality, shorten
from trust_region import TrustRegionTrainer

from sdpo_nb.branch import BranchTrainer
from sdpo_nb.files import append_jsonl, read_jsonl, versions
from sdpo_nb.models import load_policy

results = Path(__file__).parent / "results" / "experiments" / "branch_switches.jsonl"
seeds, method, searched = (301, 302, 303), "Branch, mixed T", dict(learning_rate=1e-3, pairs_per_update=4)


class DecayTrainer(BranchTrainer):
    "The learning rate falls linearly from twice its value to nothing"

    def begin_epoch(self):
        super().begin_epoch()
        left = 1 - self.epoch / self.total
        for group in self.optimizer.param_groups:
            group["lr"] = 2 * left * self.config.learning_rate


class NarrowTrainer(TrustRegionTrainer):
    bound = 1e-6


switches = {
    "none": (BranchTrainer, {}),
    "KL to the policy before training, 0.3": (BranchTrainer, dict(kl_coefficient=0.3)),
    "KL to the policy before training, 3": (BranchTrainer, dict(kl_coefficient=3.0)),
    "limit of each log-ratio 0.1": (BranchTrainer, dict(clip_range=0.1)),
    "limit of the divergence 1e-5": (TrustRegionTrainer, dict(clip_range=0.0)),
    "limit of the divergence 1e-6": (NarrowTrainer, dict(clip_range=0.0)),
    "learning rate falls": (DecayTrainer, {}),
}


stronger = {  # trainer, changes, reward
    "KL 0.3": (BranchTrainer, dict(kl_coefficient=0.3), quality),
    "KL 0.6": (BranchTrainer, dict(kl_coefficient=0.6), quality),
    "KL 0.3 and limit of the divergence 1e-5": (TrustRegionTrainer, dict(kl_coefficient=0.3, clip_range=0.0), quality),
    "KL 0.3, half of the reward is alignment": (BranchTrainer, dict(kl_coefficient=0.3), mixture),
    "KL 0.3, 30 % of the reward is alignment": (BranchTrainer, dict(kl_coefficient=0.3), mostly_quality),
}
given_up = set(stronger) - {"KL 0.3", "KL 0.3, half of the reward is alignment"}  # after the first seed
tries = [(name, seeds[0]) for name in switches] + [
    (name, seed) for seed in seeds for name in stronger if seed == seeds[0] or name not in given_up
]


def run(name, seed) -> dict:
    "One training, measured on its way"
    kind, changes, reward = stronger.get(name) or (*switches[name], quality)
    config = frontier_run("frontier", method, seed, reward, **{**searched, **changes}).config
    measuring = MeasureAlong(fine=name in stronger)
    with tempfile.TemporaryDirectory() as folder:
        config = type(config)(**{**asdict(config), "output_dir": f"{folder}/run"})
        trainer = kind(load_policy("tiny"), config.reward, config.prompts, config, callbacks=[measuring])
        trainer.total = config.epochs
        trainer.train()
    dropped = trainer.dropped / max(1, trainer.seen) if isinstance(trainer, TrustRegionTrainer) else None
    record = {"group": "branch_switches", "name": name, "recipe": config.recipe, "reward": config.reward, "seed": seed}
    record |= {"config": {**asdict(config), "output_dir": None}, "versions": versions(), "dropped": dropped}
    return {**record, **shorten({"evaluations": measuring.evaluations})}


if __name__ == "__main__":
    torch.set_num_threads(1)
    done = {(line["name"], line["seed"]) for line in (read_jsonl(results) if results.is_file() else [])}
    for name, seed in (one for one in tries if one not in done):
        append_jsonl(results, run(name, seed))
        print(name, seed, "done", flush=True)
