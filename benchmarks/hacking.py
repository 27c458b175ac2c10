"""Train for a reward that can be pleased without doing what was asked, and keep watching what it should have meant.

    python benchmarks/hacking.py               # every variant, seeds 1, 2, 3 -> results/experiments/hacking.jsonl
    python benchmarks/hacking.py --seeds 7 --variants hack

Each line is one run: its log, and every few epochs an evaluation on captions and noise that training never meets.
What is there already is left alone, so an interrupted call goes on where it stopped.
"""

import argparse
import base64
import platform
import tempfile
import time
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

import torch
from evaluations import progress, table
from PIL import Image

from sdpo_nb.config import preset_config
from sdpo_nb.evaluate import step_generalization
from sdpo_nb.files import append_jsonl, read_jsonl, versions
from sdpo_nb.models import load_policy
from sdpo_nb.prompts import balanced
from sdpo_nb.rewards import get_reward
from sdpo_nb.run import Callback
from sdpo_nb.shapes import all_captions
from sdpo_nb.trainer import Trainer

results = Path(__file__).parent / "results" / "experiments" / "hacking.jsonl"
variants = {  # name -> what differs from the preset
    "hack": {"reward": "shapes_aesthetic", "learning_rate": 3e-3},
    "mixture": {"reward": "0.3*shapes_aesthetic+0.7*shapes_alignment", "learning_rate": 3e-3},
    "divergence": {"reward": "shapes_aesthetic", "learning_rate": 3e-3, "kl_coefficient": 0.3},
}
held_out = [caption for caption in all_captions() if caption not in balanced][
    ::7
]  # 24 of the captions that are not trained on


class HeldOut(Callback):
    "Every few epochs: reward, agreement, alignment and diversity on held-out captions, and pictures of four of them"

    def __init__(self, every=3):
        self.every, self.evaluations, self.pictures = every, [], []
        self.others = {name: get_reward(name) for name in ("shapes_aesthetic", "shapes_alignment")}

    def evaluate(self, trainer):
        found = step_generalization(
            trainer.policy, trainer.reward, held_out, steps=(1, 4, 10), samples=96, seed=2000, other_rewards=self.others
        )
        self.evaluations.append(
            {
                **progress(trainer),
                **table(found),
                "attributes": {name: right.nanmean(1).tolist() for name, right in found.correct.items()},
                "other_rewards": {name: rewards.mean(1).tolist() for name, rewards in found.other_rewards.items()},
            }
        )
        self.captions = found.image_prompts[::2]
        self.pictures.append(torch.cat(list(found.images[-1, ::2]), 1))  # at ten steps, as trained

    def before_train(self, trainer):
        self.evaluate(trainer)

    def after_epoch(self, trainer, metrics):
        if metrics["epoch"] % self.every == 0:
            self.evaluate(trainer)

    def sheet(self) -> dict:  # a row a caption, a column an evaluation, no gaps
        pixels = (torch.cat(self.pictures, 2) * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(buffer := BytesIO(), "JPEG", quality=90, subsampling=0)
        return {
            "captions": self.captions,
            "epochs": [found["epoch"] for found in self.evaluations],
            "jpeg": base64.b64encode(buffer.getvalue()).decode(),
        }


def run(variant: str, seed: int) -> dict:
    "One run: settings, versions, machine, time, log, evaluations and a sheet of pictures"
    watcher, started = HeldOut(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = preset_config("tiny", **variants[variant], seed=seed, eval_samples=0, output_dir=f"{folder}/run")
        trainer = Trainer(load_policy("tiny", device="cpu"), config.reward, config.prompts, config, [watcher])
        trainer.train()
        metrics = read_jsonl(f"{folder}/run/metrics.jsonl")
    settings = {**asdict(trainer.config), "output_dir": "runs/tiny"}
    return {
        "variant": variant,
        "recipe": settings["recipe"],
        "reward": settings["reward"],
        "seed": seed,
        "config": settings,
        "versions": versions(),
        "machine": {"processor": platform.machine(), "system": platform.system()},
        "seconds": round(time.perf_counter() - started, 1),
        "metrics": metrics,
        "evaluations": watcher.evaluations,
        "pictures": watcher.sheet(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--variants", nargs="+", choices=variants, default=list(variants))
    arguments = parser.parse_args()
    for variant in arguments.variants:
        for seed in arguments.seeds:
            done = {
                (record["variant"], record["seed"]): record
                for record in (read_jsonl(results) if results.is_file() else [])
            }
            if (variant, seed) not in done:
                append_jsonl(results, record := run(variant, seed))
            else:
                record = done[variant, seed]
            first, last = record["evaluations"][0], record["evaluations"][-1]
            print(
                f"{variant}, seed {seed}: {record['seconds']:.0f} s; "
                f"at {first['steps'][-1]} steps from epoch 0 to {last['epoch']}, "
                + ", ".join(
                    f"{name} {first[name][-1]:.2f} -> {last[name][-1]:.2f}"
                    for name in ("mean", "agreement", "diversity")
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
