"""Threads and plotting are settled here, before anything imports torch or matplotlib."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the notebooks run side by side, one to a core
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFTOVERS = (
    ".git",
    ".venv",
    "venv",
    "build",
    "dist",
    "runs",
    "*.egg-info",
    "__pycache__",
    ".ipynb_checkpoints",
    ".pytest_cache",
    "_proc",
    "_docs",
)


def copy_checkout(to):
    "A copy of the checkout in the folder `to`, to build and export in: the checkout itself stays as it is"
    return Path(shutil.copytree(ROOT, to, symlinks=True, ignore=shutil.ignore_patterns(*LEFTOVERS)))


@pytest.fixture
def tree(tmp_path):
    "A copy of the checkout"
    return copy_checkout(tmp_path / "tree")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    "A folder with a random pipeline"
    from random_pipelines import random_stable_diffusion

    folder = tmp_path_factory.mktemp("pipeline") / "random"
    random_stable_diffusion(folder, prediction_type="v_prediction")
    return folder


# accelerate lets processes share weights on GPUs alone; torch can on CPUs, too
SHARING = """from accelerate import PartialState
from accelerate.utils import DistributedType
PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
"""


@pytest.fixture
def two_processes(tmp_path):
    "Two CPU processes run lines of code that make a `trainer`, and then what is asked for; what each of them comes to, by default the LoRA of a whole training"

    def launch(code, result="(trainer.train(), trainer.policy.lora_state())[1]", sharing=False):
        import torch

        program = tmp_path / "two.py"
        program.write_text(
            f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
            + SHARING * sharing
            + textwrap.dedent(code)
            + textwrap.dedent(f"""
            assert trainer.accelerator.num_processes == 2 and [parameter.numel() for parameter in trainer.parameters[:9]] == [{1 + sharing}*full.to_local().numel() if {sharing} else full.numel() for full in trainer.parameters[:9]]
            torch.save({result}, {str(tmp_path)!r} + f'/result{{trainer.accelerator.process_index}}.pt')""")
        )
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
        shared = (
            dict(
                ACCELERATE_USE_FSDP="true",
                FSDP_VERSION="2",
                FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
                FSDP_CPU_RAM_EFFICIENT_LOADING="true",
            )
            if sharing
            else {}
        )
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, **shared, "ACCELERATE_USE_CPU": "true"},
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return [torch.load(tmp_path / f"result{index}.pt") for index in range(2)]

    return launch
