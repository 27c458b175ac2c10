"""Every notebook runs from top to bottom, each in a process of its own."""

import tempfile
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.test import nb_test_cells
from notebook_process import run_cells
from processes import PROCESSES

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = get_config(ROOT).tst_flags.split()
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


def run_notebook(path, forced=""):
    "Run the notebook at `path`, with the cells flagged `forced` too; its error output where it fails"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.txt"
        process = PROCESSES.Process(target=run_cells, args=(str(path), SKIPPED, forced.split(), str(ROOT), output))
        process.start()
        process.join()
        said = output.read_text(encoding="utf-8") if output.is_file() else ""
        return (said or f"exit status {process.exitcode}") if process.exitcode else None


def check(error):
    if error is not None:
        pytest.fail(error, pytrace=False)


def has_slow_cells(path):
    "Are there cells in the notebook at `path` that only a slow run executes?"
    return len(nb_test_cells(path, SKIPPED, ["slow"])) > len(nb_test_cells(path, SKIPPED))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook(path):
    check(run_notebook(path))


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if has_slow_cells(path)], ids=lambda path: path.name)
def test_notebook_with_slow_cells(path):
    check(run_notebook(path, forced="slow"))
