"""Numbers with an interval in the text of a page stand in an output, of that page or of one that it links to."""

import json
import re
from functools import cache
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parent.parent / "nbs"
INTERVAL = re.compile(r"(\d*\.?\d+)[ %]*± ?(\d*\.?\d+)")
NOT_TEXT = re.compile(r"```.*?```|<details>.*?</details>|\$[^$]*\$", flags=re.DOTALL)
QUESTIONS = re.compile(r"^## (Exercises?|Check yourself)$", flags=re.MULTILINE)
CHECKED_THERE = {  # pages whose figures or hidden cells hold these, and check them
    "60_baselines": {(".05", ".03"), (".73", ".08"), (".14", ".07")},
    "61_results": {(".51", ".43")},
}


def intervals(text):
    "(value, half-width) as written, without leading zeros"
    return {tuple(number.lstrip("0") or "0" for number in found.groups()) for found in INTERVAL.finditer(text)}


@cache
def cells(name):
    return json.loads((NBS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


@cache
def shown(name):
    "The intervals in the outputs of a page"
    outputs = [output for cell in cells(name) for output in cell.get("outputs", [])]
    texts = [output.get("text", []) for output in outputs]
    texts += [text for output in outputs for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return intervals("\n".join("".join(text) for text in texts)) | CHECKED_THERE.get(name, set())


def claims(name):
    "(paragraph, its intervals): what the text of a page says, exercises and questions left out"
    for cell in cells(name):
        if cell["cell_type"] != "markdown" or re.match(r"\*\*\d\.", source := "".join(cell["source"])):
            continue
        for paragraph in re.split(r"\n\s*\n|\n(?=\* |- )", QUESTIONS.split(NOT_TEXT.sub("", source))[0]):
            if found := intervals(paragraph):
                yield paragraph, found


PAGES = [path.stem for path in sorted(NBS.glob("*.ipynb")) if any(claims(path.stem))]


def test_there_are_such_pages():
    assert {"29_branch", "36_frontier", "61_results"} <= {*PAGES}
    assert intervals("It gains 1.20 ± 0.30, or 3 % ± 12 %.") == {("1.20", ".30"), ("3", "12")}


@pytest.mark.parametrize("name", PAGES)
def test_intervals_of_the_text_stand_in_an_output(name):
    for paragraph, found in claims(name):
        linked = re.findall(r"\]\((\w+)\.ipynb", paragraph)
        known = shown(name).union(*map(shown, linked))
        assert found <= known, f"{sorted(found - known)} in: {paragraph[:200]}"
