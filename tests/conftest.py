"""Threads and plotting are settled here, before anything imports torch or matplotlib."""
import os
import shutil
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')   # the notebooks run side by side, one to a core
os.environ.setdefault('MPLBACKEND', 'Agg')

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFTOVERS = ('.git', '.venv', 'venv', 'build', 'dist', 'runs', '*.egg-info', '__pycache__', '.ipynb_checkpoints', '.pytest_cache', '_proc', '_docs')


def copy_checkout(to):
    "A copy of the checkout in the folder `to`, to build and export in: the checkout itself stays as it is"
    return Path(shutil.copytree(ROOT, to, symlinks=True, ignore=shutil.ignore_patterns(*LEFTOVERS)))


@pytest.fixture
def tree(tmp_path):
    "A copy of the checkout"
    return copy_checkout(tmp_path/'tree')
