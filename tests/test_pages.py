"""What the pages tell their readers to type is accepted by the commands, and what they fetch exists."""

import ast
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest
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
from sdpo_nb.plan import batch_line
from sdpo_nb.prompts import prompt_lists

PAGES = [*NOTEBOOKS, ROOT / "README.md"]
COMMANDS = ("sdpo-train", "sdpo-eval", "sdpo-sample")


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
    "A reward in a file of the reader's is not here"
    if ".py:" not in reward:
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
    "Parse a line of sdpo-eval or sdpo-sample"
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
