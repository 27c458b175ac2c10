"""Everything about one notebook, in a minute or less: format and export it, run it, its tests and those of the style.

python .ci/check.py 17_advantages      # a number, a module or a path will do: 17, advantages, nbs/17_advantages.ipynb
"""

import re
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
programs = Path(sys.executable).parent


def find(words: list) -> Path:
    "The notebook that the only word names, or an exit with one sentence"
    name = Path(words[0]).stem if len(words) == 1 and words[0] else None
    notebooks = sorted((root / "nbs").glob("*.ipynb"))
    found = [path for path in notebooks if name in (path.stem, *path.stem.split("_", 1))]
    if len(found) != 1:
        known = ", ".join(path.stem for path in notebooks)
        sys.exit(f"NB is {' '.join(words)!r}: name one notebook, as in make check NB=17_advantages; there are {known}.")
    return found[0]


def tests_of(notebook: Path) -> list:
    "What pytest is asked for"
    subject = re.sub(r"^\d+_", "", notebook.stem)
    own = root / "tests" / f"test_{subject}.py"
    return [
        f"tests/test_notebooks.py::test_notebook[{notebook.name}]",
        "tests/test_style.py",
        *([f"tests/{own.name}"] if own.is_file() else []),
    ]


def main(words: list):
    notebook = find(words)
    own = tests_of(notebook)
    formatted = [notebook, *(root / test for test in own if re.fullmatch(r"tests/\w+\.py", test))]
    for command in (
        [programs / "ruff", "format", "--quiet", *formatted],
        [programs / "nbdev-export", "--path", notebook],
        [programs / "nbdev-clean", "--fname", notebook],
        [sys.executable, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal", *own],
    ):
        done = subprocess.run(list(map(str, command)), cwd=root)
        if done.returncode:
            sys.exit(done.returncode)


if __name__ == "__main__":
    main(sys.argv[1:])
