"""The properties of the house, as CONTRIBUTING.md lists them; each test names its offenders."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "sdpo_nb"
COLUMNS, CELL, FUNCTION, MODULE = 120, 25, 40, 450  # at most so long, so many lines
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = [path for path in sorted((ROOT / PACKAGE).glob("*.py")) if path.name[0] != "_"]
SCRIPTS = [path for folder in ("tests", "benchmarks", ".ci") for path in sorted((ROOT / folder).glob("*.py"))]

# Public names that nothing here uses outside their own notebook, and why they are public all the same.
FOR_USERS = {
    "embedded.coded": "which attributes are written into the noise of the embedded model",
}


class Cell(NamedTuple):
    "A cell of a notebook"

    kind: str
    identity: str
    source: str

    @property
    def exported(self):
        return self.kind == "code" and bool(re.search(r"^#\|\s*exports?i?\b", self.source, flags=re.MULTILINE))

    @property
    def tree(self):
        "Its statements; lines for the shell or for IPython are left out"
        lines = self.source.splitlines()
        return ast.parse("\n".join("pass" if re.match(r"\s*[!%]", line) else line for line in lines))

    @property
    def defined(self):
        "The functions and classes of its top level"
        return [node for node in self.tree.body if isinstance(node, DEFINITIONS)]

    @property
    def teaches(self):
        "Does a reader see something happen here? Not in hidden cells, in imports or in references alone"
        if self.kind != "code" or self.exported or re.search(r"^#\|\s*hide\s*$", self.source, flags=re.MULTILINE):
            return False
        return any(
            not isinstance(node, (ast.Import, ast.ImportFrom, ast.Pass)) and "show_doc(" not in ast.unparse(node)
            for node in self.tree.body
        )


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)


@cache
def cells(path):
    "The cells of the notebook at `path`"
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [Cell(cell["cell_type"], cell["id"], "".join(cell["source"])) for cell in found]


@cache
def parsed(path):
    "The syntax tree of the module or script at `path`"
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def module_of(path):
    "The module that the notebook at `path` exports, if any"
    found = re.findall(r"^#\|\s*default_exp (\w+)", "\n".join(cell.source for cell in cells(path)), flags=re.MULTILINE)
    return found[0] if found else None


def homes():
    "The notebook of each module"
    return {module_of(path): path for path in NOTEBOOKS if module_of(path)}


def no(offenders):
    "Fail with the offenders, one to a line"
    offenders = list(offenders)
    if offenders:
        pytest.fail("\n".join([f"{len(offenders)} found:", *offenders]), pytrace=False)


# --- sizes


def long_lines():
    "Lines of more than 120 columns; the first of a module, with the notebook's subtitle and `__all__`, are nbdev's"
    for path in NOTEBOOKS:
        for cell in cells(path):
            if cell.kind == "code":
                yield from (f"{path.name} {cell.identity}: {line}" for line in too_long(cell.source))
    for path in MODULES:
        written = path.read_text(encoding="utf-8").partition("# %% auto #0\n")[2].partition("\n# %% ")[2]
        yield from (f"{path.name}: {line}" for line in too_long(written))
    for path in SCRIPTS:
        yield from (f"{path.relative_to(ROOT)}: {line}" for line in too_long(path.read_text(encoding="utf-8")))


def too_long(text):
    return (f"{len(line)} columns: {line.strip()[:60]}…" for line in text.splitlines() if len(line) > COLUMNS)


def long_cells():
    "Exported cells of more than 25 lines that do not define a class"
    for path in NOTEBOOKS:
        for cell in filter(lambda cell: cell.exported, cells(path)):
            lines = [line for line in cell.source.splitlines() if not line.startswith("#|")]
            if len(lines) > CELL and not any(isinstance(node, ast.ClassDef) for node in cell.defined):
                yield f"{path.name} {cell.identity}: {len(lines)} lines: {names(cell)}"


def names(cell):
    return ", ".join(node.name for node in cell.defined) or "no definition"


def long_functions():
    for path in [*MODULES, *SCRIPTS]:
        for node in ast.walk(parsed(path)):
            if isinstance(node, FUNCTIONS) and (lines := node.end_lineno - node.lineno + 1) > FUNCTION:
                yield f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"


def long_modules():
    for path in MODULES:
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MODULE:
            yield f"{PACKAGE}/{path.name}: {lines} lines"


def test_no_line_is_too_long():
    no(long_lines())


def test_exported_cells_are_short():
    no(long_cells())


def test_functions_are_short():
    no(long_functions())


def test_modules_are_short():
    no(long_modules())


def test_formatter_and_linter_find_nothing():
    if importlib.util.find_spec("ruff") is None:
        pytest.fail("ruff is missing: it comes with the package's tools, pip install -e '.[dev]'")
    for command in (["format", "--check"], ["check", "--output-format", "concise"]):
        words = [sys.executable, "-m", "ruff", *command, "--no-cache", "--quiet", "nbs", "tests", "benchmarks", ".ci"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"make format repairs most of this:\n{done.stdout}{done.stderr}"


# --- reading


def undemonstrated():
    "Exported cells with no demonstration in the two cells below; two methods (`@patch`) in a row count as one cell"
    for path in NOTEBOOKS:
        found = [cell for cell in cells(path) if cell.kind != "raw"]
        for place, cell in enumerate(found):
            if not (cell.exported and cell.defined):
                continue
            below = place + 1 + (is_patch(cell) and place + 1 < len(found) and is_patch(found[place + 1]))
            if not any(near.teaches for near in found[place + 1 : below + 2]):
                yield f"{path.name} {cell.identity}: nothing in the two cells below shows {names(cell)}"


def is_patch(cell):
    "Is this an exported cell of one method?"
    return cell.exported and len(cell.defined) == 1 and "patch" in map(ast.unparse, cell.defined[0].decorator_list)


def empty_methods():
    "Methods that say `pass`: a hook that nobody needs is not there"
    for path in MODULES:
        for node in ast.walk(parsed(path)):
            for method in getattr(node, "body", []) if isinstance(node, ast.ClassDef) else []:
                if isinstance(method, FUNCTIONS) and isinstance(method.body[-1], ast.Pass):
                    yield f"{path.name}: {node.name}.{method.name}"


def test_every_exported_cell_is_demonstrated():
    no(undemonstrated())


def test_no_method_is_empty():
    no(empty_methods())


# --- the order of the rooms, and what is public


def imports(tree):
    "(module, name) of everything that is imported from this package; the name is None for a whole module"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            source = f"{PACKAGE}.{node.module or ''}".rstrip(".") if node.level else node.module
            for alias in node.names:
                if source == PACKAGE:
                    yield alias.name, None
                elif source.startswith(f"{PACKAGE}."):
                    yield source.partition(".")[2], alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith(f"{PACKAGE}."):
                    yield alias.name.partition(".")[2], None


def number(path):
    return path.name.partition("_")[0]


def imports_upwards():
    "Exported code that imports from its own number or a higher one, inside functions too"
    home = homes()
    for path in NOTEBOOKS:
        for cell in filter(lambda cell: cell.exported, cells(path)):
            for module in dict.fromkeys(module for module, _ in imports(cell.tree)):
                if module in home and number(home[module]) >= number(path):
                    yield f"{path.name} {cell.identity}: imports {module}, which is {home[module].name}"
                if module not in home:
                    yield f"{path.name} {cell.identity}: imports {module}, which no notebook writes"


def test_exported_code_imports_from_lower_numbers_only():
    no(imports_upwards())


def public(path):
    "`__all__` of the module at `path`"
    for node in parsed(path).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def uses(tree):
    "(module, name) of what a piece of code uses from this package: imported, as attributes of modules, in strings"
    found = set(imports(tree))
    modules = {module for module, name in found if name is None} | {module for module, name in found if name == "*"}
    stars = {module for module, name in found if name == "*"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found |= {(module, node.attr) for module in modules}
        elif isinstance(node, ast.Name):
            found |= {(module, node.id) for module in stars}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(rf"\b{PACKAGE}\.(\w+)[.:](\w+)", node.value))
    return found


def returned(tree):
    "The names in the return annotations of the public functions and methods of a module"
    functions = [
        node for node in ast.walk(tree) if isinstance(node, FUNCTIONS) and node.name[0] != "_" and node.returns
    ]
    return set(re.findall(r"\w+", " ".join(ast.unparse(node.returns) for node in functions)))


def prose(path):
    "What the Markdown of a page puts in backticks or in code blocks"
    text = "\n".join(cell.source for cell in cells(path) if cell.kind == "markdown")
    return set(re.findall(r"\w+", " ".join(re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL))))


def unused_public_names():
    """Names of `__all__` that nothing outside their own notebook uses: no module, test, benchmark or page.

    A class that a public function returns may be public, too."""
    used = {path: uses(parsed(path)) for path in [*MODULES, *SCRIPTS]}
    mentioned = {}
    for path in NOTEBOOKS:
        code = [cell for cell in cells(path) if cell.kind == "code" and not cell.exported]
        used[path] = set().union(*(uses(cell.tree) for cell in code))
        mentioned[path] = prose(path)
    for module, home in homes().items():
        own = {home, ROOT / PACKAGE / f"{module}.py"}
        for name in public(ROOT / PACKAGE / f"{module}.py"):
            elsewhere = any((module, name) in found for path, found in used.items() if path not in own)
            elsewhere = elsewhere or any(name in found for path, found in mentioned.items() if path not in own)
            elsewhere = elsewhere or name in returned(parsed(ROOT / PACKAGE / f"{module}.py"))
            if not elsewhere:
                yield f"{module}.{name}"


def test_private_names_are_private():
    "The exceptions are told here, and needed"
    found = set(unused_public_names())
    no(f"{name} is public, and only its own notebook uses it" for name in sorted(found - FOR_USERS.keys()))
    no(f"{name} needs no exception in FOR_USERS" for name in sorted(FOR_USERS.keys() - found))
