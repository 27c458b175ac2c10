"""The notebook for Colab runs from top to bottom, as papermill runs it, on a narrow SD-Turbo with random weights."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch

NOTEBOOK = Path(__file__).resolve().parent.parent / "nbs" / "58_colab.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
SOURCES = ["".join(cell["source"]) for cell in CELLS]
PLACES = [place for place, cell in enumerate(CELLS) if "parameters" in cell["metadata"].get("tags", [])]
SMALL = dict(variant=None, reward_vae=None, reward="jpeg_compressibility", without_gpu=True, minutes=0.5)
SMALL |= dict(num_steps=3, pairs_per_epoch=4, pairs_per_update=2, most_epochs=2, eval_steps=[1, 2], eval_samples=4)


def names_set(code):
    "The names that a cell assigns"
    return {name.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Assign) for name in named(node)}


def named(assignment):
    "The names on the left of an assignment"
    return [node for target in assignment.targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def run(values, until=None):
    "Run all cells in the folder that is current, with parameters set below their cell; what is then defined"
    space = {}
    for place, code in enumerate(SOURCES[:until]):
        if not code.startswith("#| hide\n#| eval: false\n!"):  # acts on Colab only
            exec(compile(code, f"cell {place}", "exec"), space)
        if place in PLACES:
            space.update(values)
    return space


def test_one_cell_has_the_parameters():
    assert len(PLACES) == 1 and set(SMALL) | {"model", "output_dir"} <= names_set(SOURCES[PLACES[0]])


def test_nothing_is_shown_that_was_not_run():
    assert [cell["outputs"] for cell in CELLS if cell["outputs"]] == []
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert "has no saved outputs" in text and "nobody has run it with them yet" in text


def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch, random_folder, capsys):
    monkeypatch.chdir(tmp_path)
    model = random_folder("sd_turbo")
    space = run(SMALL | dict(model=str(model)))
    said = capsys.readouterr().out
    assert 1 <= space["config"].epochs <= 2 and space["metrics"]["epoch"] == space["config"].epochs
    assert re.search(r"\d epochs, about \d+\.\d minutes by this estimate", said)
    assert "gain ± se" in said and (tmp_path / "sdpo_lora.zip").is_file()
    assert torch.isfinite(torch.stack(list(space["after"].rewards))).all()
    for code in (
        code for code in SOURCES if "step_grid(" in code or "training_curves(" in code and "import" not in code
    ):
        last = ast.parse(code).body[-1]
        if isinstance(last, ast.Expr):
            assert eval(ast.unparse(last), space).axes  # a figure
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.load_lora_weights(tmp_path / "runs/colab/lora")


def place_of(words):
    "Which cell holds these words"
    return next(place for place, code in enumerate(SOURCES) if words in code)


def test_the_time_that_is_allowed_decides_how_long_it_trains():
    "For a GPU of which the page has measured that a call takes 40 ms and a picture's score 20 ms"
    space = run(dict(without_gpu=True), place_of("policy = "))
    space |= dict(call=0.04, decoding=0.2, scoring=0.02)
    epochs = []
    for space["minutes"] in (0.01, 5, 20, 1000):
        exec(SOURCES[place_of("epoch_seconds =")], space)
        epochs.append(space["config"].epochs)
    assert epochs[0] == 1 < epochs[1] < epochs[2] <= epochs[3] == space["most_epochs"]


def test_the_settings_that_stand_there_fit_a_t4(capsys):
    space = run(dict(without_gpu=True), place_of("policy = "))
    assert space["memory"]["in all, estimated"] < 14
    assert 5 < float(re.search(r"10 TFLOP/s: (\d+) minutes", capsys.readouterr().out)[1]) <= space["minutes"]


@pytest.mark.parametrize("gpu", [False, True])
def test_without_a_gpu_it_says_what_to_do(monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    place = place_of("raise RuntimeError")
    space = dict(torch=torch, without_gpu=False)
    if gpu:
        exec(SOURCES[place], space)
    else:
        with pytest.raises(RuntimeError, match="T4 GPU"):
            exec(SOURCES[place], space)
