"""Runs that take a fraction of a second, of a random pipeline, and what an accident does to them."""

from contextlib import suppress
from pathlib import Path

import torch

from sdpo_nb.models import load_policy
from sdpo_nb.trainer import Trainer

PROMPTS = ["a red circle", "a cat"]
SMALL = dict(num_steps=3, epochs=1, pairs_per_epoch=4, pairs_per_update=2, micro_batch=2, eval_samples=0)
SMALL |= dict(buffer_size=8, min_count=4)


def redness(images, prompts):
    return (images[:, 0] - images[:, 2]).mean((1, 2))


def noisy_redness(images, prompts):
    "A reward that draws from torch's global generator, whose state a resumed run has to find again"
    return redness(images, prompts) + 0.01 * torch.rand(len(images))


def small_trainer(
    pipeline, root, *, reward=redness, callbacks=(), prompts=PROMPTS, policy=None, kind=Trainer, **settings
):
    "A trainer of a small run in the folder `run` below `root`, or as the settings say"
    policy = policy or load_policy(pipeline, device="cpu", precision=settings.get("precision", "fp32"))
    small = {name: value for name, value in SMALL.items() if name in kind.settings.__dataclass_fields__}
    config = kind.settings(**{**small, "output_dir": str(Path(root) / "run"), **settings})
    return kind(policy, reward, prompts, config, list(callbacks))


def rolled(trainer, epoch=0):
    "The rollout of an epoch, scored and credited; nothing is learnt from it yet"
    trainer.counts["epoch"] = epoch
    trainer.begin_epoch()
    rollout = trainer.sample()
    trainer.score(rollout)
    trainer.credit(rollout)
    return rollout


def learn(trainer, rollout):
    "The second half of an epoch, as the loop does it: the log of what was learnt from this rollout"
    given = dict(sample=lambda: rollout, score=lambda _: None, credit=lambda _: None)
    vars(trainer).update(given)
    try:
        return trainer.train_epoch()
    finally:
        for name in given:
            delattr(trainer, name)


class Enough(Exception):
    "The rest of an epoch does not matter"


def first_gradient(trainer, rollout):
    "The gradient of the first update of an epoch, as the loop has it ready for the optimiser"
    found = []

    def optimizer_step():
        found.append(torch.cat([parameter.grad.flatten() for parameter in trainer.parameters]))
        trainer.optimizer.zero_grad()
        raise Enough

    trainer.optimizer_step = optimizer_step
    with suppress(Enough):
        learn(trainer, rollout)
    del trainer.optimizer_step
    return found[0]


def perturb(trainer, size=0.1):
    "Make a policy that has learnt: neither its LoRA nor its log-ratios are zero, and the latter are not repaired"
    generator = torch.Generator().manual_seed(1)
    for parameter in trainer.parameters:
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    trainer.check_log_ratio = lambda *_: None
