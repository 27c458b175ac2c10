"""Processes of their own, forked from one that has imported the large packages: a start costs no seconds of imports."""

import multiprocessing
import os
import socket
import time

# the same list as in test_notebooks.py: there is one such server, and the last list that was given counts
LARGE = "nbdev.test matplotlib.pyplot torch peft diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion".split()
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(LARGE)

FSDP = dict(
    ACCELERATE_USE_FSDP="true",
    FSDP_VERSION="2",
    FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
    FSDP_CPU_RAM_EFFICIENT_LOADING="true",
)


def _work(work, args, environment, place):
    "What the process does: call `work`, and write what it says and what it returns to files"
    import torch

    for number, suffix in ((1, ".out"), (2, ".err")):
        with open(place.with_suffix(suffix), "w", encoding="utf-8") as file:
            os.dup2(file.fileno(), number)
    os.environ.update(environment)
    if "ACCELERATE_USE_FSDP" in environment:  # accelerate lets processes share weights on GPUs alone; torch can on CPUs
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    torch.save(work(*args), place.with_suffix(".pt"))


class Child:
    "A process that calls a function of a test's module"

    def __init__(self, work, *args, folder, name="child", **environment):
        self.place = folder / name
        self.process = PROCESSES.Process(target=_work, args=(work, args, environment, self.place))
        self.process.start()
        self.pid = self.process.pid

    def wait(self, seconds=300):
        "The exit status, minus the signal that ended it; None where it has not ended"
        self.process.join(seconds)
        return self.process.exitcode

    def stop(self):
        self.process.kill()
        self.process.join()

    @property
    def said(self):
        "On its error stream"
        return self.place.with_suffix(".err").read_text(encoding="utf-8")

    @property
    def result(self):
        import torch

        return torch.load(self.place.with_suffix(".pt"))


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def two_processes(work, *args, folder, sharing=False, seconds=300):
    "What `work(*args)` returns in each of two CPU processes that train together, and share the weights if `sharing`"
    together = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()), ACCELERATE_USE_CPU="true")
    together |= FSDP if sharing else {}
    ranks = [dict(RANK=str(index), LOCAL_RANK=str(index)) for index in range(2)]
    children = [Child(work, *args, folder=folder, name=f"process{rank['RANK']}", **together, **rank) for rank in ranks]
    end = time.monotonic() + seconds
    while any(child.wait(0.05) is None for child in children) and time.monotonic() < end:
        if any(child.wait(0) for child in children):
            break  # the other one would wait for it
    failed = [child for child in children if child.wait(0) != 0]
    for child in children:
        child.stop()
    assert not failed, failed[0].said[-3000:]
    return [child.result for child in children]
