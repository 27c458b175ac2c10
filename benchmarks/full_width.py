"""One epoch of a full-size model, as small as can be: does it run, in how much memory, and was the estimate right?

    python benchmarks/full_width.py FOLDER       # SD-Turbo: micro-batches of 1 pair, with and without checkpointing
    python benchmarks/full_width.py FOLDER --kinds sd_turbo lcm --micro_batch 1 4 --recipes sdpo_reference spo lasro
    python benchmarks/full_width.py FOLDER --width 32 --image_size 64 --output small.jsonl   # a rehearsal in seconds

The models have the real classes and shapes and random weights; FOLDER is where they are written (5 GB for SD-Turbo,
14 GB for SDXL-Turbo) and found again. Each row is a process of its own, with one update's worth of pairs and two
sampling steps, which is enough for the peak: that of the GPU, or without one the largest main memory of the process
less what it had before the model was loaded. `estimated` is what `--dry_run` would say. On a CPU attention and
convolution work with other buffers than on a GPU, so the difference is a check of the estimate, not a measurement
of a GPU. One JSON line a row is added to `--output`.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path

import torch
from random_models import full_width, kinds

from sdpo_nb.cli import method_settings, method_trainer
from sdpo_nb.config import resolve
from sdpo_nb.files import append_jsonl, versions
from sdpo_nb.models import load_policy, precisions
from sdpo_nb.plan import memory_estimate

hub_ids = {
    "sd_turbo": "stabilityai/sd-turbo",
    "sdxl_turbo": "stabilityai/sdxl-turbo",
    "lcm": "SimianLuo/LCM_Dreamshaper_v7",
}
own = {
    "spo": dict(preference_model="reward", preference_threshold=1e-9),
    "lasro": dict(pretrain_prompts=1, pretrain_steps=1, surrogate_steps=1, generator_steps=1),
}  # settings of methods with their own


def peak_memory() -> float:
    "Gigabytes so far: of the GPU, or of this process"
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def settings_of(folder, recipe, precision, micro_batch, checkpointing, output):
    "One update's worth of pairs and two sampling steps; what a method does not obey is left out"
    kind = method_settings(recipe)
    settings = dict(
        policy=str(folder),
        recipe=recipe,
        reward="jpeg_compressibility",
        prompts="animals",
        num_steps=2,
        pairs_per_epoch=micro_batch,
        pairs_per_update=micro_batch,
        micro_batch=micro_batch,
        precision=precision,
        gradient_checkpointing=checkpointing,
        buffer_size=2 * micro_batch,
        min_count=1,
        generator_batch=2 * micro_batch,
        output_dir=f"{output}/run",
        **own.get(recipe, {}),
    )
    known = {f.name for f in fields(kind)}
    return resolve(kind(**{name: value for name, value in settings.items() if name in known}))


def epoch(kind, folder, recipe, precision, micro_batch, checkpointing) -> dict:
    "In a fresh process: load, sample, score, update"
    before = peak_memory()
    policy = load_policy(folder, precision=precision)
    loaded = peak_memory()
    with tempfile.TemporaryDirectory() as output:
        config = settings_of(folder, recipe, precision, micro_batch, checkpointing, output)
        trainer = method_trainer(recipe)(policy, config.reward, config.prompts, config, callbacks=[])
        metrics = trainer.train_epoch()
    estimate = None
    if policy.denoiser.config.block_out_channels[0] == full_width:
        estimate = memory_estimate(replace(config, policy=hub_ids[kind])).get("in all, estimated")
    return dict(
        gb=peak_memory() - before,
        gb_loading=loaded - before,
        gb_before=before,
        gb_estimated=estimate,
        seconds={
            name.removeprefix("seconds/"): value for name, value in metrics.items() if name.startswith("seconds/")
        },
        log_ratio_before_update=metrics.get("log_ratio/max_before_update"),
        loss=metrics["loss"],
        skipped=metrics["skipped_updates"],
    )


def row(given, kind, **what) -> dict:
    "By a process of its own, so that its peak is its own"
    folder = given.folder / f"{kind}_{given.width}_{given.image_size}"
    call = f"from random_models import make; make({kind!r}, {str(folder)!r}, {given.width}, {given.image_size})"
    subprocess.run([sys.executable, "-c", call], check=True, cwd=Path(__file__).parent)
    measured = f"epoch({kind!r}, {str(folder)!r}, **{what!r})"
    call = f"import json, sys; from full_width import epoch; json.dump({measured}, open(sys.argv[1], 'w'))"
    with tempfile.TemporaryDirectory() as output:
        done = subprocess.run([sys.executable, "-c", call, f"{output}/row.json"], cwd=Path(__file__).parent)
        if done.returncode:
            return dict(failed=done.returncode)  # out of memory, for one
        return json.loads(Path(output, "row.json").read_text())


def show(*columns):
    "A line of the table"
    widths = ("<12", "<16", "<10", ">6", ">15", ">7", ">11")
    print("".join(f"{value:{width}}" for value, width in zip(columns, widths)) + f"   {columns[-1]}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="+", default=["sd_turbo"], choices=list(kinds))
    parser.add_argument("--recipes", nargs="+", default=["sdpo_reference"])
    parser.add_argument("--precision", nargs="+", default=["bf16"], choices=precisions)
    parser.add_argument("--micro_batch", type=int, nargs="+", default=[1])
    parser.add_argument("--checkpointing", nargs="+", default=["no", "yes"], choices=["no", "yes"])
    parser.add_argument("--width", type=int, default=full_width)
    parser.add_argument("--image_size", type=int, default=512)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "full_width.jsonl")
    given = parser.parse_args()
    given.folder = given.folder.absolute()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    machine = dict(device=device, cores=os.cpu_count(), threads=torch.get_num_threads())
    show("model", "recipe", "precision", "pairs", "checkpointing", "GB", "estimated", "seconds")
    for kind, recipe, precision, micro_batch, checkpointing in itertools.product(
        given.kinds, given.recipes, given.precision, given.micro_batch, given.checkpointing
    ):
        what = dict(recipe=recipe, precision=precision, micro_batch=micro_batch, checkpointing=checkpointing == "yes")
        found = row(given, kind, **what)
        numbers = [f"{found[name]:.1f}" if found.get(name) is not None else "?" for name in ("gb", "gb_estimated")]
        show(kind, recipe, precision, micro_batch, checkpointing, *numbers, found.get("seconds", found))
        model = dict(kind=kind, width=given.width, image_size=given.image_size)
        append_jsonl(given.output, {**model, **what, **found, "machine": machine, "versions": versions()})


if __name__ == "__main__":
    main()
