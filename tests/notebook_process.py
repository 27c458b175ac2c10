"""What the process of a notebook does; kept apart, so that the process imports little."""

import os
import sys


def run_cells(path, skipped, forced, root, output):
    "Run the cells of the notebook at `path`; what it says goes to the file `output`, its success is the exit status"
    from nbdev.test import test_nb

    with open(output, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    passed, _ = test_nb(path, skip_flags=skipped, force_flags=forced, basepath=root)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(not passed)  # threads and temporary folders that a notebook has left must not hold it up
