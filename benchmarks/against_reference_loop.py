"""How much faster is one batched loop than the public SDPO code's schedule of calls? Same model, samples and updates.

    python benchmarks/against_reference_loop.py                     # the embedded model
    python benchmarks/against_reference_loop.py --policy FOLDER --reward jpeg_compressibility --precision bf16

The reference's schedule, on our functions: the two trajectories of a pair are sampled by separate calls of the
network, and trained by separate calls in micro-batches of one or two pairs whose gradients are accumulated; the
first prediction of a pair, which both share, is decoded and scored twice; pictures are decoded in the batches they
were sampled in. Both loops take turns in one run, on the same noise, and must end up with the same gradient before
anything is timed. On a CPU processor time is counted.
"""

import argparse
import statistics
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
from halves import backward, first_half, machine, second_half, take_gradient, updates
from throughput import now

from sdpo_nb.config import TrainConfig, resolve
from sdpo_nb.dense import query_indices
from sdpo_nb.files import append_jsonl, versions
from sdpo_nb.mdp import pair_noise, sample_trajectories
from sdpo_nb.models import load_policy, precisions
from sdpo_nb.trainer import Rollout, Trainer

results = Path(__file__).parent / "results"


class ReferenceLoop(Trainer):
    "The same algorithm, with the calls of network, decoder and reward that the public code makes"

    chunk_size = 8  # pairs

    def sample(self):
        c, (groups, prompts) = self.config, self.draw_groups()
        embedding, parts = self.policy.embed(prompts), []
        place = dict(device=self.policy.device, dtype=self.policy.dtype)
        for chunk in torch.arange(len(groups)).split(self.chunk_size):
            noise = pair_noise(c.seed, self.epoch, groups[chunk], c.num_steps, self.policy.latent_shape, **place)
            predict = lambda x, t: self.policy.predict(x, t, embedding[chunk])
            parts.append([sample_trajectories(predict, self.sampler, *(x[k] for x in noise)) for k in (0, 1)])

        def join(name):
            return torch.stack([torch.cat([getattr(part[k], name) for part in parts]) for k in (0, 1)])

        return Rollout(prompts, embedding, join("latents"), join("pred_x0"), join("log_prob"))

    def score(self, rollout):
        K, B, T = rollout.log_prob.shape
        rollout.indices = query_indices(rollout.pred_x0.flatten(0, 1), 3, self.config.anchor).cpu().unflatten(0, (K, B))

        def look(k, chunk, query):
            pred_x0 = rollout.pred_x0[k, chunk, rollout.indices[k, chunk, query]]
            return self.score_latents(pred_x0, [rollout.prompts[i] for i in chunk])

        def rows(k):
            chunks = torch.arange(B).split(self.chunk_size)
            return torch.cat([torch.stack([look(k, chunk, query) for query in range(3)], 1) for chunk in chunks])

        rollout.rewards = torch.stack([rows(k) for k in range(K)])
        rollout.queries += 3 * K * B

    def action_log_prob(self, rollout, part):
        (groups, steps), both = part, []
        timestep, embedding = self.sampler.timesteps[steps], rollout.embedding[groups]
        for latents in rollout.latents:
            state, action = latents[groups, steps], latents[groups, steps + 1]
            output = self.policy.predict(state, timestep, embedding)
            both.append((self.sampler.step(output, state, steps, action=action).log_prob, output))
        return torch.stack([log_prob for log_prob, _ in both]), torch.cat([output for _, output in both])


def gradient(trainer):
    "Of the first update of an epoch, flattened"
    rollout = first_half(trainer, 0)
    backward(trainer, rollout, next(iter(updates(trainer, rollout))))
    return take_gradient(trainer)


def seconds(trainer, epoch) -> dict:
    "Sampling with scoring, and training, of one epoch"
    device = trainer.policy.device
    started = now(device)
    rollout = first_half(trainer, epoch)
    middle = now(device)
    second_half(trainer, rollout)
    end = now(device)
    return {"sampling and scoring": middle - started, "training": end - middle, "epoch": end - started}


def arguments():
    "What the command line says"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="tiny", help="as load_policy takes it")
    parser.add_argument("--reward", default="shapes_aesthetic")
    parser.add_argument("--precision", default="fp32", choices=precisions)
    parser.add_argument("--num_steps", type=int, default=10)
    parser.add_argument("--pairs_per_epoch", type=int, default=16)
    parser.add_argument("--micro_batch", type=int, default=16, help="pairs, of our loop")
    parser.add_argument("--reference_micro_batch", type=int, nargs="+", default=[1, 2], help="pairs, of theirs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=results / "against_reference_loop.jsonl")
    return parser.parse_args()


def measure(policy, config, loops, repeats) -> tuple:
    "Relative differences of the gradient from ours, and the seconds of every repeat, by loop"
    with tempfile.TemporaryDirectory() as folder:

        def build(name):
            kind, size = loops[name]
            own = replace(config, micro_batch=size, output_dir=f"{folder}/{name}")
            return kind(policy, config.reward, config.prompts, own, callbacks=[])

        gradients = {name: gradient(build(name)) for name in loops}
        ours = gradients["ours"]
        differences = {name: ((found - ours).norm() / ours.norm()).item() for name, found in gradients.items()}
        if config.precision == "fp32" and max(differences.values()) > 1e-3:
            raise SystemExit(f"The loops disagree about the gradient: {differences}.")
        times = {name: [] for name in loops}
        for repeat in range(repeats):  # the gradients have warmed everything up
            for name in loops:  # a fresh LoRA each, all on the same noise
                times[name].append(seconds(build(name), repeat + 1))
    return differences, times


def main():
    given = arguments()
    policy = load_policy(given.policy, precision=given.precision)
    same = {name: getattr(given, name) for name in ("policy", "reward", "precision", "num_steps", "pairs_per_epoch")}
    sizes = dict(micro_batch=given.micro_batch, pairs_per_update=given.pairs_per_epoch)
    config = resolve(TrainConfig(**same, **sizes, learning_rate=1e-5))
    theirs = {f"reference, micro-batch {size}": (ReferenceLoop, size) for size in given.reference_micro_batch}
    loops = {"ours": (Trainer, given.micro_batch), **theirs}
    differences, times = measure(policy, config, loops, given.repeats)
    for name, found in times.items():
        row = {part: statistics.median(entry[part] for entry in found) for part in found[0]}
        ratios = [entry["epoch"] / ours["epoch"] for entry, ours in zip(found, times["ours"])]
        columns = "".join(f"{part}: {value:6.2f} s   " for part, value in row.items())
        ratio = statistics.median(ratios)
        print(f"{name:<27}{columns}ratio {ratio:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]", flush=True)
        line = {name: getattr(config, name) for name in ("recipe", "reward", "seed")}
        line |= {"config": {**asdict(config), "output_dir": None, "micro_batch": loops[name][1]}}
        line |= {"versions": versions(), "machine": machine(policy), "seconds": row, "ratio": ratio, "ratios": ratios}
        line |= {"gradient_difference": differences[name], "evaluations": []}
        append_jsonl(given.output, {"loop": name, **line})


if __name__ == "__main__":
    main()
