"""Prompts from every source, and one sentence for what cannot be read."""

import json
import sys
import types
from pathlib import Path

import pytest

import sdpo_nb.prompts as prompts_module
from sdpo_nb.prompts import animals, dataset_column, load_prompts, prompt_lists, unknown_words


def test_lists_that_come_along():
    assert len(animals) == len(set(animals)) == 45
    for name, prompts in prompt_lists.items():
        assert load_prompts(name) == load_prompts(prompts) == load_prompts(list(prompts)) == list(prompts)
        assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize(
    "data, prompts",
    [
        ("a cat\n\n  a dög \n".encode(), ["a cat", "a dög"]),
        ("\ufeffa cat\r\na dög\r\n".encode(), ["a cat", "a dög"]),  # as Notepad saves it
        (b"one, two: three", ["one, two: three"]),
        ("one\u2028two\x85three\x0bfour\rfive".encode(), ["one\u2028two\x85three\x0bfour", "five"]),
        (b"[one], two\n{three|four}\n", ["[one], two", "{three|four}"]),
        (b'["one",\n "two "]', ["one", "two"]),  # JSON, whatever it is called
        (b'{"caption": "one", "id": 1}\n{"caption": "two"}\n', ["one", "two"]),
    ],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_text_files(data, prompts, kind, tmp_path):
    (tmp_path / "p.txt").write_bytes(data)
    assert load_prompts(kind(tmp_path / "p.txt")) == prompts


def test_what_is_no_list_of_prompts(tmp_path):
    for wrong in ("shape", tmp_path, "a" * 300, "a\0b", None, 3, 1.0, {"a cat"}, {"a": "cat"}, b"shapes"):
        with pytest.raises(ValueError, match="prompts is .*, neither a built-in list") as caught:
            load_prompts(wrong)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "half.json").write_text('["a \\ud83d cat"]')
    for wrong in (["\udcff"], str(tmp_path / "half.json")):
        with pytest.raises(ValueError, match="in which half a character stands"):
            load_prompts(wrong)
    for wrong in ([], [1], ["a", None], str(tmp_path / "empty.txt")):
        with pytest.raises(ValueError, match="at least one string"):
            load_prompts(wrong)
    (tmp_path / "latin.txt").write_bytes("a dög".encode("latin-1"))
    with pytest.raises(ValueError, match="which is not UTF-8 text; save it as UTF-8.$"):
        load_prompts(tmp_path / "latin.txt")


def test_a_csv_file(tmp_path):
    path = tmp_path / "my prompts.csv"
    path.write_text('id,caption\n1," a cat, sitting\non a mat "\n2,\n3,a dög\n', encoding="utf-8")
    assert load_prompts(f"dataset:{path}:caption") == ["a cat, sitting\non a mat", "a dög"]
    for source, sentence in [
        (f"dataset:{path}", "names no column"),
        (f"dataset:{path}:", "names no column"),
        ("dataset:nowhere.csv:caption", r"but 'nowhere.csv' cannot be read \(No such file or directory\)"),
        ("dataset:C:\\data\\p.csv:caption", r"but '.*data.*p.csv' cannot be read"),
    ]:
        with pytest.raises(ValueError, match=f"^prompts is .*{sentence}"):
            load_prompts(source)


@pytest.mark.parametrize("data", ["\ufeffcaption\na cat,one cell too many\na dog\n", "caption\na cat\na dog"])
def test_a_csv_file_as_excel_saves_it(data, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(data, encoding="utf-8")
    assert load_prompts(f"dataset:{path}:caption") == ["a cat", "a dog"]
    with pytest.raises(ValueError, match="no column 'text'; choose one of caption"):
        load_prompts(f"dataset:{path}:text")


LIST = ["a cat", "a dog\u2028on two lines", "[a bird:0.5], {sitting}"]
ROWS = [dict(id=i, caption=f" {prompt} ", note=None) for i, prompt in enumerate(LIST)] + [dict(id=3), dict(caption="")]


@pytest.mark.parametrize(
    "name, data",
    [
        ("p.json", json.dumps(LIST)),
        ("p.JSON", "\ufeff" + json.dumps(LIST, indent=1, ensure_ascii=False)),
        ("p.json", json.dumps(ROWS)),
        ("p.json", json.dumps(dict(prompts=LIST))),
        ("p.json", json.dumps(dict(caption=LIST, id=[1, 2]))),
        ("p.jsonl", "\n".join(map(json.dumps, LIST))),
        ("p.ndjson", "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
        ("p.csv", "id,caption\n" + "\n".join(f'{i}," {prompt}"' for i, prompt in enumerate(LIST))),
        ("p.CSV", "\ufeffText\r\n" + "\r\n".join(f'"{prompt}"' for prompt in LIST)),
        ("p.csv", "Nr;Bild\n" + "\n".join(f"{i};{prompt}" for i, prompt in enumerate(LIST))),
        ("p.tsv", "caption\tscore\n" + "\n".join(f"{prompt}\t0.5" for prompt in LIST)),
    ],
)
def test_known_structures_are_read(name, data, tmp_path):
    (tmp_path / name).write_text(data, encoding="utf-8", newline="")
    assert load_prompts(tmp_path / name) == load_prompts(str(tmp_path / name)) == LIST


@pytest.mark.parametrize(
    "name, data, sentence",
    [
        (
            "p.csv",
            "caption,style\na cat,oil\n",
            "has the columns caption, style; name one, as in dataset:.*p.csv:caption.",
        ),
        (
            "p.csv",
            "cat\ndog\n",
            "first line may be a header or a prompt; if 'cat' is a column, write dataset:.*p.csv:cat,",
        ),
        ("p.csv", "1,cat\n2,dog\n", "first line may be a header or a prompt"),
        ("p.csv", "caption,caption\na,b\n", "cannot be read as CSV .two columns have the same name"),
        ("p.csv", "id,size\n1,2\n", "has the columns id, size; name one"),
        ("p.csv", 'caption\n"' + "a" * 200_000 + '"\n', "cannot be read as CSV .field larger than field limit"),
        ("p.json", '["a cat",', "cannot be read as JSON .Expecting value: .*; mend it, or give lines in a .txt"),
        ("p.json", '["a cat", 3]', "cannot be read as JSON .neither a list of texts nor one of objects"),
        ("p.json", '{"a": {"b": 1}}', "neither a list of texts nor one of objects"),
        ("p.json", "[" * 100_000, "cannot be read as JSON"),
        ("p.jsonl", '{"caption": "a cat"}\na dog\n', "cannot be read as JSONL"),
        (
            "p.json",
            '[{"prompt": "a", "negative": "b"}]',
            "the columns prompt, negative; name one, as in dataset:.*:prompt.",
        ),
        ("p.parquet", "PAR1", "a table; name its column, as in dataset:.*p.parquet:caption"),
        ("p.csv", "caption\n", "at least one string"),
        ("p.csv", "", "at least one string"),
        ("p.json", "[]", "at least one string"),
        ("p.jsonl", "\n", "at least one string"),
    ],
)
def test_other_structures_are_refused(name, data, sentence, tmp_path):
    (tmp_path / name).write_text(data, encoding="utf-8")
    with pytest.raises(ValueError, match=f"^prompts .*{sentence}") as caught:
        load_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, data", [("p.JSON", json.dumps(ROWS)), ("p.Tsv", "id\tcaption\n1\ta cat\n"), ("p:1.csv", "caption\na\n")]
)
def test_columns_of_every_table(name, data, tmp_path):
    (tmp_path / name).write_text(data, encoding="utf-8")
    assert load_prompts(f"dataset:{tmp_path / name}:caption")[0] in ("a cat", "a")
    with pytest.raises(ValueError, match="has no column 'text'; choose one of .*caption"):
        load_prompts(f"dataset:{tmp_path / name}:text")
    (tmp_path / "list.json").write_text('["a cat"]')
    with pytest.raises(ValueError, match="which has no columns; give .*list.json alone"):
        load_prompts(f"dataset:{tmp_path}/list.json:caption")


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "p.csv").write_text("caption\na cat\n")
    assert (
        load_prompts("~/p.csv") == load_prompts(Path("~/p.csv")) == load_prompts("dataset:~/p.csv:caption") == ["a cat"]
    )


class Table:
    "What `datasets.load_dataset` returns, as far as we look"

    column_names = ["caption", "score"]

    def __getitem__(self, name):
        return {"caption": ["a cat ", "", None, "a dog"], "score": [1, 2, 3]}[name]


@pytest.fixture
def asked(monkeypatch):
    "What a stand-in for `datasets` was asked for"
    found = []

    def load_dataset(place, split, data_files=None):
        found.append((place, split) if data_files is None else (place, data_files))
        if place == "me/gone":
            raise ConnectionError("Couldn't reach the Hub\nmore")
        return Table()

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(prompts_module, "find_spec", lambda name: True)
    return found


def test_a_dataset(asked):
    for source in ("dataset:me/pictures:caption", "dataset:me/pictures:caption:test"):
        assert load_prompts(source) == ["a cat", "a dog"]
    assert asked == [("me/pictures", "train"), ("me/pictures", "test")]
    assert load_prompts("dataset:./p.parquet:caption") == ["a cat", "a dog"] and asked[-1] == ("parquet", "./p.parquet")


@pytest.mark.parametrize(
    "source, sentence",
    [
        ("me/pictures:title", "no column 'title'; choose one of caption, score"),
        ("me/pictures:score", "column 'score' does not hold texts alone"),
        ("me/gone:caption", r"cannot be loaded \(ConnectionError: Couldn't reach the Hub\); check name and split"),
    ],
)
def test_a_dataset_that_does_not_serve(source, sentence, asked):
    with pytest.raises(ValueError, match=sentence) as caught:
        dataset_column(f"dataset:{source}")
    assert "\n" not in str(caught.value)


def test_datasets_is_not_installed(monkeypatch):
    monkeypatch.setattr(prompts_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package datasets; install it with"):
        load_prompts("dataset:me/pictures:caption")


def test_words_of_another_world():
    captions = [caption for name in ("shapes", "shapes_all") for caption in prompt_lists[name]]
    assert unknown_words([*captions, "A RED circle, on gray", "", "_ . -"]) == []
    assert unknown_words(["A cat, a dög", "3 cats", "a dog", "cat"]) == ["cat", "dög", "3", "cats", "dog"]
