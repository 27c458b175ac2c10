"""What the process of a notebook does; kept apart, so that the process imports little."""

import os
import re
import sys

FOLDED = "<details><summary>Solution</summary>"


def solution_code(cell):
    "The code in a folded solution, the Markdown cell of an exercise; empty where the cell is none"
    source = "".join(cell["source"])
    if cell["cell_type"] != "markdown" or FOLDED not in source:
        return ""
    return "\n".join(re.findall(r"```python\n(.*?)```", source.partition(FOLDED)[2], flags=re.DOTALL))


def with_solutions(notebook):
    "The notebook with the code of each solution as a cell below it; readers see it folded"
    from fastcore.nbio import mk_cell

    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if code := solution_code(cell):
            cells.append(mk_cell(code))
    notebook.cells = cells
    return notebook


def run_cells(path, skipped, forced, root, output):
    "Run the cells of the notebook at `path`; what it says goes to the file `output`, its success is the exit status"
    from fastcore.nbio import read_nb
    from nbdev import test

    with open(output, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    processor = test.NBProcessor
    test.NBProcessor = lambda fn, **options: processor(fn, nb=with_solutions(read_nb(fn)), **options)
    passed, _ = test.test_nb(path, skip_flags=skipped, force_flags=forced, basepath=root)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(not passed)  # threads and temporary folders that a notebook has left must not hold it up
