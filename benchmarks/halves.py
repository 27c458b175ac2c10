"""The two halves of the trainer's epoch, one at a time, for scripts that measure them; and the machine, in words."""

import os
import platform

import torch


def first_half(trainer, epoch: int):  # a `Rollout`
    "Sample, score and credit the trajectories of this epoch"
    trainer.counts["epoch"] = epoch  # it names the randomness
    rollout = trainer.sample()
    trainer.score(rollout)
    trainer.credit(rollout)
    trainer.counts["reward_queries"] += rollout.queries
    return rollout


def updates(trainer, rollout):  # yields a `Minibatch` for each optimiser step
    "As `Trainer.minibatches`, for an epoch that begins here"
    trainer.begin_epoch()
    return trainer.minibatches(rollout)


def backward(trainer, rollout, minibatch):
    "The gradient of an update, in micro-batches"
    for part in minibatch.split(trainer.micro_batch):
        trainer.accelerator.backward(trainer.scaler.scale(part.share * trainer.loss(rollout, part)))


def second_half(trainer, rollout):
    "All updates of an epoch"
    for minibatch in updates(trainer, rollout):
        backward(trainer, rollout, minibatch)
        trainer.norms.append(trainer.optimizer_step())


def take_gradient(trainer) -> torch.Tensor:
    "All of it in a row, and away"
    gradient = torch.cat([parameter.grad.flatten().clone() for parameter in trainer.parameters])
    trainer.optimizer.zero_grad()
    return gradient


def machine(policy) -> dict:
    "On what a policy runs here"
    device = torch.cuda.get_device_name() if policy.device.type == "cuda" else platform.machine()
    cores, threads = os.cpu_count(), torch.get_num_threads()
    return {"device": device, "system": platform.system(), "cores": cores, "threads": threads}
