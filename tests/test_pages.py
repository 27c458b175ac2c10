"""What the pages tell their readers to type is accepted by the commands, and what they fetch exists."""

import ast
import builtins
import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from notebook_process import solution_code
from test_project import NOTEBOOKS, ROOT, cells

from sdpo_nb.cli import (
    check_reward,
    evaluate_lora,
    flag_text,
    sample_lora,
    source_help,
    train_command,
    training_config,
    training_words,
)
from sdpo_nb.commands import CommandParser, flags_of
from sdpo_nb.config import presets
from sdpo_nb.plan import batch_line
from sdpo_nb.prompts import prompt_lists
from sdpo_nb.voting import vote_in_browser

PAGES = [*NOTEBOOKS, ROOT / "README.md"]
COMMANDS = ("sdpo-train", "sdpo-eval", "sdpo-sample", "sdpo-vote")


def shell_lines(path):
    "The lines of the ```sh blocks of a notebook or Markdown page; several commands in a line are several lines"
    text = "\n\n".join(cells(path, "markdown")) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield from line.split(" && ")


def own_words(line):
    """A command of this package, its words and the number of processes; None for other lines.

    The command may stand behind `accelerate launch … $(which sdpo-train)`."""
    words = shlex.split(re.sub(r"\$\(which ([\w-]+)\)", r"\1", line), comments=True)
    place = next((i for i, word in enumerate(words) if word in COMMANDS), None)
    if place is None or (place and words[:2] != ["accelerate", "launch"]):
        return None
    launched = flag_text(words[:place], "num_processes")
    return words[place], words[place + 1 :], int(launched or 1)


def command_lines(path):
    "Every line of the page that calls one of our commands"
    return [line for line in shell_lines(path) if own_words(line)]


def check_known(reward):
    "A reward in a file of the reader's is not here, nor are the reader's votes"
    if ".py:" not in reward and "votes:" not in reward:
        check_reward(reward)


def check_train(words, processes):
    "Parse a line of sdpo-train, and check all that needs no files: flags, values, preset, reward, batches"
    if "--help" in words:
        return
    preset, given = training_words(words)
    if given.pop("resume", None) is not None:
        assert preset is None, "a run that goes on knows its settings"
        return
    if given.get("prompts") not in (*prompt_lists, None):
        given.pop("prompts")  # a file or data set of the reader's
    if given.pop("config", None) is not None:
        preset = preset or "tiny"  # the file is the reader's, and may name another
    given.pop("tracker", None)  # its package need not be installed
    config, _ = training_config(preset, given)
    check_known(config.reward)
    batch_line(config, processes)


def check_function(name, function, positionals, words):
    "Parse a line of another command"
    _, given = CommandParser(name, positionals, flags_of(function), "Try.").read(words)
    if "reward" in given:
        check_known(given["reward"])


def check(line):
    "Raise `ValueError` where a command would refuse the line"
    name, words, processes = own_words(line)
    if name == "sdpo-train":
        check_train(words, processes)
    elif name == "sdpo-eval":
        check_function(name, evaluate_lora, source_help, words)
    elif name == "sdpo-vote":
        check_function(name, vote_in_browser, {"POLICY": "a model"}, words)
    else:
        check_function(name, sample_lora, source_help | {"PROMPT": "what to draw"}, words)


@pytest.mark.parametrize("path", [path for path in PAGES if command_lines(path)], ids=lambda path: path.name)
def test_commands_on_the_pages_are_accepted(path):
    for line in command_lines(path):
        try:
            check(line)
        except ValueError as error:
            pytest.fail(f"{path.name}: {line}\n{error}")


def test_the_pages_that_should_show_commands_do():
    shown = {path.name: len(command_lines(path)) for path in PAGES}
    assert (
        all(shown[name] >= 2 for name in ("50_cli.ipynb", "51_full_scale.ipynb", "52_troubleshooting.ipynb"))
        and shown["README.md"]
        and sum(shown.values()) > 20
    )


@pytest.mark.parametrize(
    "line, sentence",
    [
        ('sdpo-sample runs/a "a fox" --steps 4', "did you mean --num_steps"),
        ("sdpo-train tinny", "did you mean 'tiny'"),
        ("sdpo-train tiny --reward beauty", "beauty"),
        ("sdpo-train tiny --epochs many", "epochs"),
        ("sdpo-eval runs/a b", "try sdpo-eval"),
        (
            "accelerate launch --num_processes 3 $(which sdpo-train) sd_turbo_aesthetic_4x24gb  # four",
            "which 3 processes cannot share",
        ),
    ],
)
def test_a_line_that_would_be_refused_is_found(line, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check(line)


def test_the_parser_here_is_that_of_the_command(capfd):
    "A dry run goes through the command itself"
    assert (
        train_command(["tiny", "--dry_run", "--epochs", "3"]) == 0
        and "optimizer steps in total" in capfd.readouterr().out
    )
    assert train_command(["tiny", "--steps", "3"]) == 2


# --- scripts in benchmarks/


def script_flags(path):
    "The flags that a script declares, read and not run"
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return {call.args[0].value for call in calls if getattr(call.func, "attr", "") == "add_argument"}


def script_lines():
    "(where it stands, script, flags) of every `python benchmarks/…` on the pages and in the scripts' own descriptions"
    scripts = sorted((ROOT / "benchmarks").glob("*.py"))
    texts = {path.name: "\n".join(shell_lines(path)) for path in PAGES} | {
        path.name: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) for path in scripts
    }
    for place, text in texts.items():
        for line in re.findall(r"^\s*(?:.*&& )?python (benchmarks/\S+\.py.*)$", text, flags=re.MULTILINE):
            script, *words = shlex.split(line, comments=True)
            yield place, script, [word.partition("=")[0] for word in words if word.startswith("--")]


@pytest.mark.parametrize(
    "place, script, flags",
    [pytest.param(*found, id=f"{found[0]}: {' '.join([Path(found[1]).name, *found[2]])}") for found in script_lines()],
)
def test_scripts_have_the_flags_that_are_named(place, script, flags):
    assert (ROOT / script).is_file() and not [flag for flag in flags if flag not in script_flags(ROOT / script)]


# --- Python on the pages


def names_in(code):
    "The names that the code binds anywhere, and those that it reads anywhere"
    bound, read = set(), set()
    for node in ast.walk(ast.parse(re.sub(r"^\s*[!%].*$", "pass", code, flags=re.MULTILINE))):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {(name.asname or name.name).partition(".")[0] for name in node.names}
    return bound, read


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def undefined_names(path):
    "Of the Python in a page's prose: each name that nothing above it defines. Solutions are run by test_notebooks.py"
    known, missing = set(dir(builtins)), []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        code = cell["cell_type"] == "code"
        for block in [source] if code else [] if solution_code(cell) else python_blocks(source):
            bound, read = names_in(block)
            known |= bound
            missing += [] if code else sorted(read - known)
    return missing


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_python_on_the_pages_names_nothing_undefined(path):
    assert undefined_names(path) == []


SMALLER = {
    "epochs=10, pairs_per_epoch=8": "epochs=1, pairs_per_epoch=2",
    "steps=[1, 4, 16], samples=32": "steps=[1, 4], samples=4",
}


def test_the_first_run_is_a_script_that_runs(tmp_path):
    code = "\n".join(
        source for source in cells(ROOT / "nbs" / "first_run.ipynb", "code") if "pip install" not in source
    )
    for size, smaller in SMALLER.items():
        assert code.count(size) == 1
        code = code.replace(size, smaller)
    script = tmp_path / "readme.py"
    script.write_text(code, encoding="utf-8")
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    written = {path.name for path in tmp_path.rglob("*.png")}
    assert written == {"grid.png", "star.png"} and "gain ± se" in done.stdout and str(sorted(written)) in done.stdout


@pytest.mark.parametrize(
    "gpu, colab, begun, whole", [(1, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (0, 0, 0, 0), (1, 0, 0, 1)]
)
def test_run_all_of_full_scale_trains_the_short_variant(tmp_path, monkeypatch, gpu, colab, begun, whole):
    "Whatever a cell's directives say, Jupyter runs it: what would take days has a switch, which is off"
    code = cells(ROOT / "nbs" / "51_full_scale.ipynb", "code")
    imports = next(cell for cell in code if "from sdpo_nb.trainer import" in cell)
    first = next(cell for cell in code if cell.startswith("config = "))
    short = ast.unparse(ast.parse(next(cell for cell in code if cell.startswith("short = "))).body[0])
    on_gpu = [cell for cell in code if re.match(r"#\| gpu\n", cell)]
    trained, mounted = [], []

    def train(policy, reward, prompts, config):
        return SimpleNamespace(train=lambda: trained.append(config))

    space = {}
    exec("\n".join([imports, first, short]), space)
    drive = SimpleNamespace(mount=mounted.append)
    space |= dict(Trainer=train, load_policy=lambda *_, **__: None, import_module=lambda name: drive)
    space |= dict(sys=SimpleNamespace(modules={"google.colab": 0} if colab else {}))
    space |= dict(show_run=lambda *_, **__: pytest.fail("nothing was trained"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpu))
    monkeypatch.chdir(tmp_path)
    if begun:
        (tmp_path / "runs" / "sdpo_short" / "checkpoints").mkdir(parents=True)
    switch = "whole_preset = False"
    assert sum(cell.count(switch) for cell in on_gpu) == 1
    exec("\n".join(on_gpu).replace(switch, "whole_preset = True" if whole else switch), space)
    place = "/content/drive/MyDrive/sdpo_short" if colab else f"runs/sdpo_{'whole' if whole else 'short'}"
    epochs = [] if not gpu else [presets["sd_turbo_aesthetic"]["epochs"] if whole else 20]
    assert [config.epochs for config in trained] == epochs and len(mounted) == colab
    assert [(config.output_dir, config.resume) for config in trained] == [(place, place if begun else None)] * gpu


# --- pages where only the package is installed, as on Colab


@pytest.mark.parametrize("name", ["55_families.ipynb", "51_full_scale.ipynb"])
def test_random_models_are_fetched_where_there_is_no_checkout(name, tmp_path, monkeypatch):
    code = cells(ROOT / "nbs" / name, "code")
    source = next(cell for cell in code if "urlretrieve(" in cell)  # and imports what was fetched
    asked = []

    def fetch(address, target):
        asked.append(address)
        repository = re.fullmatch(r"https://raw\.githubusercontent\.com/sdpo-nb/sdpo_nb/main/(\S+)", address).group(1)
        Path(target).write_bytes((ROOT / repository).read_bytes())

    from sdpo_nb.files import results_address

    class Temporary:
        @staticmethod
        def mkdtemp():
            return str(tmp_path)

    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "random_models", raising=False)
    space = dict(
        Path=Path,
        sys=sys,
        import_module=import_module,
        tempfile=Temporary,
        urlretrieve=fetch,
        results_address=results_address,
        results_folder=tmp_path / "nowhere" / "results",
    )
    exec(source, space)
    assert (
        len(asked) == 1 and Path(sys.modules["random_models"].__file__).parent == tmp_path and callable(space["make"])
    )
    monkeypatch.delitem(sys.modules, "random_models")
