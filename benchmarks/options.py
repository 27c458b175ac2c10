"""What may make a run faster, on and off in turn: seconds of both halves of an epoch, and the log-ratio it leaves.

    python benchmarks/options.py                      # SD-Turbo, a fifth as wide, and the embedded model
    python benchmarks/options.py --models tiny --options "blocks compiled" "LoRA fused while sampling"
    python benchmarks/options.py --show               # run nothing; print the table of what is there

For each entry of `options` two policies of the same weights train side by side, one with the option and one without.
They take turns epoch by epoch, on the same noise, and the table shows the median of the ratios off/on: above 1 the
option is faster. The first epoch, which compiles and warms up, is shown by itself. The log-ratio is the largest that
any epoch had before its first update, when it should be zero; `bound` is what the trainer accepts (a hundredth of
the clip in float32, a tenth in half precision) before it computes the old log-probabilities again.

An option becomes a setting of the package only where it is faster and stays within the bound. On a CPU processor
time is counted, that of the compiler included, which starts with an empty cache; on a GPU `gpu_check.py` runs the
same entries at full size. One JSON line a row is added to `--output`.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace

import torch
from halves import first_half, machine, second_half
from random_models import kinds
from throughput import now

from sdpo_nb.config import TrainConfig, resolve
from sdpo_nb.files import append_jsonl, read_jsonl, versions
from sdpo_nb.lora import adapter_layers
from sdpo_nb.models import Policy, load_policy
from sdpo_nb.trainer import Trainer

results = Path(__file__).parent / "results"
fifth = dict(width=64, image_size=128)  # of SD-Turbo: 320 and 512; a width has to be a multiple of 32


@dataclass(frozen=True)
class Option:
    "Something that may make a run faster: settings, or what is done to policy or trainer before the first epoch"

    settings: dict = field(
        default_factory=dict
    )  # of TrainConfig, with the option; left out while there is no such field
    both: dict = field(default_factory=dict)  # settings with it and without
    policy: Callable = None  # called with the policy, before there is a trainer
    instead: Callable = None  # called with the policy of the other side
    trainer: Callable = None  # called with the trainer
    around: Callable = None  # a context manager around everything
    precision: str = "bf16"  # on a GPU
    gpu_only: bool = False
    cpu_only: bool = False


@contextmanager
def tf32():
    "Matrix products of float32 with fewer digits"
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def compiling():
    "Room for every shape of block that a UNet has, with and without gradients"
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 256


def compile_repeated(policy):
    "The blocks that diffusers calls repeated: in a UNet those of attention"
    compiling()
    policy.denoiser.compile_repeated_blocks(dynamic=False)


def compile_blocks(policy):
    "The repeated blocks, and those of convolutions that a UNet has besides"
    compile_repeated(policy)
    for module in policy.denoiser.modules():
        if type(module).__name__ == "ResnetBlock2D":
            module.compile(dynamic=False)


def compile_whole(policy):
    compiling()
    policy.denoiser.compile(dynamic=False)


def two_calls(policy):
    "Classifier-free guidance by one call with the prompt and one without"

    def predict(latents, timestep, embedding):
        without = policy.denoise(latents, timestep, policy.unconditional(embedding))
        with_prompt = policy.denoise(latents, timestep, embedding)
        return without + (policy.guidance_scale + policy.guidance_origin) * (with_prompt - without)

    policy.predict = predict


def fuse_optimizer(trainer):
    for group in trainer.optimizer.param_groups:
        group.update(fused=True, foreach=False)


def fuse_while_sampling(trainer):
    "The LoRA is added to the weights before sampling, and the weights are put back afterwards"
    sample, layers = trainer.sample, adapter_layers(trainer.policy.denoiser)

    def fused():
        before = [layer.get_base_layer().weight.data.clone() for layer in layers]
        for layer in layers:
            layer.merge()
        try:
            return sample()
        finally:
            for layer, weight in zip(layers, before):
                layer.unmerge()
                layer.get_base_layer().weight.data.copy_(weight)

    trainer.sample = fused


def graphed(work):
    "A CUDA graph of some work, and what it leaves there"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = work()
    return graph, output


def graph_sampling(policy):
    "A CUDA graph of the network's call without a gradient, for each shape"
    plain, kept = policy.denoise, {}

    def denoise(latents, timestep, embedding):
        if torch.is_grad_enabled():
            return plain(latents, timestep, embedding)
        given = [latents, timestep, *(getattr(embedding, f.name) for f in fields(embedding))]
        key = tuple(x.shape for x in given)
        if key not in kept:
            own, kind = [x.clone() for x in given], type(embedding)
            kept[key] = own, *graphed(lambda: plain(*own[:2], kind(*own[2:])))
        places, graph, output = kept[key]
        for place, value in zip(places, given):
            place.copy_(value)
        graph.replay()
        return output.clone()

    policy.denoise = denoise


few = dict(pairs_per_epoch=4, pairs_per_update=4, micro_batch=4)  # so few that a GPU waits for the host

options = {
    "fused AdamW": Option(trainer=fuse_optimizer),
    "channels last": Option(policy=lambda policy: policy.denoiser.to(memory_format=torch.channels_last)),
    "LoRA fused while sampling": Option(trainer=fuse_while_sampling),
    "guidance in one call": Option(both=dict(guidance_scale=3.0), instead=two_calls),
    "sampling batch four times as large": Option(settings=dict(sampling_batch=4), both=dict(micro_batch=1)),
    "gradient checkpointing": Option(settings=dict(gradient_checkpointing=True)),
    "TF32": Option(around=tf32, precision="fp32", gpu_only=True),
    "CUDA graph while sampling": Option(policy=graph_sampling, both=few, gpu_only=True),
    "repeated blocks compiled": Option(policy=compile_repeated, cpu_only=True),
    "whole denoiser compiled": Option(policy=compile_whole, cpu_only=True),
    "blocks compiled": Option(policy=compile_blocks),  # the last one: it takes the longest
}  # what the tables call it -> how it is switched on


def offered(option) -> bool:
    return {*option.settings, *option.both} <= {f.name for f in fields(TrainConfig)}


def why_not(option, device) -> str:
    "Why it cannot be measured here; empty where it can"
    on_gpu = torch.device(device).type == "cuda"
    if option.gpu_only and not on_gpu:
        return "only on a GPU"
    if option.cpu_only and on_gpu:
        return "only on a CPU: it compiles for minutes"
    return "" if offered(option) else "the package has no such setting"


def clock(device) -> float:
    "Seconds: of a GPU on the wall's clock, of a CPU those of this process and of compilers that it started"
    started = os.times()
    return now(device) + (0.0 if device.type == "cuda" else started.children_user + started.children_system)


def epoch(trainer, number) -> dict:
    "Seconds of its halves, and the log-ratio before the first update"
    device, started = trainer.policy.device, clock(trainer.policy.device)
    rollout = first_half(trainer, number)
    middle = clock(device)
    second_half(trainer, rollout)
    return dict(sampling=middle - started, training=clock(device) - middle, **trainer.log_ratio)


def build(option, policy, config, folder, on) -> Trainer:
    "A trainer with the option or without"
    prepare = option.policy if on else option.instead
    if prepare:
        prepare(policy)
    changes = {**option.both, **(option.settings if on else {}), "output_dir": f"{folder}/{on}"}
    trainer = Trainer(policy, config["reward"], config["prompts"], resolve(TrainConfig(**{**config, **changes})), [])
    if on and option.trainer:
        option.trainer(trainer)
    return trainer


def compare(option, make_policy, config: dict, rounds: int) -> dict:
    "Off against on, in turns"
    with tempfile.TemporaryDirectory() as folder:
        trainers = {on: build(option, make_policy(), config, folder, on) for on in (False, True)}
        found = {on: [] for on in trainers}
        for number in range(rounds + 1):
            for on, trainer in sorted(trainers.items(), reverse=number % 2):  # neither is always first
                with option.around() if on and option.around else nullcontext():
                    found[on].append(epoch(trainer, number))
    row = dict(first_epoch=sum(found[True][0][half] for half in ("sampling", "training")))
    for half in ("sampling", "training"):
        ratios = [off[half] / on[half] for off, on in zip(found[False][1:], found[True][1:])]
        row |= {f"{half}_times_as_fast": statistics.median(ratios), f"{half}_ratios": ratios}
        row[f"{half}_seconds"] = statistics.median(on[half] for on in found[True][1:])
    largest = {on: max(entry["max_before_update"] for entry in found[on]) for on in found}
    row |= dict(log_ratio=largest[True], log_ratio_without=largest[False], bound=trainers[True].log_ratio_bound())
    row |= dict(recomputed=sum(entry["recomputed"] for entry in found[True]))
    return row | dict(within_bound=row["log_ratio"] <= row["bound"] and not row["recomputed"])


# --- on this machine -----------------------------------------------------------------------------


def fifth_width():
    torch.manual_seed(0)
    return Policy(kinds["sd_turbo"](**fifth), "SD-Turbo, a fifth as wide")


models = {  # name -> (makes the policy, settings, epochs that are compared)
    "sd_turbo/5": (fifth_width, dict(pairs_per_epoch=4, num_steps=2, reward="warmth"), 4),
    "tiny": (lambda: load_policy("tiny"), dict(pairs_per_epoch=16, num_steps=2, reward="shapes_aesthetic"), 8),
}


def measured(model, name) -> dict:
    "The line of a row"
    make_policy, settings, rounds = models[model]
    pairs, option = settings["pairs_per_epoch"], options[name]
    same = dict(prompts="shapes", pairs_per_update=pairs, micro_batch=min(pairs, 8), buffer_size=32, min_count=1)
    config = {**same, **settings}
    started = time.perf_counter()
    row = compare(option, make_policy, config, rounds)
    return {"model": model, "option": name, **row, "wall": time.perf_counter() - started, "config": config}


def show(line):
    "A line of the table"
    if "not_measured" in line:
        return print(f"{line['model']:<12}{line['option']:<36} not measured: {line['not_measured']}", flush=True)
    halves = []
    for half in ("sampling", "training"):
        ratios = line[f"{half}_ratios"]
        halves.append(f"{half} {line[f'{half}_times_as_fast']:.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
    log_ratio = f"log-ratio {line['log_ratio']:.0e} of {line['bound']:.0e}" + ", recomputed" * bool(line["recomputed"])
    first = f"first epoch {line['first_epoch']:.1f} s"
    print(f"{line['model']:<12}{line['option']:<36}{halves[0]:<29}{halves[1]:<29}{first:<24}{log_ratio}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(models), choices=list(models))
    parser.add_argument("--options", nargs="+", default=list(options), choices=list(options))
    parser.add_argument("--output", type=Path, default=results / "options.jsonl")
    parser.add_argument("--show", action="store_true")
    given = parser.parse_args()
    if given.show:
        return [show(line) for line in read_jsonl(given.output)]
    torch.set_num_threads(1)
    here = machine(SimpleNamespace(device=torch.device("cpu")))
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= dict(TORCHINDUCTOR_CACHE_DIR=cache, TORCHINDUCTOR_COMPILE_THREADS="1")
        for model in given.models:
            for name in given.options:
                if reason := why_not(options[name], "cpu"):
                    show(dict(model=model, option=name, not_measured=reason))
                    continue
                line = measured(model, name)
                show(line)
                append_jsonl(given.output, {**line, "versions": versions(), "machine": here, "evaluations": []})


if __name__ == "__main__":
    main()
