"""The three commands: what they do with good input; one sentence, an exit status and a clean disk with any other."""

import io
import os
import random
import re
import shutil
import subprocess
import sys
import types
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

import sdpo_nb.cli as cli
from sdpo_nb.calls import file_hash
from sdpo_nb.cli import eval_command, method_settings, sample_command, train_command, training_words
from sdpo_nb.commands import CommandParser, Flag, flags_of, read_value, run_command
from sdpo_nb.config import TrainConfig
from sdpo_nb.files import read_json, read_jsonl

SIZES = "--num_steps 3 --pairs_per_epoch 2 --pairs_per_update 2 --micro_batch 1 --min_count 2 --buffer_size 4".split()


@pytest.fixture(scope="module")
def small(pipeline, tmp_path_factory):
    "Words of a command line that trains in seconds"
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a cat\na dog\n", encoding="utf-8")
    places = ["--policy", str(pipeline), "--prompts", str(prompts)]
    rate = ["--learning_rate", "5e-4", "--kl_coefficient", "0"]  # of `finished_run`; the preset has its own
    return ["tiny", *places, *SIZES, *rate, "--reward", "colorfulness", "--eval_samples", "0"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    "Every test starts in an empty folder"
    monkeypatch.chdir(tmp_path)


def said(capfd):
    "The one line on stderr; nothing else may be there, but for the plan that is printed before anything is loaded"
    output, errors = capfd.readouterr()
    assert re.fullmatch(r"(\d+ pairs an epoch; an update = .*\n)?", output), output
    assert errors.count("\n") == 1 and "Traceback" not in errors, errors
    return errors


# --- words


TEA = dict(
    cups=Flag(int, None, "how many"),
    minutes=Flag(float, 3.0, "how long it draws"),
    hot=Flag(bool, True, "over ice, or not"),
    milk=Flag(str, None, "cow, oat or none", True),
    label=Flag(str, None, "50% of the pot"),
)


@pytest.mark.parametrize(
    "words, values, given",
    [
        ("a", ["a", None], {}),
        ("a --hot", ["a", None], dict(hot=True)),
        ("--hot a", ["a", None], dict(hot=True)),
        ("--hot false a b", ["a", "b"], dict(hot=False)),
        ("a --hot b", ["a", "b"], dict(hot=True)),
        ("a b --hot False", ["a", "b"], dict(hot=False)),
        ("a --label -0.5*a+b", ["a", None], dict(label="-0.5*a+b")),
        ("a --label=--hot --minutes -1e-3", ["a", None], dict(label="--hot", minutes=-0.001)),
        ("a --cups none --label None --milk none", ["a", None], dict(cups=None, label=None, milk="none")),
        ("a --cups 1 --cups 2", ["a", None], dict(cups=2)),
        ("a --label= --hot=true", ["a", None], dict(label="", hot=True)),
        ("--cups 1 -- --hot -x", ["--hot", "-x"], dict(cups=1)),
    ],
)
def test_words_are_understood(words, values, given):
    parser = CommandParser("tea", {"WHERE": "a table", "[WHO]": "a guest"}, TEA, "An example.")
    assert parser.read(words.split()) == (values, given)


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("here this --hot maybe", "hot is 'maybe'; give true or false."),
        ("here --cups --hot", "cups has no value; write --cups N."),
        ("", "required: WHERE; try tea --help."),
        ("a b c", "c; try tea --help."),
        ("a -minutes 1", "did you mean --minutes?"),
    ],
)
def test_words_that_are_not(words, sentence):
    parser = CommandParser("tea", {"WHERE": "a table", "[WHO]": "a guest"}, TEA, "An example.")
    with pytest.raises(ValueError, match=re.escape(sentence)):
        parser.read(words.split())


@pytest.mark.parametrize(
    "name, value", [("hot", "yes"), ("cups", "1.5"), ("cups", True), ("minutes", None), ("label", ["a"])]
)
def test_values_of_another_kind(name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value!r}; give ")):
        read_value(name, TEA[name], value)


@pytest.mark.parametrize("flag", [flag for flag in fields(TrainConfig)], ids=lambda f: f.name)
def test_every_field_is_a_flag(flag):
    known = flags_of(TrainConfig)[flag.name]
    text = {bool: "true", int: "7", float: "0.5", str: "-1*a"}[known.kind]
    if flag.name == "recipe":
        text = "ddpo"  # which flags there are depends on it
    preset, given = training_words(["tiny", f"--{flag.name}", text])
    assert (preset, [*given]) == ("tiny", [flag.name]) and type(given[flag.name]) is known.kind
    assert training_words([f"--{flag.name}={text}", "tiny"]) == (preset, given)


def test_any_words_end_in_a_plan_or_in_one_line():
    "Random lines of flags, values and rubbish, all with --dry_run"
    names = [*(f"--{f.name}" for f in fields(TrainConfig)), "--config", "--epoch", "-x", "--", "--learning-rate"]
    values = "1 0 -1 7 0.5 -0.5*a+b nan inf none true false tiny all return shapes 1e999 λ = -- --help=3".split()
    draw, statuses = random.Random(0), set()
    for _ in range(150):
        words = ["tiny"] * draw.choice([0, 1, 1, 1, 2])
        for _ in range(draw.choice([0, 1, 1, 2])):
            words += [draw.choice(names), *draw.choices(values, k=draw.choice([0, 1, 1, 1]))]
        words.insert(draw.randrange(len(words) + 1), "--dry_run=true")
        with redirect_stderr(io.StringIO()) as errors, redirect_stdout(io.StringIO()) as output:
            status = train_command([word for word in words if word not in ("--resume", "--output_dir")])
        statuses.add(status)
        if status:
            assert status == 2 and re.fullmatch(r"sdpo-train: .+\n", errors.getvalue()), (words, errors.getvalue())
        else:
            assert "optimizer steps in total" in output.getvalue() and not errors.getvalue(), words
    assert statuses == {0, 2}


# --- mistakes


@pytest.mark.parametrize(
    "words, parts",
    [
        ("", ["PRESET", "tiny", "--resume", "--config"]),
        ("tiny more", ["more", "--help"]),
        ("tiny --epoch 3", ["--epoch;", "--epochs"]),
        ("tiny --xyzzy=3", ["--xyzzy", "--help"]),
        ("tiny --epochs", ["epochs", "no value", "--epochs N"]),
        ("tiny --epochs 1.5", ["epochs", "'1.5'", "whole number"]),
        ("tiny --epochs 0", ["epochs is 0", "from 1"]),
        ("tiny --learning_rate -inf", ["learning_rate is -inf"]),
        ("tiny --learning_rate -1e-3", ["learning_rate is -0.001"]),
        ("tiny --gamma 2", ["gamma is 2.0", "from 0 to 1"]),
        ("tiny --eta 0", ["eta is 0"]),
        ("tiny --divide_by_std=maybe", ["divide_by_std", "'maybe'", "true or false"]),
        ("tiny --dry_run maybe", ["dry_run", "'maybe'", "true or false"]),
        ("tiny --train_last_step maybe --epochs 3", ["train_last_step", "'maybe'", "true or false"]),
        ("tiny --reward= --dry_run", ["reward ''"]),
        ("tiny --queries 4", ["queries", "'4'", "terminal"]),
        ("tiny --recipe sdpp", ["recipe", "'sdpp'", "'sdpo'"]),
        ("tiny --normalizer stepprompt", ["normalizer", "'step_prompt'"]),
        ("tiny --micro_batch 5", ["micro_batch is 5", "divisor"]),
        ("tiny --num_steps 1", ["num_steps is 1", "reward_to_go"]),
        ("tiny --beta 0.5", ["beta is 0.5", "reward_difference"]),
        ("tiny --candidates 4", ["candidates", "spo", "'sdpo' does not use", "leave it out"]),
        ("tiny --reward 0.5*warmth+", ["reward", "mixture"]),
        ("tiny --reward 0.5*warmth-1*beauty", ["'beauty'", "my_file.py:function"]),
        ("tiny --reward mine.py:f", ["reward is 'mine.py:f'", "'mine.py' is not found here"]),
        ("tiny --reward 0.5*warmth+no_such_module:f", ["'no_such_module' is not found here"]),
        ("tiny --variant", ["variant has no value", "--variant TEXT"]),
        ("tiny --config nowhere.yaml", ["config", "'nowhere.yaml'"]),
        ("tiny --prompts nowhere.txt", ["prompts is 'nowhere.txt'"]),
        ("tiny --resume nowhere", ["resume", "'nowhere'", "run"]),
        ("--resume .", ["resume", "'.'", "run"]),
    ],
)
def test_bad_training_command(words, parts, capfd, tmp_path):
    assert train_command(words.split()) == 2
    line = said(capfd)
    assert line.startswith("sdpo-train: ") and all(part in line for part in parts), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, part",
    [
        ("epoch: 5", "did you mean 'epochs'"),
        ("epochs: [1]", "whole number"),
        ("epochs:", "whole number"),
        ("epochs: true", "whole number"),
        ("just words", "field: value"),
        ("a: [", "YAML"),
        ("3: 4", "a field in mine.yaml is 3"),
        ("epochs: 3\nseed: 1\nepochs: 5", "epochs stands there twice; leave one of them"),
        ('{"seed": 1, "seed": 1}', "seed stands there twice"),
        ("seed: 2026-13-45", "YAML"),
        ("- " * 2000 + "a", "field: value"),
        ("train_last_step: 1", "true or false"),
    ],
)
def test_bad_yaml(text, part, tmp_path, capfd):
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    assert train_command(["tiny", "--config", "mine.yaml"]) == 2
    assert part in said(capfd)


@pytest.mark.parametrize("recipe", ["spo", "lasro"])
def test_what_a_method_does_not_obey_is_refused_by_name(recipe, tmp_path, capfd):
    own = {f.name for f in fields(method_settings(recipe))}
    others = [f.name for f in fields(TrainConfig) if f.name not in own]
    assert {"credit", "normalizer", "reward_worker"} <= {*others}
    for name in others:
        value = {bool: "true", int: "1", float: "1", str: "x"}[flags_of(TrainConfig)[name].kind]
        (tmp_path / "mine.yaml").write_text(f"{name}: {value}\n", encoding="utf-8")
        for words in (f"tiny --recipe {recipe} --{name} {value}", f"tiny --recipe {recipe} --config mine.yaml"):
            assert train_command(words.split()) == 2
            line = said(capfd)
            assert re.match(
                rf"sdpo-train: {name} is a setting of the recipes? [\w, ]+, which the recipe '{recipe}'", line
            )
            assert line.endswith(" does not use; leave it out.\n")


@pytest.mark.parametrize(
    "words, parts",
    [
        ("", ["RUN_OR_LORA", "--help"]),
        ("nowhere", ["RUN_OR_LORA", "'nowhere'"]),
        ("RUN --steps 1,,2", ["steps", "whole number"]),
        ("RUN --samples 0", ["samples is 0"]),
        ("RUN --eta nan", ["eta is nan"]),
        ("RUN --prompts nowhere.txt", ["'nowhere.txt'"]),
        ("RUN --output new/table.csv", ["output", ".json"]),
        ("LORA", ["prompts is missing", "--prompts"]),
        ("LORA --prompts shapes", ["policy is missing", "--policy"]),
        ("LORA --prompts shapes --policy tiny", ["reward is missing", "--reward"]),
    ],
)
def test_bad_evaluation_command(words, parts, finished_run, capfd, tmp_path):
    places = {"RUN": str(finished_run), "LORA": str(finished_run / "lora" / "pytorch_lora_weights.safetensors")}
    assert eval_command([places.get(word, word) for word in words.split()]) == 2
    line = said(capfd)
    assert line.startswith("sdpo-eval: ") and all(part in line for part in parts), line
    assert not list(tmp_path.iterdir())


def test_evaluation_without_steps_leaves_out_what_the_model_cannot_do(finished_run, tmp_path, capfd, monkeypatch):
    "A consistency model knows no more steps than it was distilled with"
    from sdpo_nb.models import Policy

    sampler = Policy.sampler

    def few(self, num_steps, *rest, **options):
        if num_steps > 5:
            raise ValueError(f"num_steps={num_steps} is more than the 5 of this model.")
        return sampler(self, num_steps, *rest, **options)

    monkeypatch.setattr(Policy, "sampler", few)
    assert eval_command([str(finished_run), "--samples", "2", "--output", "e.json"]) == 0
    assert read_json(tmp_path / "e.json")["steps"] == [1, 2, 4] and "    8  " not in capfd.readouterr().out
    assert eval_command([str(finished_run), "--samples", "2", "--steps", "4,8"]) == 2
    assert "num_steps=8 is more than the 5" in said(capfd)


@pytest.mark.parametrize(
    "words, parts",
    [
        (["a cat", "--num_steps", "0"], ["num_steps is 0"]),
        (["a cat", "--samples", "-1"], ["samples is -1"]),
        (["a cat", "--scale", "inf"], ["scale is inf"]),
        (["a cat", "--scale", "1,2"], ["scale is '1,2' for 1 LoRAs"]),
        (["a cat", "--guidance_scale", "-1"], ["guidance_scale is -1.0"]),
        (["a cat", "--sample", "3"], ["--sample;", "--samples"]),
    ],
)
def test_bad_sampling_command(words, parts, finished_run, capfd, tmp_path):
    assert sample_command([str(finished_run), *words]) == 2
    line = said(capfd)
    assert line.startswith("sdpo-sample: ") and all(part in line for part in parts), line
    assert not list(tmp_path.iterdir())


# --- what stays on the disk


def test_output_folder_is_protected(finished_run, small, tmp_path, capfd):
    before = sorted(finished_run.rglob("*"))
    assert train_command([*small, "--output_dir", str(finished_run)]) == 2
    assert "output_dir" in said(capfd) and sorted(finished_run.rglob("*")) == before
    (tmp_path / "file").write_text("precious")
    for place in ("file", "file/deeper"):
        assert train_command([*small, "--output_dir", place]) == 2
        assert "is not a folder" in said(capfd) and (tmp_path / "file").read_text() == "precious"


def test_damaged_weights(random_folder, small, tmp_path, capfd):
    shutil.copytree(random_folder(), tmp_path / "damaged")
    weights = tmp_path / "damaged" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    capfd.readouterr()
    assert train_command([*small, "--policy", str(tmp_path / "damaged")]) == 1
    assert str(weights) in said(capfd)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def no_space(self, *_, **__):
    raise OSError(28, "No space left on device", "a file")


def overflow(self, *_):
    raise FloatingPointError("overflow")


def memory(self, *_):
    raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.")


def stop(self, *_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "method, failure, status, part",
    [
        ("save_checkpoint", no_space, 1, "No space left on device"),
        ("train_epoch", overflow, 1, "overflow"),
        ("train_epoch", memory, 1, "out of memory; lower micro_batch"),
        ("save_checkpoint", stop, 130, "interrupted."),
    ],
)
@pytest.mark.parametrize("folder", ["run", "mine/new/run"])
def test_a_failure_before_the_first_epoch_is_over_leaves_no_folder(
    method, failure, status, part, folder, small, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(f"sdpo_nb.trainer.Trainer.{method}", failure)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    assert train_command([*small, "--output_dir", folder]) == status
    line = said(capfd)
    assert part in line and "resume" not in line
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "notes.txt"]


def test_a_folder_that_others_have_filled_is_left_alone(small, tmp_path, capfd, monkeypatch):
    import sdpo_nb.run as run_module

    check = run_module.check_output

    def late(folder, overwrite):
        (folder / "theirs").mkdir(parents=True)  # between our check and our first file
        return check(folder, overwrite)

    monkeypatch.setattr(run_module, "check_output", late)
    assert train_command([*small, "--output_dir", "run"]) == 2
    assert "output_dir" in said(capfd) and [path.name for path in (tmp_path / "run").iterdir()] == ["theirs"]


def test_interruption_says_how_to_go_on(small, tmp_path, capfd, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("sdpo_nb.trainer.Trainer.train_epoch", stop)
        assert train_command([*small, "--epochs", "1", "--output_dir", "run"]) == 130
    assert said(capfd) == "sdpo-train: interrupted; go on with sdpo-train --resume run\n"
    assert train_command(["--resume", "run"]) == 0
    assert (tmp_path / "run" / "lora").is_dir()


@pytest.fixture
def run(small, capfd):
    "The folder of a run of one epoch, here"
    assert train_command([*small, "--epochs", "1", "--output_dir", "run"]) == 0
    capfd.readouterr()
    return Path("run")


def content(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_finished_run_is_replaced_only_on_demand(run, small, capfd, monkeypatch):
    before = content(run)
    assert train_command([*small, "--epochs", "1", "--output_dir", "run"]) == 2
    assert "--overwrite" in said(capfd) and content(run) == before
    with monkeypatch.context() as patched:
        patched.setattr("sdpo_nb.models.load_policy", no_space)
        assert train_command([*small, "--output_dir", "run", "--overwrite"]) == 1
    with monkeypatch.context() as patched:
        patched.setattr("sdpo_nb.trainer.Trainer.open_folder", no_space)
        assert train_command([*small, "--output_dir", "run", "--overwrite"]) == 1
    assert content(run) == before  # nothing is lost before the new run stands
    (run / "notes.txt").write_text("mine")
    capfd.readouterr()
    assert train_command([*small, "--epochs", "1", "--seed", "7", "--output_dir", "run/", "--overwrite"]) == 0
    assert read_json(run / "config.json")["seed"] == 7 and (run / "notes.txt").read_text() == "mine"


def test_a_run_without_an_epoch_is_replaced(small, capfd, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("sdpo_nb.trainer.Trainer.train_epoch", stop)
        assert train_command([*small, "--output_dir", "run"]) == 130
    (Path("run") / "notes.txt").write_text("mine")
    with monkeypatch.context() as patched:
        patched.setattr("sdpo_nb.trainer.Trainer.train_epoch", overflow)
        assert train_command([*small, "--output_dir", "run"]) == 1
    assert [*content(Path("run"))] == ["run/notes.txt"]  # what is not the run's stays
    (Path("run") / "notes.txt").unlink()
    assert train_command([*small, "--epochs", "1", "--output_dir", "run"]) == 0


# --- a reward of one's own


REWARD = "def f(images, prompts):\n    return [{sign}float(image.mean()) for image in images]\n"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mine.py").write_text(REWARD.format(sign=""))
    return tmp_path / "mine.py"


@pytest.mark.parametrize("reward", ["0.5*mine.py:f+0.5*warmth"])
def test_a_reward_of_ones_own(reward, mine, small, capfd):
    words = [*small, "--reward", reward, "--epochs", "1", "--output_dir", "run"]
    assert train_command([*words, "--dry_run"]) == 0 and not Path("run").exists()
    assert train_command(words) == 0
    found = read_json("run/config.json")
    assert found["reward"] == reward and [*found["reward_files"].values()] == [file_hash(mine)]
    assert train_command(["--resume", "run", "--epochs", "2"]) == 0
    assert eval_command(["run", "--steps", "1", "--samples", "2"]) == 0
    before = content(Path("run"))
    mine.write_text(REWARD.format(sign="-"))
    capfd.readouterr()
    for command in (["--resume", "run", "--epochs", "3"], ["--resume", "run", "--dry_run"]):
        assert train_command(command) == 2
        assert "'mine.py' has changed since the run was started; restore that file, or give --reward" in said(capfd)
    assert eval_command(["run", "--steps", "1", "--samples", "2"]) == 2
    assert "'mine.py' has changed" in said(capfd)
    assert content(Path("run")) == before
    assert train_command(["--resume", "run", "--epochs", "3", "--reward", reward]) == 0
    assert [*read_json("run/config.json")["reward_files"].values()] == [file_hash(mine)]
    assert train_command(["--resume", "run", "--epochs", "4"]) == 0
    assert eval_command(["run", "--steps", "1", "--samples", "2", "--reward", "mine.py:f"]) == 0
    mine.unlink()
    capfd.readouterr()
    assert train_command(["--resume", "run", "--epochs", "5"]) == 2
    assert "'mine.py' is not found here" in said(capfd)


def test_an_error_in_it_is_one_line_with_its_place(mine, small, capfd):
    mine.write_text("def f(images, prompts):\n    return {}['score']\n")
    assert train_command([*small, "--reward", "mine.py:f", "--output_dir", "run"]) == 2
    assert "reward 'mine.py:f' failed: KeyError: 'score' (in mine.py, line 2)." in said(capfd)
    assert not Path("run").exists()


# --- places


def test_the_home_folder_is_understood_everywhere(pipeline, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(pipeline, home / "model")
    (home / "prompts.txt").write_text("a cat\na dog\n")
    (home / "mine.py").write_text(REWARD.format(sign=""))
    fields = dict(policy="~/model/", prompts="~/prompts.txt", reward="~/mine.py:f", output_dir="~/yaml/run/")
    (home / "mine.yaml").write_text("".join(f"{name}: {value}\n" for name, value in fields.items()))
    words = ["--config", "~/mine.yaml", *SIZES, "--eval_samples", "0", "--epochs", "1"]
    assert train_command(words) == 0
    assert train_command([*words, "--output_dir", "~/flag"]) == 0
    assert train_command(["--resume=~/flag/", "--epochs", "2", "--output_dir", "~/flag"]) == 0
    assert (
        eval_command(["~/flag/", "--steps", "1", "--samples", "2", "--output", "~/e.json", "--policy", "~/model"]) == 0
    )
    assert sample_command(["~/flag,~/yaml/run", "a cat", "--samples", "1", "--num_steps", "1", "--output=~/s.png"]) == 0
    found = {path.name for path in home.iterdir()} - {"__pycache__"}
    assert found == {"model", "prompts.txt", "mine.py", "mine.yaml", "yaml", "flag", "e.json", "s.png"}
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert read_json(home / "flag" / "config.json")["policy"] == str(home / "model")
    assert train_command([*words, "--output_dir", "~/flag", "--dry_run"]) == 2
    assert f"output_dir is '{home}/flag'" in capfd.readouterr().err


def test_a_model_that_has_moved(pipeline, small, tmp_path, capfd):
    "What counts are its weights, not its place"
    shutil.copytree(pipeline, "modelA")
    words = [*small, "--policy", "./modelA/", "--epochs", "1"]
    assert train_command([*words, "--output_dir", "run"]) == 0 == train_command([*words, "--output_dir", "other"])
    Path("modelA").rename("modelB")
    capfd.readouterr()
    assert train_command(["--resume", "run", "--epochs", "2"]) == 1
    assert "policy='./modelA' is no folder" in said(capfd)
    assert train_command(["--resume", "run", "--epochs", "2", "--policy", "./modelB/"]) == 0
    assert read_json("run/config.json")["policy"] == "./modelB"
    assert sample_command(["run", "a cat", "--num_steps", "1", "--samples", "1"]) == 0
    both = ["run,other", "a cat", "--num_steps", "1", "--samples", "1"]
    capfd.readouterr()
    assert sample_command(both) == 2 and "combine LoRAs of one model" in said(capfd)
    assert sample_command([*both, "--policy", "./modelB"]) == 0


# --- output


class Unprintable(io.StringIO):
    def write(self, text):
        raise UnicodeEncodeError("charmap", text, 0, 1, "character maps to <undefined>")


def test_results_are_written_before_they_are_printed(finished_run, tmp_path):
    with redirect_stdout(Unprintable()), redirect_stderr(io.StringIO()):
        eval_command([str(finished_run), "--steps", "1", "--samples", "2", "--output", "e.json"])
        sample_command([str(finished_run), "a cat", "--num_steps", "1", "--samples", "1"])
    assert {path.name for path in tmp_path.iterdir()} == {"e.json", "sample.png"}


def test_what_cannot_be_printed_is_replaced(finished_run):
    "In a process of its own, as the output of this one belongs to pytest"
    words = ["eval", str(finished_run), "--steps", "1", "--samples", "2", "--output", "e.json"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "sdpo_nb.cli", *words]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0 and Path("e.json").is_file(), done.stderr
    assert b"?=1" in done.stdout and b"gain \xb1 se" in done.stdout  # \N{GREEK SMALL LETTER ETA} is not in cp1252


def test_the_module_is_a_command_too():
    for line, status in [("tiny --dry_run", 0), ("tinny", 2), ("eval nowhere", 2)]:
        done = subprocess.run([sys.executable, "-m", "sdpo_nb.cli", *line.split()], capture_output=True, text=True)
        assert done.returncode == status and ("trajectories per epoch" in done.stdout) == (status == 0)
    for line, status in [("train tiny --dry_run", 0), ("train tinny", 2), ("sample nowhere x", 2)]:
        assert cli.main(line.split()) == status


@pytest.mark.slow
def test_the_module_can_be_launched():
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "sdpo_nb.cli"]
    done = subprocess.run([*command, "tiny", "--dry_run"], capture_output=True, text=True)
    assert done.returncode == 0 and "trajectories per epoch" in done.stdout
    assert subprocess.run([*command, "tinny"], capture_output=True).returncode != 0


# --- notes


def notes(capfd):
    return [line for line in capfd.readouterr().err.splitlines() if "note: " in line]


def noted(policy, prompts):
    "What `_note_words` says"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        cli._note_words(policy, prompts)
    return [str(note.message) for note in found]


def test_unknown_words_are_noted_once():
    tiny, other = types.SimpleNamespace(name="tiny"), types.SimpleNamespace(name="./mine")
    assert noted(tiny, ["a red circle"]) == [] == noted(other, ["a cat"])
    (note,) = noted(tiny, ["a cat on a red background", "dogs", "a cat"])
    assert note.startswith("the embedded model does not know 'cat', 'dogs'; its captions are like ")
    (note,) = noted(tiny, [f"a {word}" for word in "bcdefghijkl"])
    assert "'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i' and 3 others" in note


def test_what_is_noted_while_training(capfd, monkeypatch):
    monkeypatch.setattr("sdpo_nb.trainer.Trainer.train", stop)
    assert train_command(["tiny", "--prompts", "animals", "--output_dir", "run"]) == 130
    (note,) = notes(capfd)
    assert note.startswith("sdpo-train: note: the embedded model does not know 'cat', 'dog', ") and "others" in note
    assert train_command(["tiny", "--output_dir", "run"]) == 130
    assert notes(capfd) == []


def test_a_yaml_file_needs_no_preset(tmp_path, capfd):
    (tmp_path / "mine.yaml").write_text("epochs: 7\nprompts: animals\n")
    assert train_command(["--config", "mine.yaml", "--dry_run"]) == 0
    page = capfd.readouterr().out
    assert "7 epochs" in page and "45 prompts" in page
    (tmp_path / "spo.yaml").write_text("recipe: spo\ncandidates: 2\n")
    assert train_command(["--config", "spo.yaml", "--dry_run"]) == 0


def test_a_preset_for_several_gpus_says_how_to_use_them(capfd, monkeypatch):
    hint = (
        "is meant for 4 GPUs, and this is one process; to use them all: accelerate launch --num_processes 4 -m sdpo_nb"
    )
    monkeypatch.setattr("sdpo_nb.rewards.get_reward", None)
    assert train_command(["sd_turbo_aesthetic_4x24gb", "--dry_run"]) == 0
    assert hint in capfd.readouterr().out
    with pytest.raises(TypeError):
        train_command(["sd_turbo_aesthetic_4x24gb"])
    assert hint in capfd.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert train_command(["sd_turbo_aesthetic_4x24gb", "--dry_run"]) == 0
    assert hint not in capfd.readouterr().out


def test_variant_and_policy_reach_the_model(small, finished_run, capfd, monkeypatch):
    asked = []

    def load_policy(place, **options):
        asked.append((place, options.get("variant")))
        raise OSError("enough")

    monkeypatch.setattr("sdpo_nb.models.load_policy", load_policy)
    assert train_command([*small, "--policy", "./half/", "--variant", "fp16", "--output_dir", "run"]) == 1
    assert eval_command([str(finished_run), "--policy", "./half", "--variant", "fp16"]) == 1
    assert sample_command([str(finished_run), "a cat", "--variant", "fp16"]) == 1
    assert sample_command([str(finished_run), "a cat"]) == 1
    assert [variant for _, variant in asked] == ["fp16"] * 3 + [None] and [place for place, _ in asked[:2]] == [
        "./half"
    ] * 2


def test_bugs_keep_their_traceback(small, monkeypatch):
    def bug(self):
        return {}["a bug"]

    monkeypatch.setattr("sdpo_nb.trainer.Trainer.train", bug)
    with pytest.raises(KeyError):
        train_command(small)


def test_warnings_become_notes(capfd):
    assert run_command("sdpo-try", lambda: warnings.warn("timestep_spacing changed.")) == 0
    assert said(capfd) == "sdpo-try: note: timestep_spacing changed.\n"


# --- plans and help


@pytest.mark.parametrize(
    "words", [["--dry_run"], ["--dry_run", "true"], ["--dry_run=True"], ["--dry_run", "--seed", "3"]]
)
def test_dry_run(words, small, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("sdpo_nb.models.load_policy", None)
    assert train_command([*small, *words, "--epochs", "5"]) == 0
    output, errors = capfd.readouterr()
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert errors == "" and not list(tmp_path.iterdir())
    assert {"4 trajectories per epoch", "20 trajectories in total", "10 optimizer steps in total"} <= {*lines}
    assert {"50 reward queries in total, at most", "2 samples of a forward pass"} <= {*lines}


def test_the_plan_is_said_before_anything_is_loaded(capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("sdpo_nb.models.load_policy", None)
    monkeypatch.setattr("sdpo_nb.rewards.get_reward", None)
    assert train_command(["sd_turbo_aesthetic_4x24gb"]) == 2
    assert "which 3 processes cannot share in micro-batches of 4; choose a multiple of 12." in said(capfd)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(TypeError):
        train_command(["sd_turbo_aesthetic_4x24gb"])  # it gets as far as loading
    line = "an update = 4 processes × 4 passes × 4 pairs; 100 updates an epoch, 10,000 updates in all"
    assert line in capfd.readouterr().out
    assert train_command(["tiny", "--policy", "./mine", "--dry_run"]) == 0
    assert " 16 samples of a forward pass" in capfd.readouterr().out  # 32 pairs, four processes


def test_training_agrees_with_its_plan(finished_run, small, capfd):
    train_command([*small, "--epochs", "2", "--dry_run"])
    plan = [" ".join(line.split()) for line in capfd.readouterr().out.splitlines()]
    last = read_jsonl(finished_run / "metrics.jsonl")[-1]
    assert f"{last['samples']} trajectories in total" in plan
    assert f"{last['reward_queries']} reward queries in total, at most" in plan
    assert f"{last['optimizer_steps']} optimizer steps in total" in plan


def test_help_and_mistakes_need_no_large_library():
    "Also where the page goes to a file that knows no Greek"
    code = """
        import io, sys
        from sdpo_nb.cli import eval_command, sample_command, train_command
        for command in (train_command, eval_command, sample_command):
            try:
                command(["--help"])
            except SystemExit as stop:
                assert not stop.code
        for words in ("tinny", "tiny --epochs 0", "tiny --candidates 2", "tiny --eta x", "--resume nowhere"):
            assert train_command(words.split()) == 2
        assert not {"torch", "numpy", "diffusers", "transformers"} & sys.modules.keys()
    """
    code = "\n".join(line[8:] for line in code.splitlines())
    environment = {"PYTHONIOENCODING": "ascii", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stderr.count("\n") == 5, done.stderr
    page = done.stdout
    assert page.count("usage: sdpo-") == 3 and all(f"  --{f.name} " in page for f in fields(TrainConfig))
    assert "of the paper: step i weighs" in page and f"default: {TrainConfig.learning_rate}" in page


# --- whole runs


def test_a_resumed_run_equals_an_unbroken_one(small, finished_run, tmp_path, capfd):
    assert train_command([*small, "--output_dir", "broken", "--epochs", "1"]) == 0
    assert train_command(["tiny", "--resume", "broken", "--epochs", "2", "--output_dir", "broken"]) == 0
    folders = (finished_run, tmp_path / "broken")
    means = [[line["reward/mean"] for line in read_jsonl(folder / "metrics.jsonl")] for folder in folders]
    assert means[0] == means[1] and len(means[0]) == 2
    assert read_json(tmp_path / "broken" / "config.json")["prompts"] == ["a cat", "a dog"]
    output = capfd.readouterr().out
    assert [place for place in ("broken", "broken/report.html", "broken/lora") if f"{place}\n" not in output] == []


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--num_steps", "5"], ["num_steps is 5", "started with 3"]),
        (["--output_dir", "other"], ["output_dir", "'other'"]),
        (["--reward", "warmth"], ["reward", "warmth", "colorfulness"]),
        (["--candidates", "3"], ["candidates", "'sdpo' does not use"]),
    ],
)
def test_a_resumed_run_stays_the_same_run(words, parts, finished_run, capfd):
    before = {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}
    assert train_command(["--resume", str(finished_run), "--epochs", "3", *words]) == 2
    line = said(capfd)
    assert all(part in line for part in parts), line
    assert before == {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "text, words, parts",
    [
        ("epochs: 5\nlearning_rate: 2e-3\nqueries: 3\ngamma:\n", [], ["20 trajectories in total", "50 reward queries"]),
        ("epochs: 5\n", ["--epochs", "3"], ["12 trajectories in total"]),
        ("num_steps: 3\ngamma: 0.5\n", ["--gamma", "none", "--epochs", "3"], ["12 trajectories in total"]),
    ],
)
def test_yaml_settings(text, words, parts, small, tmp_path, capfd):
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    assert train_command([*small, "--config", "mine.yaml", "--dry_run", *words]) == 0
    page = " ".join(capfd.readouterr().out.split())
    assert all(part in page for part in parts), page


def test_evaluation_of_a_run(finished_run, tmp_path, capfd):
    assert eval_command([str(finished_run), "--steps", "1,2", "--output", "new/table.json"]) == 0
    output, errors = capfd.readouterr()
    assert "gain ± se" in output and output.endswith("table.json\n") and not errors
    mine, stored = read_json(tmp_path / "new" / "table.json"), read_json(finished_run / "evaluation.json")
    assert mine["steps"] == [1, 2] and mine["n"] == stored["n"] == 4
    for part in ("before", "after"):
        assert mine[part]["mean"] == pytest.approx(stored[part]["mean"][:2], rel=1e-4)


@pytest.mark.parametrize("text", [None, "{", "[1]", "{}"])
@pytest.mark.parametrize("own", [False, True])
def test_a_missing_or_damaged_evaluation_of_a_run_is_replaced(tmp_path, text, own):
    "Also by the table of the own scheduler: the report reads the first table before it reads the second"
    place = tmp_path / "evaluation.json"
    if text:
        place.write_text(text)
    assert cli._with_other_table(place, {"steps": [1]}, [(tmp_path / "lora", 1.0)], own) == {"steps": [1]}


def test_the_table_of_another_scale_or_several_loras_stands_alone(tmp_path):
    "What lies beside was measured with the LoRA of the run as it was trained"
    place, lora = tmp_path / "evaluation.json", (tmp_path / "lora", 1.0)
    place.write_text('{"steps": [4], "own_scheduler": {"steps": [2]}}')
    for loras in ([(tmp_path / "lora", 0.5)], [lora, lora], [(tmp_path / "other" / "lora", 1.0)]):
        assert cli._with_other_table(place, {"steps": [1]}, loras, False) == {"steps": [1]}
    whole = cli._with_other_table(place, {"steps": [1]}, [lora], False)
    assert whole == {"steps": [1], "own_scheduler": {"steps": [2]}}


def test_evaluation_of_a_lora_file(finished_run, small, capfd):
    lora = str(next((finished_run / "lora").glob("*.safetensors")))
    words = [lora, *small[1:5], "--reward", "-1*warmth", "--steps", "2", "--samples", "3", "--own_scheduler"]
    assert eval_command(words) == 0
    assert "-1*warmth, 3 fixed pairs of prompt and noise, DDIMScheduler" in capfd.readouterr().out


def test_samples(finished_run, tmp_path, capfd):
    words = [str(finished_run), "a cat", "--samples", "3", "--num_steps", "2"]
    assert sample_command(words) == 0
    output, errors = capfd.readouterr()
    assert output == "sample.png\n" and not errors
    for name, more in dict(again=[], base=["--scale", "0"], own=["--own_scheduler"]).items():
        assert sample_command([*words, *more, "--output", f"{name}.png"]) == 0
    pictures = {path.stem: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert set(pictures) == {"sample", "again", "base", "own"} == {path.stem for path in tmp_path.iterdir()}
    assert pictures["sample"] == pictures["again"] != pictures["own"]
    assert Image.open(tmp_path / "sample.png").size == (260, 260)


@pytest.mark.parametrize("words", [["--own_scheduler", "a cat"], ["--", "--a cat"]])
def test_words_around_the_prompt(words, finished_run, tmp_path):
    assert sample_command([str(finished_run), "--samples", "1", "--num_steps", "1", *words]) == 0
    assert (tmp_path / "sample.png").is_file()
