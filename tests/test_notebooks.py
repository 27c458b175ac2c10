"""Every notebook runs from top to bottom, each in a process of its own."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.test import nb_test_cells

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = get_config(ROOT).tst_flags.split()
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
RUN = """
import sys
from nbdev.test import test_nb
notebook, root, skipped, forced = sys.argv[1:]
passed, seconds = test_nb(notebook, skip_flags=skipped.split(), force_flags=forced.split(), basepath=root)
sys.exit(not passed)
"""


def run_notebook(path, forced=""):
    "Run the notebook at `path`, with the cells flagged `forced` too; its error output where it fails"
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path), str(ROOT), " ".join(SKIPPED), forced], capture_output=True, text=True
    )
    return (done.stderr or done.stdout or f"exit status {done.returncode}") if done.returncode else None


def has_slow_cells(path):
    "Are there cells in the notebook at `path` that only a slow run executes?"
    return len(nb_test_cells(path, SKIPPED, ["slow"])) > len(nb_test_cells(path, SKIPPED))


@pytest.fixture(scope="module")
def runs(request):
    "The selected notebooks, started at once, as many side by side as there are cores"
    selected = [
        item.callspec.params["path"]
        for item in request.session.items
        if getattr(item, "originalname", "") == "test_notebook"
    ]
    pool = ThreadPoolExecutor(os.cpu_count())
    yield {path: pool.submit(run_notebook, path) for path in selected}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook(path, runs):
    error = runs[path].result()
    assert error is None, error


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if has_slow_cells(path)], ids=lambda path: path.name)
def test_notebook_with_slow_cells(path):
    error = run_notebook(path, forced="slow")
    assert error is None, error
