"""Nothing in the inner loops makes a GPU's host wait, shown without a GPU; and starting imports no more than it needs.

Tensors on torch's `meta` device stand for those on a GPU: they have a shape and no numbers. Whatever would read a
number there, copy from one device to the other, or index with what lies on the CPU, is found by looking at every
operation.
"""

import subprocess
import sys
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from small_runs import small_trainer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sdpo_nb.trainer
import sdpo_nb.tree
from sdpo_nb.batching import placed
from sdpo_nb.branch import BranchTrainer
from sdpo_nb.spo import SPOTrainer

READING = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "_unique2", "unique_dim", "masked_select", "equal"}


class Waits(TorchDispatchMode):
    "Notes every operation for which the host would have to wait, or that copies something to the GPU or from it"

    def __init__(self):
        super().__init__()
        self.found, self.constants = [], Constants()
        self.constants.found = self.found

    def __enter__(self):
        self.constants.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.constants.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, tensors = function._schema.name.removeprefix("aten::"), tree_leaves((args, kwargs))
        if name in READING and any(x.device.type == "meta" for x in tensors if isinstance(x, torch.Tensor)):
            self.found.append(name)
        self.look(name, tensors)  # before it is done: some operations raise for tensors of two devices
        result = function(*args, **(kwargs or {}))
        self.look(name, [*tensors, *tree_leaves(result)])
        return result

    def look(self, name, values):
        "Are there tensors of more than one device? A number alone goes with the kernel, unless it is copied"
        tensors = [x for x in values if isinstance(x, torch.Tensor)]
        if len({x.device.type for x in tensors if x.ndim or "copy" in name}) > 1:
            self.found.append(f"{name}: {[(x.device.type, tuple(x.shape)) for x in tensors]}")


class Constants(TorchFunctionMode):
    "Notes Python's numbers that are copied to the GPU"

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)
        index = args[1] if function is torch.Tensor.__getitem__ else ()
        listed = any(isinstance(part, (list, range)) for part in (index if isinstance(index, tuple) else (index,)))
        if (made or listed) and result.device.type == "meta":
            self.found.append(f"{function.__name__}: {args}")
        return result


def on_gpu(trainer):
    "All that stays on the GPU of a run is put on `meta`"
    trainer.policy.embed([*trainer.prompts, ""])
    known = trainer.policy._embedded_prompts
    known.update({prompt: embedding._map(lambda x: x.to("meta")) for prompt, embedding in known.items()})
    trainer.policy.denoiser.to("meta")
    for steps, plan in trainer.step_plans.items():
        tables = {name: getattr(plan, name).to("meta") for name in ("sampler", "scales", "weights", "widths")}
        trainer.step_plans[steps] = replace(plan, **tables)
    trainer.begin_epoch()
    return trainer


@pytest.fixture
def waits(monkeypatch):
    "The operations of the sampling steps and of the micro-batches that make the host wait"
    mode = Waits()

    def watched(function):
        def run(*given, **options):
            with mode:
                return function(*given, **options)

        return run

    for room, name in ((sdpo_nb.trainer, "sample_trajectories"), (sdpo_nb.tree, "sample_tree")):
        monkeypatch.setattr(room, name, watched(getattr(room, name)))
    return mode


def test_what_waits_is_noticed():
    on_meta, mode = torch.zeros(4, device="meta"), Waits()
    for wrong in (
        lambda: on_meta[torch.tensor([0, 1])],
        lambda: torch.zeros(4).to("meta"),
        lambda: torch.tensor([1.0], device="meta"),
        lambda: on_meta[[0, 1]],
        lambda: on_meta.nonzero(),
        lambda: on_meta.index_fill(0, torch.tensor([1]), 0.0),
    ):
        mode.found.clear()
        with mode, suppress(RuntimeError):  # what has no numbers cannot be read; it was noticed before that
            wrong()
        assert mode.found
    mode.found.clear()
    with mode:
        (
            torch.where(on_meta > 0, on_meta * 2.5, torch.nan).mean()
            + on_meta[0] * on_meta[torch.zeros_like(on_meta).long()]
        )
    assert not mode.found


@pytest.mark.parametrize(
    "settings",
    [
        dict(recipe="sdpo", kl_coefficient=0.1),
        dict(recipe="d3po"),
        dict(recipe="sdpo", guidance_scale=3.0, precision="bf16"),
    ],
    ids=str,
)
def test_the_inner_loops_never_wait(random_folder, tmp_path, waits, settings):
    trainer = on_gpu(small_trainer(random_folder(), tmp_path, **settings))
    rollout = trainer.sample()
    assert rollout.latents.device.type == "meta" and not waits.found
    rollout.advantages = torch.zeros_like(rollout.log_prob)
    one_update(trainer, rollout, waits)


def one_update(trainer, rollout, waits):
    "Loss and gradient in micro-batches, of which none waits"
    rollout.reference_log_prob = torch.zeros_like(rollout.log_prob)
    trainer.norms.append(0.0)  # in the first update of an epoch the log-ratio is looked at
    minibatch = placed(trainer.schedule(rollout), "meta")[0]
    with waits:
        for part in minibatch.split(1):
            loss = trainer.loss(rollout, part)
            trainer.accelerator.backward(trainer.scaler.scale(part.share * loss))
    assert len(trainer.logs) == len(minibatch) > 1 and not waits.found
    assert all(parameter.grad.device.type == "meta" for parameter in trainer.policy.trainable_parameters().values())


@pytest.mark.parametrize(
    "kind, settings",
    [
        (BranchTrainer, dict(recipe="sdpo_branch")),
        (BranchTrainer, dict(recipe="sdpo_branch", candidates=4, continue_from="winner")),
        (SPOTrainer, dict(recipe="spo", segment_steps=2, preference_model="reward")),
    ],
    ids=str,
)
def test_no_step_of_a_tree_waits(random_folder, tmp_path, waits, monkeypatch, kind, settings):
    "Only the scorer may, which decodes; here one answers that has no numbers, as it would from the GPU"
    trainer = small_trainer(random_folder(), tmp_path, kind=kind, num_steps=4, **settings)
    monkeypatch.setattr(kind, "branching", trainer.branching)  # read once an epoch
    trainer = on_gpu(trainer)
    trainer.score_latents = lambda latents, *_, **options: latents.new_zeros(len(latents), dtype=torch.float32)
    rollout = trainer.sample()
    assert rollout.actions.device.type == rollout.dense.device.type == "meta" and not waits.found
    rollout.valid = torch.ones(rollout.log_prob.shape[1:], dtype=torch.bool)  # SPO has looked at the scores
    with waits:
        sides = trainer.keep_extremes(rollout)
    rollout.advantages = torch.zeros_like(rollout.log_prob)
    assert sides.device.type == "meta" and len(rollout.actions) == 2
    one_update(trainer, rollout, waits)


@pytest.mark.parametrize("unneeded", ["transformers", "peft"])
def test_starting_imports_no_model_library(unneeded):
    "They take longer to import than all of torch, and are imported when a model is loaded"
    code = f"import sys, sdpo_nb.trainer; sys.exit({unneeded!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
