"""How fast this package is on a GPU, and whether it is right there: one command, no downloads, at most ten minutes.

    make gpu-check                                             # the first GPU, or without one --device cpu --small
    python benchmarks/gpu_check.py --parts machine sd_turbo sync resume
    python benchmarks/gpu_check.py --skip sdxl_turbo flow --limit 300
    python benchmarks/gpu_check.py --device cpu --small        # a rehearsal, about 100 processor seconds

The models have the real classes and shapes and random weights, made on the spot on the device; a random model costs
what a trained one costs, and what it paints is noise. Each part is a process of its own with a time limit of its own
(`parts` below); rows that were finished before a limit are kept, what was not reached says "not measured" and why.

machine      what plain matrix products and copies reach here, by precision, and what a kernel launch costs
sd_turbo     SD-Turbo at 512×512: steps a second while sampling and training, share of the matrix products' rate,
             peak memory against `memory_estimate`, and where the time goes; the same for sdxl_turbo, and for two flow
             models: flow (Stable Diffusion 3.5 Large Turbo) and sana (SANA-Sprint)
network      a call of SD-Turbo's UNet: how long it takes when nothing waits for the host (by a CUDA graph), how much
             its blocks gain by `torch.compile`, and what the place of a sample in its batch changes
decoder      a picture: as the autoencoder was loaded, as this package runs it, and compiled
kernels      which kernels the GPU spends the time of sampling and training on
options      every entry of options.py, on and off in turn, with the log-ratio before the first update and its bound
reference    our loop against the public SDPO code's schedule of calls, same gradient
worker       a reward of CLIP ViT-L's size, after sampling or in a thread meanwhile
embedded     two epochs of the embedded model here and on the CPU: do the metrics agree?
sync         does the host wait for the GPU inside the loops? torch.cuda.set_sync_debug_mode("error") around them
resume       two epochs at once, and with a stop between them: the same weights to the last bit? With torch's usual
             kernels, of which some add in any order, and with `deterministic`
recipes      an epoch of every method here and on the CPU: do the metrics agree?
demo         the first example of the README, with its evaluations: seconds, and gains by step count

What it does not say: nothing about the quality of pictures, several GPUs, or a run's hours. Its goals are those of an
H200-class GPU; on anything else they stand beside the numbers as a comparison. A rehearsal on a CPU shows that every
part runs; its numbers say nothing about a GPU, and its goals stay "not measured". The JSON is written after every
part, to `--output`; without it to results/gpu_check.json, and by a rehearsal to results/gpu_check_rehearsal.json.
What an earlier call has measured there stays, unless this one measures it again: so the parts may be run in turn.
"""

import argparse
import gc
import json
import multiprocessing
import os
import re
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # so that this process leaves the GPU to those of the parts

import against_reference_loop
import demo
import options
import scoring_worker
import throughput
import torch
from accelerate import init_empty_weights
from full_width import hub_ids
from halves import first_half, machine, second_half, updates
from random_models import full_width, kinds
from throughput import now

from sdpo_nb.config import TrainConfig, presets, resolve
from sdpo_nb.files import read_json, read_jsonl, versions, write_json
from sdpo_nb.hub import quiet_loading
from sdpo_nb.models import load_policy, policy_classes, precisions
from sdpo_nb.plan import memory_estimate
from sdpo_nb.prompts import load_prompts
from sdpo_nb.recipes import recipes
from sdpo_nb.request import method_settings, method_trainer
from sdpo_nb.trainer import Trainer

here = Path(__file__).parent


class NotMeasured(Exception):
    "Why a row is missing"


# --- models and settings -------------------------------------------------------------------------


def fill(module, device, dtype):
    "Random numbers of a usual size for parameters that have a shape only; some belong to several modules"
    made = {}
    for owner in module.modules():
        for name, old in list(owner._parameters.items()):
            if old is None:
                continue
            if id(old) not in made:
                new = torch.zeros(old.shape, device=device, dtype=dtype)
                if old.ndim > 1:
                    new.normal_(std=(old.shape[0] / old.numel()) ** 0.5)
                elif name == "weight":
                    new.fill_(1)
                made[id(old)] = old, torch.nn.Parameter(new, requires_grad=False)
            owner._parameters[name] = made[id(old)][1]


def random_policy(kind, precision, given):
    "A policy with random weights, made where it runs and in its precision; narrow with --small"
    if kind not in kinds:
        raise NotMeasured(f"there is no model of the kind {kind!r} here")
    torch.manual_seed(0)
    with init_empty_weights(), quiet_loading():
        pipeline = kinds[kind](*((32, 64) if given.small else (full_width, 512)))
    if type(pipeline).__name__ not in policy_classes:
        raise NotMeasured(f"a {type(pipeline).__name__} cannot be trained here")
    driver, dtype = policy_classes[type(pipeline).__name__], precisions[precision]
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            wide = name == "vae" and precision == "fp16"  # as `load_policy` reads it: the policy narrows it
            fill(part, given.device, torch.float32 if wide else dtype)
            part.to(given.device)  # what is no parameter
            if hasattr(part, "tie_weights"):
                part.tie_weights()
    pipeline.set_progress_bar_config(disable=True)
    return (resolve_name(driver) if isinstance(driver, str) else driver)(pipeline, hub_ids.get(kind, kind))


def settings(folder, precision="bf16", pairs=4, num_steps=3, **changes) -> TrainConfig:
    "One update's worth of pairs, in one pass"
    sizes = dict(pairs_per_epoch=pairs, pairs_per_update=pairs, micro_batch=pairs, num_steps=num_steps)
    same = dict(recipe="sdpo", reward="warmth", prompts="shapes", precision=precision, buffer_size=32)
    return resolve(TrainConfig(**{**same, **sizes, "min_count": 1, "output_dir": f"{folder}/run", **changes}))


def trainer_of(policy, config, **changes) -> Trainer:
    return Trainer(policy, config.reward, config.prompts, replace(config, **changes), callbacks=[])


# --- ceilings ------------------------------------------------------------------------------------


def bandwidth(device) -> float:
    "Bytes a second that a copy reads and writes"
    source = torch.empty((2**30 if device.type == "cuda" else 2**25), dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        started = now(device)
        target.copy_(source)
        best = min(best, now(device) - started)
    return 2 * len(source) / best


def machine_part(given):
    "Ceilings of matrix products and copies"
    device, repeats = torch.device(given.device), 3 if given.small else 10
    measured = {"fp32": torch.float32} if device.type == "cpu" else precisions  # a CPU may only emulate the others
    rates = {name: throughput.matrix_rate(device, dtype, repeats) for name, dtype in measured.items()}
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        rates["tf32"] = throughput.matrix_rate(device, torch.float32, repeats)
        torch.backends.cuda.matmul.allow_tf32 = False
    for name, rate in rates.items():
        yield dict(row=f"matrix products, {name}", teraflops_per_second=rate / 1e12)
    yield dict(row="copy, read and write", gigabytes_per_second=bandwidth(device) / 1e9)
    x, count = torch.zeros(1, device=device), 1000
    started = now(device)
    for _ in range(count):
        x.add_(1)
    yield dict(row="one small kernel, launched", microseconds=(now(device) - started) / count * 1e6)


# --- speed and memory of a model -----------------------------------------------------------------


def free_memory(device):
    "A trainer and what it holds go in cycles"
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def sizes(given, most) -> list:
    "(precision, pairs in a pass)"
    if given.small:
        return [("fp32", 1), ("fp32", 4)]
    fit = [("bf16", pairs) for pairs in given.micro_batch if pairs <= most]
    return fit + ([("fp16", 4), ("fp32", 4)] if most > 16 else [])


def model_row(policy, kind, config, rate, flops, given) -> tuple:
    "Throughput, shares and memory of one size; and the operations of a pair, which are counted once"
    pairs, cuda = config.micro_batch, policy.device.type == "cuda"
    policy.embed(load_prompts(config.prompts))  # large text encoders would come to the GPU for every new prompt
    found = throughput.measure(policy, config, 1, rate, flops and {half: pairs * flops[half] for half in flops})
    known = hub_ids | {name: presets[f"{name}_pickscore"]["policy"] for name in ("sd35_turbo", "sana_sprint")}
    sized = replace(config, policy=known.get(kind, kind), pairs_per_epoch=pairs, size=512)
    estimate = None if given.small else memory_estimate(sized).get("in all, estimated")
    shares = {name.replace(", ", " "): share for name, share in found["shares"].items()}
    row = dict(sampling_steps_per_second=found["sampled_steps_per_second"], micro_batch=pairs)
    row |= dict(training_steps_per_second=found["trained_steps_per_second"], precision=config.precision)
    row |= dict(sampling_of_peak=found["of_peak"]["sampling"], training_of_peak=found["of_peak"]["training"])
    row |= dict(peak_gb=found["peak_memory_gb"], estimated_gb=estimate, seconds=found["seconds_per_epoch"])
    row |= dict(shares=shares, memory="of the GPU" if cuda else "of the process, imports included")
    return row, {half: number / pairs for half, number in found["flops"].items()}


def model_part(kind, most=32):
    "A part that measures one model at every size, up to so many pairs in a pass"

    def part(given):
        policy = loaded = rate = flops = None
        for precision, pairs in sizes(given, most):
            row = dict(row=f"{precision}, {pairs} pair{'s' * (pairs > 1)} a pass")
            try:
                if precision != loaded:
                    policy = None  # the memory of one before the next
                    free_memory(given.device)
                    policy, loaded = random_policy(kind, precision, given), precision
                    rate = throughput.matrix_rate(policy.device, policy.dtype, 5)
                with tempfile.TemporaryDirectory() as folder:
                    found, flops = model_row(policy, kind, settings(folder, precision, pairs), rate, flops, given)
                row |= found
            except (torch.OutOfMemoryError, FloatingPointError) as error:
                row["not_measured"] = first_line(error)
            free_memory(given.device)  # of the trainer, after the error has let go of it
            yield row

    return part


# --- where the GPU's time goes -------------------------------------------------------------------

kernel_kinds = {  # the first pattern that is found in a kernel's name
    "attention": r"flash|fmha|attention|mha|sdpa",
    "convolutions": r"conv|fprop|dgrad|wgrad",
    "layout changes": r"nchw|nhwc|tensorTransform",
    "matrix products": r"gemm|gemv|cutlass|nvjet|cublas|mm|dot",
    "normalisation": r"norm|moment",
    "sums and reductions": r"reduce|sum",
    "copies": r"memcpy|memset|copy|cat",
    "elementwise": r"elementwise|vectorized|upsample|silu|gelu|mul|add",
}


def kind_of(kernel) -> str:
    return next((kind for kind, names in kernel_kinds.items() if re.search(names, kernel, re.IGNORECASE)), "the rest")


def profiled(work, device) -> dict:
    "Shares of the device's busy time by kind of kernel, and the ten largest kernels"
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    started = now(device)
    with torch.profiler.profile(activities=[activity]) as profile:
        work()
        seconds = now(device) - started
    spent = {}
    for event in profile.key_averages():
        spent[event.key] = spent.get(event.key, 0.0) + getattr(event, f"self_{'device' if cuda else 'cpu'}_time_total")
    busy, kinds = sum(spent.values()), {}
    for kernel, time_ in spent.items():
        kinds[kind_of(kernel)] = kinds.get(kind_of(kernel), 0.0) + time_ / busy
    names = {}
    for kernel, time_ in spent.items():
        names[kernel[:90]] = names.get(kernel[:90], 0.0) + time_ / busy
    largest = sorted(names, key=names.get, reverse=True)[:10]
    shares = {kind: kinds[kind] for kind in sorted(kinds, key=kinds.get, reverse=True)}
    return dict(
        seconds=seconds, busy=busy / 1e6 / seconds, shares=shares, largest={kernel: names[kernel] for kernel in largest}
    )


def kernels_part(given):
    "Both halves of an epoch, after one that warms up"
    precision, pairs = ("fp32", 2) if given.small else ("bf16", 16)
    policy = random_policy("sd_turbo", precision, given)
    with tempfile.TemporaryDirectory() as folder:
        trainer, rollouts = trainer_of(policy, settings(folder, precision, pairs)), []
        second_half(trainer, first_half(trainer, 0))
        sampling = profiled(lambda: rollouts.append(first_half(trainer, 1)), policy.device)
        training = profiled(lambda: second_half(trainer, rollouts[0]), policy.device)
    yield dict(row=f"sampling and scoring, {precision}", **sampling)
    yield dict(row=f"training, {precision}", **training)


# --- the network and the decoder by themselves ----------------------------------------------------


def fastest(work, device, repeats=3) -> float:
    "Seconds, after a call that warms up"
    work()
    times = []
    for _ in range(repeats):
        started = now(device)
        work()
        times.append(now(device) - started)
    return min(times)


def apart(one, other) -> float:
    "Largest difference, as a share of the largest value"
    return ((one.float() - other.float()).abs().max() / other.float().abs().max()).item()


def network_part(given):
    "Calls of the UNet with an untrained LoRA"
    precision, sizes = ("fp32", (2, 4)) if given.small else ("bf16", (2, 8, 32))
    policy, most = random_policy("sd_turbo", precision, given), max(sizes)
    with tempfile.TemporaryDirectory() as folder:
        sampler = trainer_of(policy, settings(folder, precision)).sampler
    prompts = (load_prompts("shapes") * most)[:most]
    embedding, steps = policy.embed(prompts), torch.arange(most).to(policy.device) % sampler.num_steps
    latents = torch.randn(most, *policy.latent_shape, device=policy.device).to(policy.dtype)

    def call(places):
        return policy.predict(latents[places], sampler.timesteps[steps[places]], embedding[places])

    everyone, shuffled = torch.arange(most, device=policy.device), torch.randperm(most).to(policy.device)
    with_gradient = call(everyone).detach()
    with torch.no_grad():
        plain, moved = call(everyone), call(shuffled)
    yield dict(row="with a gradient and without", largest_difference=apart(with_gradient, plain))
    yield dict(row="at other places of the batch", largest_difference=apart(moved, plain[shuffled]))
    row = dict(row=f"{most} samples, {precision}, with the backward pass")
    yield row | dict(seconds=fastest(lambda: call(everyone).square().mean().backward(), policy.device))
    with torch.no_grad():
        for number in sizes:
            work = partial(call, everyone[:number])
            row = dict(row=f"{number} samples, {precision}", seconds=fastest(work, policy.device))
            if policy.device.type == "cuda":
                graph, output = options.graphed(work)
                row |= dict(graph_seconds=fastest(graph.replay, policy.device), graph_differs=apart(output, work()))
            yield row
        if policy.device.type == "cuda":  # on a CPU it takes minutes
            for name, change in {"attention": options.compile_repeated, "all": options.compile_blocks}.items():
                started = now(policy.device)
                change(policy)
                first, work = apart(call(everyone), plain), partial(call, everyone)
                seconds, busy = now(policy.device) - started, profiled(work, policy.device)
                row = dict(row=f"{most} samples, {name} blocks compiled", first_call=seconds, differs=first)
                kernels = busy["busy"] * busy["seconds"]
                yield row | dict(seconds=fastest(work, policy.device), kernel_seconds=kernels)


def decoder_part(given):
    "Pictures of 512 × 512, eight at a time"
    number = 2 if given.small else 8
    policy = random_policy("sd_turbo", "fp32" if given.small else "bf16", given)
    latents = torch.randn(number, *policy.latent_shape, device=policy.device).to(policy.vae.dtype)
    middle = policy.vae.decoder.mid_block

    @torch.no_grad()
    def decode():
        return policy.vae.decode(latents, return_dict=False)[0]

    plain, hooks = decode(), dict(middle._forward_hooks)
    seconds = fastest(decode, policy.device) / number
    middle._forward_hooks.clear()
    yield dict(row="as loaded", seconds=fastest(decode, policy.device) / number, differs=apart(decode(), plain))
    middle._forward_hooks.update(hooks)
    yield dict(row="order in memory restored", seconds=seconds, differs=0.0)
    if policy.device.type == "cuda":
        started = now(policy.device)
        policy.vae.decoder.compile(dynamic=False)
        row = dict(row="compiled", differs=apart(decode(), plain), first_call=now(policy.device) - started)
        yield row | dict(seconds=fastest(decode, policy.device) / number)


# --- options -------------------------------------------------------------------------------------


def options_part(given):
    "Each entry of `options.options`, on and off in turn"
    pairs, rounds = (4, 1) if given.small else (16, 3)
    for name, option in options.options.items():
        if name not in given.options:
            continue
        precision = "fp32" if given.small else option.precision
        row = dict(row=f"{name}, {precision}")
        slow = "on a CPU it compiles for minutes" if name.endswith("compiled") and given.small else ""
        if reason := options.why_not(option, given.device) or slow:
            yield dict(row, not_measured=reason)
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                config = asdict(settings(folder, precision, pairs))
            made = partial(random_policy, "sd_turbo", precision, given)
            row |= options.compare(option, made, config, rounds)
        except Exception as error:  # one that fails leaves the others
            row["not_measured"] = f"it failed: {first_line(error)}"
        free_memory(given.device)
        yield row


# --- against the reference's schedule, and a slow reward -----------------------------------------


def reference_part(given):
    "Ours and theirs, on the same noise"
    precision, pairs = ("fp32", 2) if given.small else ("bf16", 16)
    policy = random_policy("sd_turbo", precision, given)
    with tempfile.TemporaryDirectory() as folder:
        config = settings(folder, precision, pairs, learning_rate=1e-5)
        loops = {"ours": (Trainer, pairs), "reference, 1 a pass": (against_reference_loop.ReferenceLoop, 1)}
        differences, times = against_reference_loop.measure(policy, config, loops, 1)
    for name, found in times.items():
        ratio = found[0]["epoch"] / times["ours"][0]["epoch"]
        yield dict(row=name, **found[0], ratio=ratio, gradient_difference=differences[name])


class Scorer:
    "The picture tower of CLIP ViT-L/14 with random weights, as aesthetic scorers use it; with --small a tiny one"

    def __init__(self, device, small):
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        whole = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
        narrow = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2)
        config = CLIPVisionConfig(image_size=224, patch_size=14, projection_dim=768, **(narrow if small else whole))
        with torch.device(device):
            self.tower = CLIPVisionModelWithProjection(config).requires_grad_(False).eval()
        self.name = "clip_size"

    def __call__(self, images, prompts):
        pixels = torch.nn.functional.interpolate(images.float(), (224, 224), mode="bilinear", antialias=True)
        return self.tower(pixel_values=(pixels - 0.45) / 0.27).image_embeds.float().mean(1)


def worker_part(given):
    "An epoch's sampling and scoring, one after the other and at once"
    precision = "fp32" if given.small else "bf16"
    policy, reward = random_policy("sd_turbo", precision, given), Scorer(given.device, given.small)
    sized = dict(num_steps=4, pairs_per_epoch=8, micro_batch=2, rounds=2) if given.small else None
    sized = sized or dict(num_steps=10, pairs_per_epoch=32, micro_batch=8, rounds=1)
    found = scoring_worker.compare(policy, reward, SimpleNamespace(policy=policy.name, precision=precision, **sized))
    seconds = {name: min(found[f"seconds_{name}"]) for name in ("after_each_other", "in_a_thread")}
    yield dict(row="a reward of CLIP ViT-L's size", **seconds, times_as_fast=found["ratio"], queries=found["queries"])


# --- is it right? --------------------------------------------------------------------------------


def embedded_run(device, folder, epochs=2, resume=False, **changes) -> tuple:
    "Metrics of each epoch, and the weights of the LoRA"
    changes |= dict(num_steps=3, reward="shapes_aesthetic", micro_batch=4, checkpoint_every=1, eval_samples=0)
    changes |= dict(policy="tiny", epochs=epochs, resume=f"{folder}/run" if resume else None)
    trainer = trainer_of(load_policy("tiny", device=device), settings(folder, "fp32", 8, **changes))
    trainer.train()
    lines = [json.loads(line) for line in Path(trainer.folder, "metrics.jsonl").read_text().splitlines()]
    weights = torch.cat([weight.detach().flatten().cpu() for weight in trainer.parameters])
    return lines, weights


compared = ("reward/mean", "reward/std", "loss", "grad_norm", "diversity")


def embedded_part(given):
    "Here against the CPU; convolutions in TF32, as torch has it, and in float32"
    with tempfile.TemporaryDirectory() as folder:
        wanted, weights = embedded_run("cpu", f"{folder}/cpu")
        ways = {"float32": False} | ({} if given.device == "cpu" else {"torch's default": True})
        for name, allowed in ways.items():
            torch.backends.cudnn.allow_tf32 = allowed
            lines, found = embedded_run(given.device, f"{folder}/{allowed}")
            worst = {
                metric: max(abs(a[metric] - b[metric]) / max(abs(b[metric]), 1e-3) for a, b in zip(lines, wanted))
                for metric in compared
            }
            moved = ((found - weights).norm() / weights.norm()).item()
            yield dict(row=f"{given.device} against cpu, {name}", **worst, weights=moved)


def resume_part(given):
    "At once twice, which tells what the device itself repeats, and with a stop between the epochs"
    for deterministic in (False, True):
        kernels = ", deterministic" * deterministic
        with tempfile.TemporaryDirectory() as folder:
            run = partial(embedded_run, given.device, deterministic=deterministic)
            lines, weights = run(f"{folder}/a")
            _, again = run(f"{folder}/b")
            run(f"{folder}/c", epochs=1)
            resumed_lines, resumed = run(f"{folder}/c", resume=True)
        same = all(a[name] == b[name] for a, b in zip(lines, resumed_lines) for name in compared)
        differences = [(other - weights).abs().max().item() for other in (again, resumed)]
        yield dict(row=f"the same run twice{kernels}", largest_difference=differences[0], exact=differences[0] == 0)
        row = dict(largest_difference=differences[1], exact=differences[1] == 0, same_metrics=same)
        yield dict(row=f"stopped and resumed{kernels}", **row)


def one_epoch(recipe, device, folder) -> tuple:
    "The metrics of an epoch of any method, and the weights of the LoRA"
    kind = method_settings(recipe)
    known = {f.name for f in fields(kind)}
    sizes = dict(pairs_per_epoch=4, pairs_per_update=4, micro_batch=4, min_count=1, buffer_size=32, num_steps=2)
    sizes |= dict(recipe=recipe, reward="shapes_aesthetic", epochs=1, eval_samples=0, output_dir=folder)
    config = resolve(kind(**{name: value for name, value in sizes.items() if name in known}))
    policy = load_policy("tiny", device=device)
    trainer = method_trainer(recipe)(policy, config.reward, config.prompts, config, callbacks=[])
    trainer.train()
    weights = torch.cat([weight.detach().flatten().cpu() for weight in trainer.parameters])
    return read_jsonl(f"{folder}/metrics.jsonl")[0], weights


def recipes_part(given):
    "Every method here against the CPU, from the same samples on; in float32, convolutions too"
    torch.backends.cudnn.allow_tf32 = False
    for recipe in recipes:
        row = dict(row=recipe)
        try:
            with tempfile.TemporaryDirectory() as folder:
                wanted, weights = one_epoch(recipe, "cpu", f"{folder}/cpu")
                found, here_weights = one_epoch(recipe, given.device, f"{folder}/here")
            for metric in (name for name in compared if wanted.get(name) is not None):
                row[metric] = abs(found[metric] - wanted[metric]) / max(abs(wanted[metric]), 1e-3)
            row["weights"] = ((here_weights - weights).norm() / weights.norm()).item()
        except Exception as error:  # one that fails leaves the others
            traceback.print_exc()
            row["not_measured"] = f"it failed: {first_line(error)}"
        yield row


def demo_part(given):
    "In a process of its own, as a user starts it"
    words = ("--epochs", "1", "--eval_samples", "4") if given.small else ()
    found = demo.run(0, words=words)
    table, halves = found["evaluation"], ("seconds/sample", "seconds/reward", "seconds/train")
    gains = {
        f"gain at {T}": gain / std
        for T, gain, std in zip(table["steps"], table["gain"]["mean"], table["before"]["std"])
    }
    row = dict(
        row="sdpo-train tiny",
        seconds=found["seconds"],
        training=sum(line[half] for line in found["metrics"] for half in halves),
    )
    yield row | dict(
        shares=gains, agreement_lost=max(map(float.__sub__, table["agreement"]["before"], table["agreement"]["after"]))
    )


@contextmanager
def sync_mode(mode):
    "torch's watch over calls that wait for the GPU"
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def guarded(function, mode, found):
    "Under the watch; what it says goes to `found`"

    def run(*args, **named):
        said = []
        try:
            with sync_mode(mode), warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                return function(*args, **named)
        except RuntimeError as error:
            own = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent.name == "sdpo_nb"]
            place = f"{Path(own[-1].filename).name}:{own[-1].lineno} `{own[-1].line}`" if own else "outside sdpo_nb"
            found[f"{first_line(error)}, at {place}"] += 1
            raise
        finally:
            for warning in said:
                if "synchronizing" in str(warning.message):
                    found[f"{Path(warning.filename).name}:{warning.lineno}"] += 1

    return run


def sampling_under(trainer, mode) -> Counter:
    "The steps of the sampler and the network's calls, in all batches of an epoch"
    import sdpo_nb.trainer as loop

    found, plain = Counter(), loop.sample_trajectories
    loop.sample_trajectories = guarded(plain, mode, found)
    try:
        trainer.sample()
    except RuntimeError:
        if not found:
            raise
    finally:
        loop.sample_trajectories = plain
    return found


def update_under(trainer, mode) -> Counter:
    "Loss and gradient of every update but the first, before which the log-ratio is read"
    found, rollout = Counter(), first_half(trainer, 0)
    for number, minibatch in enumerate(updates(trainer, rollout)):
        for part in minibatch.split(trainer.micro_batch):
            learn = lambda: trainer.accelerator.backward(part.share * trainer.loss(rollout, part))
            try:
                (guarded(learn, mode, found) if number else learn)()
            except RuntimeError:
                if not found:
                    raise
                return found
        trainer.norms.append(trainer.optimizer_step())
    return found


def sync_part(given):
    "Once as an error, which stops at the first, and once as a count by line"
    if torch.device(given.device).type != "cuda":
        yield dict(row="sampling and updates", not_measured="only on a GPU")
        return
    policy = random_policy("sd_turbo", "bf16", given)
    for name, under in {"sampling": sampling_under, "updates": update_under}.items():
        with tempfile.TemporaryDirectory() as folder:
            config = settings(folder, "bf16", 8, micro_batch=4, pairs_per_update=4)
            under(trainer_of(policy, config), "default")  # what happens only once does not count
            stopped, counted = (under(trainer_of(policy, config), mode) for mode in ("error", "warn"))
        lines = dict(counted.most_common(12))
        yield dict(
            row=name, waits=len(stopped) > 0, first=next(iter(stopped), None), times=counted.total(), lines=lines
        )


# --- parts, limits, goals ------------------------------------------------------------------------

parts = {  # name -> what it does, and its seconds at most on an H200-class GPU
    "machine": (machine_part, 20),
    "reference": (reference_part, 45),
    "sd_turbo": (model_part("sd_turbo"), 70),
    "resume": (resume_part, 20),
    "sdxl_turbo": (model_part("sdxl_turbo", 16), 45),
    "flow": (model_part("sd35_turbo", 4), 50),
    "sync": (sync_part, 20),
    "embedded": (embedded_part, 15),
    "recipes": (recipes_part, 40),
    "kernels": (kernels_part, 20),
    "network": (network_part, 60),
    "decoder": (decoder_part, 45),
    "options": (options_part, 60),
    "demo": (demo_part, 35),
    "sana": (model_part("sana_sprint", 16), 25),
    "worker": (worker_part, 30),
}  # together not more than ten minutes


def first_line(error) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def perform(name, given, pipe):
    "The body of a part's process: rows go into the pipe as they are found"
    torch.manual_seed(0)
    if given.device == "cpu":
        torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        pipe.send(describe(given.device))
        for row in parts[name][0](given):
            pipe.send(row)
    except NotMeasured as problem:
        pipe.send(dict(row=name, not_measured=str(problem)))
    except BaseException as error:  # a part that fails is a row, too
        traceback.print_exc()
        pipe.send(dict(row=name, not_measured=f"it failed: {first_line(error)}"))
    pipe.close()


def show(name, row):
    "A line of the table"
    if "not_measured" in row:
        return print(f"{name:<11} {row['row']:<34} not measured: {row['not_measured']}", flush=True)
    flat = {**row, **row.get("shares", {})}
    numbers = {key: value for key, value in flat.items() if key != "row" and not isinstance(value, dict)}
    written = [f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in numbers.items()]
    print(f"{name:<11} {row['row']:<34} {'  '.join(written)}", flush=True)


def rows_of(receiver, process, limit):
    "What a part finds, as it finds it; at the limit its process ends"
    ends = time.perf_counter() + limit
    try:
        while receiver.poll(max(0, ends - time.perf_counter())):
            yield receiver.recv()
        process.kill()
        yield dict(row="the rest", not_measured=f"out of its {limit:.0f} seconds")
    except EOFError:
        process.join()
        if process.exitcode:
            yield dict(row="the rest", not_measured=f"its process ended with {process.exitcode}")


@cache
def processes(device):
    "How the processes of the parts are started: none imports everything anew, and none inherits a GPU that is in use"
    if not hasattr(os, "fork"):
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("fork")
    probe = context.Process(target=lambda: os._exit(device != "cpu" and torch.cuda._is_in_bad_fork()))
    probe.start()
    probe.join()
    if probe.exitcode == 0:
        return context
    # a server that has imported everything and never looked for a GPU; it finds this module by the environment
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([Path(__file__).stem])
    return context


def execute(name, given, limit) -> dict:
    "Run a part in a process of its own, for `limit` seconds at most; what it found before is kept"
    started, rows, machine = time.perf_counter(), [], None
    context = processes(given.device)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=perform, args=(name, given, sender))
    process.start()
    sender.close()
    for row in rows_of(receiver, process, limit):
        if "row" not in row:
            machine = row
            continue
        rows.append(row)
        show(name, row)
    process.join()
    return dict(seconds=time.perf_counter() - started, limit=limit, machine=machine, rows=rows)


@dataclass(frozen=True)
class Goal:
    "What an H200-class GPU should reach, and how it is read from the rows"

    what: str
    wanted: float
    read: Callable  # rows by part -> a number, or None
    at_least: bool = True


def best(part, name, least=False, **where) -> Callable:
    "Reads the best number of a column among a part's measured rows"

    def read(found):
        rows = [row for row in found.get(part, []) if all(row.get(key) == value for key, value in where.items())]
        numbers = [row[name] for row in rows if row.get(name) is not None]
        return (min if least else max)(numbers) if numbers else None

    return read


def total_waits(found):
    "While sampling and in updates"
    times = [row["times"] for row in found.get("sync", []) if "times" in row]
    return sum(times) if times else None


def overhead(found):
    "Share of everything else at the size that trains fastest"
    rows = [row for row in found.get("sd_turbo", []) if row.get("precision") == "bf16" and "shares" in row]
    return max(rows, key=lambda row: row["training_steps_per_second"])["shares"]["everything else"] if rows else None


goals = [
    Goal(
        "SD-Turbo, sampling: share of the bf16 matrix rate", 0.5, best("sd_turbo", "sampling_of_peak", precision="bf16")
    ),
    Goal(
        "SD-Turbo, training: share of the bf16 matrix rate", 0.4, best("sd_turbo", "training_of_peak", precision="bf16")
    ),
    Goal("neither network, decoder nor reward: share of an epoch", 0.05, overhead, at_least=False),
    Goal("times as fast as the reference's schedule", 4.0, best("reference", "ratio", row="reference, 1 a pass")),
    Goal(
        "SD-Turbo, LoRA, 1 pair a pass, bf16: gigabytes",
        8.0,
        best("sd_turbo", "peak_gb", precision="bf16", micro_batch=1),
        at_least=False,
    ),
    Goal("the host waits inside the loops (times)", 0, total_waits, at_least=False),
    Goal(
        "deterministic: a resumed run's weights differ by",
        0,
        best("resume", "largest_difference", row="stopped and resumed, deterministic"),
        False,
    ),
]


def judged(results, given) -> list:
    "Goals beside what was measured; nothing is measured by a rehearsal"
    rows = {} if given.device == "cpu" or given.small else {name: part["rows"] for name, part in results.items()}
    found = []
    for goal in goals:
        value = goal.read(rows)
        met = None if value is None else bool(value >= goal.wanted if goal.at_least else value <= goal.wanted)
        found.append(dict(goal=goal.what, wanted=goal.wanted, at_least=goal.at_least, measured=value, met=met))
    return found


def describe(device) -> dict:
    "The machine, as the process of a part sees it"
    found = machine(SimpleNamespace(device=torch.device(device)))
    if device != "cpu":
        found |= dict(
            memory_gb=torch.cuda.get_device_properties(torch.device(device)).total_memory / 1e9, cuda=torch.version.cuda
        )
    return found


def arguments(words=None):
    "What the command line says"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=None, help="cuda or cpu; without it the GPU, or a small run on the CPU")
    parser.add_argument("--small", action="store_true", help="narrow models and few sizes: a rehearsal")
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=list(parts), help="only these")
    parser.add_argument("--skip", nargs="*", default=[], choices=list(parts))
    parser.add_argument("--micro_batch", type=int, nargs="+", default=[1, 4, 16, 32], help="pairs in a pass, in bf16")
    parser.add_argument("--options", nargs="+", default=list(options.options), choices=list(options.options))
    parser.add_argument("--limit", type=float, default=None, help="seconds in all: 600 times the slack")
    parser.add_argument("--slack", type=float, default=None, help="times the parts' limits: 1, or 4 of a rehearsal")
    parser.add_argument("--output", type=Path, default=None, help="a JSON file; without it in benchmarks/results")
    given = parser.parse_args(words)
    if given.device is None:
        given.device = "cuda" if torch.cuda.is_available() else "cpu"
        given.small |= given.device == "cpu"
    given.slack = given.slack or (4.0 if given.small else 1.0)  # a rehearsal shares its processor
    given.limit = given.limit or 600.0 * given.slack
    given.output = given.output or here / "results" / f"gpu_check{'_rehearsal' * given.small}.json"
    if given.device == "cpu" and not given.small:
        parser.error("--device cpu would take hours at full size; add --small.")
    if given.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device is {given.device!r}, but torch sees no GPU here; use --device cpu --small.")
    try:
        given.before = earlier(given)
    except ValueError as problem:
        parser.error(str(problem))
    return given


def earlier(given) -> dict:
    "Parts that an earlier call has measured, by name. Raises ValueError for a file of something else"
    if not given.output.exists():
        return {}
    known = read_json(given.output) if given.output.is_file() else None
    if not isinstance(known, dict) or not isinstance(known.get("parts"), dict):
        raise ValueError(f"--output is {str(given.output)!r}, which no GPU check has written; name another file.")
    if (str(known.get("device"))[:4], known.get("small")) != (given.device[:4], given.small):
        raise ValueError(f"--output is {str(given.output)!r}, which holds rows of another device; name another file.")
    return {name: part for name, part in known["parts"].items() if part.get("machine")}


def merged(part, before):
    "Rows that were measured before on this machine stay, unless they are measured again"
    if before is None or "machine" not in part:
        return before or part
    if before["machine"] != part["machine"]:
        return part
    rows = {row["row"]: row for row in before["rows"] if "not_measured" not in row}
    again = {row["row"]: row for row in part["rows"] if row["row"] not in rows or "not_measured" not in row}
    return part | dict(rows=[*(rows | again).values()])


def of_one_machine(results, machine) -> dict:
    "Without what an earlier call has measured on another machine"
    strange = [name for name, part in results.items() if machine and part.get("machine", machine) != machine]
    return results | {name: dict(rows=[dict(row=name, not_measured="skipped")]) for name in strange}


def main(words=None):
    given, started = arguments(words), time.perf_counter()
    results, before, told = {}, given.before, dict(device=given.device, small=given.small, versions=versions())
    for name, (_, limit) in parts.items():
        left = given.limit - (time.perf_counter() - started)
        if name not in given.parts or name in given.skip:
            results[name] = dict(rows=[dict(row=name, not_measured="skipped")])
        elif left < 5:
            results[name] = dict(rows=[dict(row=name, not_measured=f"out of the {given.limit:.0f} seconds in all")])
        else:
            results[name] = execute(name, given, min(limit * given.slack, left))
            told["machine"] = results[name]["machine"] or told.get("machine")
        results[name] = merged(results[name], before.get(name))
        found = of_one_machine(results, told.get("machine"))
        told |= dict(seconds=time.perf_counter() - started, parts=found, goals=judged(found, given))
        write_json(given.output, told)
    print(f"\n{'goal on an H200-class GPU':<58}{'wanted':>10}{'measured':>16}")
    for goal in read_json(given.output)["goals"]:
        sign, value = "≥" if goal["at_least"] else "≤", goal["measured"]
        measured = "not measured" if value is None else f"{value:.3g} {'✓' if goal['met'] else '✗'}"
        print(f"{goal['goal']:<58}{sign + format(goal['wanted'], 'g'):>10}{measured:>16}")
    print(f"{told['seconds']:.0f} seconds; all numbers are in {given.output}")


if __name__ == "__main__":
    main()
