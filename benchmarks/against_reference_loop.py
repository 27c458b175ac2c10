"""How much faster is one batched loop than the schedule of calls of the public SDPO code? Same model, samples and updates.

    python benchmarks/against_reference_loop.py                     # the embedded model
    python benchmarks/against_reference_loop.py --policy FOLDER --reward jpeg_compressibility --precision bf16 --pairs_per_epoch 32

The reference's schedule, on our functions: the two trajectories of a pair are sampled by separate calls of the network, and
trained by separate calls in micro-batches of one or two pairs whose gradients are accumulated; the first prediction of a pair,
which both share, is decoded and scored twice; pictures are decoded in the batches they were sampled in. Both loops take turns
in one run, on the same noise, and must end up with the same gradient before anything is timed. On a CPU processor time is counted.
"""

import argparse
import os
import platform
import statistics
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from sdpo_nb.config import TrainConfig, resolve
from sdpo_nb.dense import query_indices
from sdpo_nb.files import append_jsonl
from sdpo_nb.mdp import ddim_step, pair_noise, sample_trajectories
from sdpo_nb.models import load_policy, precisions
from sdpo_nb.trainer import Rollout, Trainer, versions
from throughput import now

results = Path(__file__).parent / "results"


class ReferenceLoop(Trainer):
    "The same algorithm, with the calls of network, decoder and reward that the public code makes"

    sampling_batch = 8  # pairs

    def sample(self, epoch):
        c, (units, prompts) = self.config, self.draw_units(epoch)
        embedding, parts = self.policy.embed(prompts), []
        for chunk in torch.arange(len(units)).split(self.sampling_batch):
            initial, noises = pair_noise(
                c.seed,
                epoch,
                units[chunk],
                c.num_steps,
                self.policy.latent_shape,
                device=self.policy.device,
                dtype=self.policy.dtype,
            )
            parts.append(
                [
                    sample_trajectories(
                        lambda x, t: self.policy.predict(x, t, embedding[chunk]),
                        self.scheduler,
                        initial[k],
                        noises[k],
                        eta=c.eta,
                        prev_timestep=self.prev_timestep,
                    )
                    for k in (0, 1)
                ]
            )

        def join(name):
            return torch.stack([torch.cat([getattr(part[k], name) for part in parts]) for k in (0, 1)])

        return Rollout(prompts, embedding, join("latents"), join("pred_x0"), join("log_prob"))

    def score(self, rollout, epoch=0):
        K, B, T = rollout.log_prob.shape
        rollout.indices = query_indices(rollout.pred_x0.flatten(0, 1), 3, self.config.anchor).cpu().unflatten(0, (K, B))
        rollout.rewards = torch.stack(
            [
                torch.cat(
                    [
                        torch.stack(
                            [
                                self.score_latents(
                                    rollout.pred_x0[k, chunk, rollout.indices[k, chunk, query]],
                                    [rollout.prompts[i] for i in chunk],
                                )
                                for query in range(3)
                            ],
                            1,
                        )
                        for chunk in torch.arange(B).split(self.sampling_batch)
                    ]
                )
                for k in range(K)
            ]
        )
        rollout.queries += 3 * K * B

    def action_log_prob(self, rollout, units, steps):
        timestep, embedding = self.scheduler.timesteps[steps].to(rollout.latents.device), rollout.embedding[units]
        both = []
        for latents in rollout.latents:
            state, action = latents[units, steps], latents[units, steps + 1]
            output = self.policy.predict(state, timestep, embedding)
            both.append(
                (
                    ddim_step(
                        self.scheduler,
                        output,
                        timestep,
                        state,
                        eta=self.config.eta,
                        prev_sample=action,
                        prev_timestep=self.prev_timestep,
                    ).log_prob,
                    output,
                )
            )
        return torch.stack([log_prob for log_prob, _ in both]), torch.cat([output for _, output in both])


def gradient(trainer):
    "Of the first update of an epoch, flattened"
    rollout = trainer.rollout(0)
    trainer.apply_update(rollout, trainer.epoch_updates(rollout, 0)[0])
    found = torch.cat([parameter.grad.flatten() for parameter in trainer.parameters])
    trainer.optimizer.zero_grad()
    return found


def seconds(trainer, epoch) -> dict:
    "Sampling with scoring, and training, of one epoch"
    device = trainer.policy.device
    started = now(device)
    rollout = trainer.rollout(epoch)
    middle = now(device)
    trainer.update(rollout, epoch)
    end = now(device)
    return {"sampling and scoring": middle - started, "training": end - middle, "epoch": end - started}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="tiny", help="as load_policy takes it")
    parser.add_argument("--reward", default="shapes_aesthetic")
    parser.add_argument("--precision", default="fp32", choices=precisions)
    parser.add_argument("--num_steps", type=int, default=10)
    parser.add_argument("--pairs_per_epoch", type=int, default=16)
    parser.add_argument("--micro_batch", type=int, default=16, help="pairs, of our loop")
    parser.add_argument(
        "--reference_micro_batch", type=int, nargs="+", default=[1, 2], help="pairs, of the reference's"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=results / "against_reference_loop.jsonl")
    given = parser.parse_args()
    policy = load_policy(given.policy, precision=given.precision)
    config = resolve(
        TrainConfig(
            policy=given.policy,
            reward=given.reward,
            precision=given.precision,
            num_steps=given.num_steps,
            micro_batch=given.micro_batch,
            pairs_per_epoch=given.pairs_per_epoch,
            pairs_per_update=given.pairs_per_epoch,
            learning_rate=1e-5,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        loops = {
            "ours": (Trainer, given.micro_batch),
            **{f"reference, micro-batch {size}": (ReferenceLoop, size) for size in given.reference_micro_batch},
        }

        def build(name):
            kind, size = loops[name]
            return kind(
                policy,
                config.reward,
                config.prompts,
                replace(config, micro_batch=size, output_dir=f"{folder}/{name}"),
                callbacks=[],
            )

        gradients = {name: gradient(build(name)) for name in loops}
        differences = {
            name: ((found - gradients["ours"]).norm() / gradients["ours"].norm()).item()
            for name, found in gradients.items()
        }
        if given.precision == "fp32" and max(differences.values()) > 1e-3:
            raise SystemExit(f"The loops disagree about the gradient: {differences}.")
        times = {name: [] for name in loops}
        for repeat in range(given.repeats + 1):
            for name in loops:  # a fresh LoRA each, all on the same noise
                trainer = build(name)
                found = seconds(trainer, repeat)
                if repeat:
                    times[name].append(found)  # the first round warms up
    for name, found in times.items():
        row = {part: statistics.median(entry[part] for entry in found) for part in found[0]}
        ratios = [entry["epoch"] / ours["epoch"] for entry, ours in zip(found, times["ours"])]
        print(
            f"{name:<27}"
            + "".join(f"{part}: {value:6.2f} s   " for part, value in row.items())
            + f"ratio {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]",
            flush=True,
        )
        device = torch.cuda.get_device_name() if policy.device.type == "cuda" else platform.machine()
        append_jsonl(
            given.output,
            {
                "loop": name,
                "recipe": config.recipe,
                "reward": config.reward,
                "seed": config.seed,
                "config": {**asdict(config), "output_dir": None, "micro_batch": loops[name][1]},
                "versions": versions(),
                "machine": {
                    "device": device,
                    "system": platform.system(),
                    "cores": os.cpu_count(),
                    "threads": torch.get_num_threads(),
                },
                "seconds": row,
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "gradient_difference": differences[name],
                "evaluations": [],
            },
        )


if __name__ == "__main__":
    main()
