"""Threads and plotting are settled here, before anything imports torch or matplotlib."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, one process to a core
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("SDPO_NB_CACHE", "")  # every test evaluates for itself

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # random_models
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


# Where the time goes: first, so that no process is still at one of them when the others have finished.
LONGEST = (
    "60_baselines 90_embedded 51_full_scale 41_spo 43_lasro 26_trainer 18_credit 13_models 50_cli 33_callbacks".split()
)


def pytest_collection_modifyitems(items):
    "The notebooks come first, the longest before the others"

    def place(item):
        path = item.callspec.params.get("path") if getattr(item, "originalname", "") == "test_notebook" else None
        return len(LONGEST) + 1 if path is None else [*LONGEST, path.stem].index(path.stem)

    items.sort(key=place)


# --- made once for all tests; `make test` runs them in several processes, which share these folders


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    "once(name, make): a folder that `make(folder)` fills for the first test that asks for it; only read it"
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "once"
    root.mkdir(exist_ok=True)

    def find(name, make):
        folder, made = root / name, root / f"{name}.made"
        with FileLock(root / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # what an accident has left half-way
                make(folder)
                made.touch()
        return folder

    return find


@pytest.fixture(scope="session")
def random_folder(once):
    """random_folder(kind, **settings): a pipeline with random weights, in the diffusers layout.

    The kind is "stable_diffusion" (tests/random_pipelines.py; settings: prediction_type, seed, the scheduler's), or one
    of benchmarks/random_models.py, 32 wide, for pictures of 32 pixels."""

    def find(kind="stable_diffusion", **settings):
        def make(folder):
            if kind == "stable_diffusion":
                random_pipelines.random_stable_diffusion(folder, **settings)
            else:
                random_models.make(kind, folder, **{"width": 32, "image_size": 32, **settings})

        return once("-".join([kind, *(f"{name}_{value}" for name, value in sorted(settings.items()))]), make)

    import random_models
    import random_pipelines

    return find


@pytest.fixture(scope="session")
def pipeline(random_folder):
    "The folder of a random pipeline that predicts v"
    return random_folder(prediction_type="v_prediction")


@pytest.fixture(scope="session")
def folder(random_folder):
    "The folder of a random pipeline that predicts the noise"
    return random_folder()


@pytest.fixture
def policy(folder):
    "Its policy"
    from sdpo_nb.models import load_policy

    return load_policy(folder, device="cpu")


@pytest.fixture
def predict(policy):
    "predict(): its output at some state, or that of another one"
    import torch

    latents, embedding = torch.randn(3, *policy.latent_shape), policy.embed(["a red circle", "a blue cat", "a dog"])
    return lambda other=None: (other or policy).predict(latents, 999, embedding)


@pytest.fixture(scope="session")
def tiny_folder():
    "The embedded pipeline, in the diffusers layout"
    from sdpo_nb.rewards import assets

    return assets / "tiny"


@pytest.fixture(scope="session")
def finished_run(once, pipeline):
    "The folder of a finished run: two epochs of a random pipeline, with evaluation, LoRA, checkpoints and report"

    def make(folder):
        from sdpo_nb.models import load_policy
        from sdpo_nb.trainer import TrainConfig, Trainer

        sizes = dict(num_steps=3, epochs=2, pairs_per_epoch=2, pairs_per_update=2, micro_batch=1, eval_samples=4)
        settings = dict(policy=str(pipeline), reward="colorfulness", buffer_size=4, min_count=2)
        config = TrainConfig(output_dir=str(folder), **sizes, **settings)
        Trainer(load_policy(pipeline, device="cpu"), config.reward, ["a cat", "a dog"], config).train()

    return once("finished_run", make)


# accelerate lets processes share weights on GPUs alone; torch can on CPUs, too
SHARING = """from accelerate import PartialState
from accelerate.utils import DistributedType
PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
"""


PROGRAM = """import sys
sys.path.insert(0, {tests!r})
{code}
processes, parameters = trainer.accelerator.num_processes, trainer.parameters[:9]
whole = [full.to_local().numel() * processes if {sharing} else full.numel() for full in parameters]
assert processes == 2 and [parameter.numel() for parameter in parameters] == whole
torch.save({result}, f"{folder}/result{{trainer.accelerator.process_index}}.pt")
"""
FSDP = dict(
    ACCELERATE_USE_FSDP="true",
    FSDP_VERSION="2",
    FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
    FSDP_CPU_RAM_EFFICIENT_LOADING="true",
)


@pytest.fixture
def two_processes(tmp_path):
    """Two CPU processes run lines of code that make a `trainer`, and then what is asked for.

    What comes back is what each of them comes to, by default the LoRA of a whole training."""

    def launch(code, result="(trainer.train(), trainer.policy.lora_state())[1]", sharing=False):
        import torch

        code = SHARING * sharing + textwrap.dedent(code)
        program = tmp_path / "two.py"
        program.write_text(
            PROGRAM.format(tests=str(ROOT / "tests"), code=code, sharing=sharing, result=result, folder=tmp_path)
        )
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
        environment = {**os.environ, **(FSDP if sharing else {}), "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return [torch.load(tmp_path / f"result{index}.pt") for index in range(2)]

    return launch
