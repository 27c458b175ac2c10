"""The three commands: what they do with good input, and one sentence, the right exit status and a clean disk with any other."""

import re
import subprocess
import sys
import warnings
from dataclasses import fields

import pytest
from PIL import Image

import sdpo_nb.trainer as trainer_module
from sdpo_nb.cli import eval_command, run_command, sample_command, train_command
from sdpo_nb.config import TrainConfig
from sdpo_nb.files import read_json, read_jsonl
from random_pipelines import random_stable_diffusion

SIZES = "--num_steps 3 --pairs_per_epoch 2 --pairs_per_update 2 --micro_batch 1 --min_count 2 --buffer_size 4 --eval_samples 4 --reward colorfulness".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A folder with a random pipeline in it, and a prompt file beside it"
    folder = tmp_path_factory.mktemp("model")
    random_stable_diffusion(folder / "pipeline")
    (folder / "prompts.txt").write_text("a cat\na dog\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def small(model):
    "Words of a command line that trains in seconds"
    return ["tiny", "--policy", str(model / "pipeline"), "--prompts", str(model / "prompts.txt"), *SIZES]


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    "A finished run of two epochs"
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train_command([*small, "--epochs", "2", "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    "Every test starts in an empty folder"
    monkeypatch.chdir(tmp_path)


def sentence(capfd):
    "The one line on stderr; nothing else may be there, but for the plan that is printed before anything is loaded"
    output, errors = capfd.readouterr()
    assert (
        re.fullmatch(r"(\d+ pairs an epoch; an update = .*\n)?", output)
        and errors.count("\n") == 1
        and "Traceback" not in errors
    ), errors
    return errors


@pytest.mark.parametrize(
    "words, status, parts",
    [
        ("", 2, ["PRESET", "tiny", "--resume"]),
        ("tinny", 2, ["preset", "'tinny'", "did you mean 'tiny'"]),
        ("tiny more", 2, ["more", "--help"]),
        ("tiny --epoch 3", 2, ["--epoch;", "--epochs"]),
        ("tiny --learning-rate 0.1", 2, ["--learning-rate", "--learning_rate"]),
        ("tiny --xyzzy=3", 2, ["--xyzzy", "--help"]),
        ("tiny --epochs", 2, ["epochs", "no value", "--epochs N"]),
        ("tiny --epochs 1.5", 2, ["epochs", "'1.5'", "whole number"]),
        ("tiny --epochs 0", 2, ["epochs is 0", "from 1"]),
        ("tiny --learning_rate nan", 2, ["learning_rate is nan", "above 0"]),
        ("tiny --learning_rate -inf", 2, ["learning_rate is -inf"]),
        ("tiny --learning_rate -1e-3", 2, ["learning_rate is -0.001"]),
        ("tiny --gamma 2", 2, ["gamma is 2.0", "from 0 to 1"]),
        ("tiny --eta 0", 2, ["eta is 0"]),
        ("tiny --divide_by_std=maybe", 2, ["divide_by_std", "'maybe'", "true or false"]),
        ("tiny --dry_run maybe", 2, ["dry_run", "'maybe'", "true or false"]),
        ("tiny --train_last_step maybe", 2, ["train_last_step", "'maybe'", "true or false"]),
        ("tiny --train_last_step maybe --epochs 3", 2, ["train_last_step", "'maybe'", "true or false"]),
        ("tiny --reward= --dry_run", 2, ["reward ''"]),
        ("tiny --queries 4", 2, ["queries", "'4'", "terminal"]),
        ("tiny --recipe sdpp", 2, ["recipe", "'sdpp'", "'sdpo'"]),
        ("tiny --normalizer stepprompt", 2, ["normalizer", "'step_prompt'"]),
        ("tiny --pairs_per_update 5", 2, ["pairs_per_update is 5", "divisor"]),
        ("tiny --micro_batch 5", 2, ["micro_batch is 5", "divisor"]),
        ("tiny --num_steps 1", 2, ["num_steps is 1", "causal"]),
        ("tiny --prompts nowhere.txt", 2, ["prompts", "'nowhere.txt'", "text file"]),
        ("tiny --reward beauty", 2, ["'beauty'", "warmth"]),
        ("tiny --reward 0.5*warmth+", 2, ["reward", "mixture"]),
        ("tiny --reward 0.5*warmth-1*beauty", 2, ["'beauty'"]),
        ("tiny --config nowhere.yaml", 2, ["config", "'nowhere.yaml'"]),
        ("tiny --resume nowhere", 2, ["resume", "'nowhere'", "run"]),
        ("--resume .", 2, ["resume", "'.'", "run"]),
        ("tiny --policy ./nowhere", 1, ["policy", "./nowhere", "folder"]),
    ],
)
def test_bad_training_command(words, status, parts, capfd, tmp_path):
    assert train_command(words.split()) == status
    said = sentence(capfd)
    assert said.startswith("sdpo-train: ") and all(part in said for part in parts), said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, parts",
    [
        ("", ["RUN_OR_LORA", "--help"]),
        ("nowhere", ["RUN_OR_LORA", "'nowhere'"]),
        ("RUN --steps 1,,2", ["steps", "whole number"]),
        ("RUN --steps 0", ["steps is 0"]),
        ("RUN --samples 0", ["samples is 0"]),
        ("RUN --eta nan", ["eta is nan"]),
        ("RUN --reward beauty", ["'beauty'"]),
        ("RUN --prompts nowhere.txt", ["'nowhere.txt'"]),
        ("RUN --output new/table.csv", ["output", ".json"]),
        ("LORA", ["prompts is missing", "--prompts"]),
        ("LORA --prompts shapes", ["policy is missing", "--policy"]),
        ("LORA --prompts shapes --policy tiny", ["reward is missing", "--reward"]),
    ],
)
def test_bad_evaluation_command(words, parts, run, capfd, tmp_path):
    assert (
        eval_command(
            [
                {"RUN": str(run), "LORA": str(run / "lora" / "pytorch_lora_weights.safetensors")}.get(word, word)
                for word in words.split()
            ]
        )
        == 2
    )
    said = sentence(capfd)
    assert said.startswith("sdpo-eval: ") and all(part in said for part in parts), said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, parts",
    [
        (["RUN"], ["PROMPT"]),
        (["RUN", "a cat", "--num_steps", "0"], ["num_steps is 0"]),
        (["RUN", "a cat", "--samples", "-1"], ["samples is -1"]),
        (["RUN", "a cat", "--scale", "inf"], ["scale is inf"]),
        (["RUN", "a cat", "--output", "cat.jpg"], ["output", "cat.jpg", ".png"]),
        (["RUN", "a cat", "--sample", "3"], ["--sample;", "--samples"]),
    ],
)
def test_bad_sampling_command(words, parts, run, capfd, tmp_path):
    assert sample_command([str(run) if word == "RUN" else word for word in words]) == 2
    said = sentence(capfd)
    assert said.startswith("sdpo-sample: ") and all(part in said for part in parts), said
    assert not list(tmp_path.iterdir())


def test_output_folder_is_protected(run, small, tmp_path, capfd):
    before = sorted(run.rglob("*"))
    assert train_command([*small, "--output_dir", str(run)]) == 2
    assert "output_dir" in sentence(capfd) and sorted(run.rglob("*")) == before
    (tmp_path / "file").write_text("precious")
    assert train_command([*small, "--output_dir", "file"]) == 2
    assert "output_dir" in sentence(capfd)
    assert train_command([*small, "--output_dir", "file/deeper"]) == 2
    assert "is not a folder" in sentence(capfd) and (tmp_path / "file").read_text() == "precious"


def test_damaged_weights(model, small, tmp_path, capfd):
    random_stable_diffusion(tmp_path / "damaged")
    weights = tmp_path / "damaged" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    capfd.readouterr()
    assert train_command([*small, "--policy", str(tmp_path / "damaged")]) == 1
    assert str(weights) in sentence(capfd)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_a_failure_in_the_first_epoch_leaves_no_folder(small, tmp_path, capfd, monkeypatch):
    def fail(self, rollout):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(trainer_module.Trainer, "credit", fail)
    assert train_command([*small, "--eval_samples", "0", "--output_dir", "run"]) == 1
    assert train_command([*small, "--eval_samples", "0", "--output_dir", "new/folders/run"]) == 1
    assert not list(tmp_path.iterdir())
    assert "out of memory; lower micro_batch" in capfd.readouterr().err


def test_a_failure_in_the_first_epoch_keeps_what_was_there(small, tmp_path, capfd, monkeypatch):
    def fail(self, rollout):
        raise RuntimeError("no")

    monkeypatch.setattr(trainer_module.Trainer, "credit", fail)
    (tmp_path / "mine" / "run").mkdir(parents=True)
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    assert train_command([*small, "--eval_samples", "0", "--output_dir", "mine/run"]) == 1
    assert sorted(path.name for path in (tmp_path / "mine").rglob("*")) == ["notes.txt", "run"]


def no_space(self):
    raise OSError(28, "No space left on device", "a file")


def overflow(self):
    raise FloatingPointError("overflow")


def stop(self):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "method, failure, status",
    [("save_checkpoint", no_space, 1), ("train_epoch", overflow, 1), ("save_checkpoint", stop, 130)],
)
def test_every_failure_before_the_first_epoch_leaves_no_folder(
    method, failure, status, small, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(trainer_module.Trainer, method, failure)
    assert train_command([*small, "--eval_samples", "0", "--output_dir", "runs/run"]) == status
    assert "resume" not in sentence(capfd) and not list(tmp_path.iterdir())


def test_a_folder_that_others_have_filled_is_left_alone(small, tmp_path, capfd, monkeypatch):
    check = trainer_module.check_output

    def late(folder):
        if monkeypatch.calls:
            (folder / "theirs").mkdir(parents=True)  # between our check and our first file
        monkeypatch.calls += 1
        return check(folder)

    monkeypatch.calls = 0
    monkeypatch.setattr(trainer_module, "check_output", late)
    assert train_command([*small, "--eval_samples", "0", "--output_dir", "run"]) == 2
    assert "output_dir" in sentence(capfd) and [path.name for path in (tmp_path / "run").iterdir()] == ["theirs"]


def test_interruption_says_how_to_go_on(small, tmp_path, capfd, monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trainer_module.Trainer, "train_epoch", interrupt)
        assert train_command([*small, "--eval_samples", "0", "--epochs", "1", "--output_dir", "run"]) == 130
    assert sentence(capfd) == "sdpo-train: interrupted; go on with sdpo-train --resume run\n"
    assert train_command(["--resume", "run"]) == 0
    assert (tmp_path / "run" / "lora").is_dir()


def test_bugs_keep_their_traceback(small, monkeypatch):
    def bug(self):
        return {}["a bug"]

    monkeypatch.setattr(trainer_module.Trainer, "train", bug)
    with pytest.raises(KeyError):
        train_command(small)


@pytest.mark.parametrize(
    "words", [["--dry_run"], ["--dry_run", "true"], ["--dry_run=True"], ["--dry_run", "--seed", "3"]]
)
def test_dry_run(words, small, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("sdpo_nb.models.load_policy", None)
    assert train_command([*small, *words, "--epochs", "5"]) == 0
    output, errors = capfd.readouterr()
    assert errors == "" and not list(tmp_path.iterdir())
    for line in (
        "4 trajectories per epoch",
        "20 trajectories in total",
        "50 reward queries in total, at most",
        "10 optimizer steps in total",
        "2 samples of a forward pass",
    ):
        assert any(" ".join(found.split()) == line for found in output.splitlines()), output


def test_training_agrees_with_its_plan(run, small, capfd):
    train_command([*small, "--epochs", "2", "--dry_run", "--output_dir", "new"])
    plan = [" ".join(line.split()) for line in capfd.readouterr().out.splitlines()]
    last = read_jsonl(run / "metrics.jsonl")[-1]
    assert f"{last['samples']} trajectories in total" in plan
    assert f"{last['reward_queries']} reward queries in total, at most" in plan
    assert f"{last['optimizer_steps']} optimizer steps in total" in plan


def test_every_field_is_a_flag_with_an_explanation(capfd):
    with pytest.raises(SystemExit) as stop:
        train_command(["--help"])
    page = capfd.readouterr().out
    assert not stop.value.code and all(f"--{field.name} " in page for field in fields(TrainConfig))
    assert "λ of the paper" in page and f"default: {TrainConfig.learning_rate}" in page


@pytest.mark.parametrize("command", [train_command, eval_command, sample_command])
def test_help_needs_no_diffusion_library(command):
    code = (
        f'import sys; sys.modules["diffusers"] = sys.modules["transformers"] = None\n'
        f'from sdpo_nb.cli import {command.__name__} as command; command(["--help"])'
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage:") and not done.stderr, done.stderr


def test_mistakes_in_settings_are_found_before_anything_is_loaded():
    code = (
        'import sys; sys.modules["diffusers"] = sys.modules["transformers"] = None\n'
        "from sdpo_nb.cli import train_command\n"
        'for words in ("tinny", "tiny --epochs 0", "tiny --prompts nowhere", "tiny --micro_batch 5", "--resume nowhere"):\n'
        "    assert train_command(words.split()) == 2"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("\n") == 5, done.stderr


def test_run_folder_and_summary(run, model, capfd):
    assert train_command(["--resume", str(run)]) == 0
    output = capfd.readouterr().out
    for name in ("run", "report.html", "lora"):
        assert f"{run if name == 'run' else run / name}\n" in output
    assert "gain ± se" in output and "DDIMScheduler" in output
    for name in ("config.json", "metrics.jsonl", "evaluation.json", "checkpoints", "lora", "report.html", "README.md"):
        assert (run / name).exists()
    assert read_json(run / "config.json")["prompts"] == ["a cat", "a dog"]


def test_nothing_but_results_is_printed(small):
    code = f"import sys; from sdpo_nb.cli import train_command; sys.exit(train_command({[*small, '--epochs', '1', '--eval_samples', '0', '--output_dir', 'run']}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    plan, *lines = done.stdout.splitlines()
    assert (
        plan.startswith("2 pairs an epoch; an update = 1 process × 2 passes × 1 pair; ")
        and lines[0].startswith("epoch 1/1 ")
        and len(lines) == 4
    )


def test_resumed_run_equals_an_unbroken_one(small, run, tmp_path):
    words = [*small, "--output_dir", "broken"]
    assert train_command([*words, "--epochs", "1"]) == 0
    assert train_command(["tiny", "--resume", "broken", "--epochs", "2", "--output_dir", "broken"]) == 0
    means = [
        [line["reward/mean"] for line in read_jsonl(folder / "metrics.jsonl")] for folder in (run, tmp_path / "broken")
    ]
    assert means[0] == means[1] and len(means[0]) == 2


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--num_steps", "5"], ["num_steps is 5", "started with 3"]),
        (["--output_dir", "other"], ["output_dir", "'other'"]),
        (["--reward", "warmth"], ["reward", "warmth", "colorfulness"]),
    ],
)
def test_a_resumed_run_stays_the_same_run(words, parts, run, capfd):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert train_command(["--resume", str(run), "--epochs", "3", *words]) == 2
    said = sentence(capfd)
    assert all(part in said for part in parts), said
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "text, words, parts",
    [
        ("epochs: 5\nlearning_rate: 2e-3\nqueries: 3\ngamma:\n", [], ["20 trajectories in total", "50 reward queries"]),
        ("epochs: 5\n", ["--epochs", "3"], ["12 trajectories in total"]),
    ],
)
def test_yaml_settings(text, words, parts, small, tmp_path, capfd):
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    assert train_command([*small, "--config", "mine.yaml", "--dry_run", *words]) == 0
    page = " ".join(capfd.readouterr().out.split())
    assert all(part in page for part in parts), page


@pytest.mark.parametrize(
    "text, part",
    [
        ("epoch: 5", "did you mean 'epochs'"),
        ("epochs: [1]", "whole number"),
        ("epochs: true", "whole number"),
        ("just words", "field: value"),
        ("a: [", "YAML"),
        ("train_last_step: 1", "true or false"),
    ],
)
def test_bad_yaml(text, part, tmp_path, capfd):
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    assert train_command(["tiny", "--config", "mine.yaml"]) == 2
    assert part in sentence(capfd)


def test_evaluation_of_a_run(run, tmp_path, capfd):
    assert eval_command([str(run), "--steps", "1,2", "--output", "new/table.json"]) == 0
    output, errors = capfd.readouterr()
    assert "gain ± se" in output and output.endswith("table.json\n") and not errors
    mine, stored = read_json(tmp_path / "new" / "table.json"), read_json(run / "evaluation.json")
    assert mine["steps"] == [1, 2] and mine["n"] == stored["n"] == 4
    assert mine["before"]["mean"] == pytest.approx(stored["before"]["mean"][:2], rel=1e-4)
    assert mine["after"]["mean"] == pytest.approx(stored["after"]["mean"][:2], rel=1e-4)


def test_evaluation_of_a_lora_file(run, model, capfd):
    lora = next((run / "lora").glob("*.safetensors"))
    words = [
        str(lora),
        "--policy",
        str(model / "pipeline"),
        "--reward",
        "-1*warmth",
        "--prompts",
        str(model / "prompts.txt"),
        "--steps",
        "2",
        "--samples",
        "3",
    ]
    assert eval_command([*words, "--own_scheduler"]) == 0
    assert "-1*warmth, 3 fixed pairs of prompt and noise, DDIMScheduler" in capfd.readouterr().out


def test_samples(run, tmp_path, capfd):
    words = [str(run), "a cat", "--samples", "3", "--num_steps", "2"]
    assert sample_command([*words]) == 0
    output, errors = capfd.readouterr()
    assert output == "sample.png\n" and not errors
    assert (
        sample_command([*words, "--output", "again.png"])
        == sample_command([*words, "--scale", "0", "--output", "base.png"])
        == 0
    )
    assert sample_command([*words, "--own_scheduler", "--output", "own.png"]) == 0
    pictures = {path.stem: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert set(pictures) == {"sample", "again", "base", "own"} == {path.stem for path in tmp_path.iterdir()}
    assert pictures["sample"] == pictures["again"] != pictures["own"]
    assert Image.open(tmp_path / "sample.png").size == (260, 260)


def test_flags_may_stand_before_the_prompt(run, tmp_path):
    assert sample_command([str(run), "--samples", "1", "--num_steps", "1", "--own_scheduler", "a cat"]) == 0
    assert (tmp_path / "sample.png").is_file()


def test_a_prompt_that_looks_like_a_flag(run, tmp_path):
    assert sample_command([str(run), "--samples", "1", "--num_steps", "1", "--", "--a cat"]) == 0
    assert (tmp_path / "sample.png").is_file()


def test_warnings_become_notes(capfd):
    assert run_command("sdpo-try", lambda: warnings.warn("timestep_spacing changed.")) == 0
    assert sentence(capfd) == "sdpo-try: note: timestep_spacing changed.\n"
