"""Files are whole or absent, JSON is valid everywhere, and errors are sentences."""

import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from sdpo_nb import files
from sdpo_nb.files import append_jsonl, atomic_write, read_json, read_jsonl, read_results, write_json, write_jsonl


def test_replaces_the_content_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    assert atomic_write(path, "grün") == path and path.read_text(encoding="utf-8") == "grün"
    atomic_write(str(path), b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01" and os.listdir(path.parent) == ["file.txt"]


def test_a_failed_write_keeps_the_old_content(tmp_path, monkeypatch):
    path = atomic_write(tmp_path / "file.txt", "old")

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError):
        atomic_write(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


WRITER = """
import sys
from sdpo_nb.files import atomic_write
print("started", flush=True)
while True:
    for letter in "ab": atomic_write(sys.argv[1], letter * 200_000)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = atomic_write(tmp_path / "file.txt", "a" * 200_000)
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        writer.stdout.readline()
        for _ in range(20):
            text = path.read_text()
            assert text in ("a" * 200_000, "b" * 200_000)
        writer.send_signal(signal.SIGKILL) if hasattr(signal, "SIGKILL") else writer.kill()
        writer.wait()
        writer.stdout.close()
        assert path.read_text() in ("a" * 200_000, "b" * 200_000)


def test_files_get_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    assert atomic_write(tmp_path / "file", "").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_is_valid_for_every_reader(tmp_path):
    value = dict(
        inf=float("inf"),
        nan=np.float32("nan"),
        tensor=torch.tensor([1.0, torch.nan]),
        scalar=torch.tensor(3),
        steps=(1, 2),
        path=tmp_path,
    )

    def refuse(constant):
        raise AssertionError(constant)

    text = write_json(tmp_path / "value.json", value).read_text()
    assert json.loads(text, parse_constant=refuse) == dict(
        inf=None, nan=None, tensor=[1, None], scalar=3, steps=[1, 2], path=str(tmp_path)
    )


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path):
    path = write_json(tmp_path / "value.json", 1)
    with pytest.raises(TypeError):
        write_json(path, {"function": print})
    assert read_json(path) == 1


@pytest.mark.parametrize("content", ["", '{"a": ', "\x00"])
def test_broken_json_is_named(tmp_path, content):
    (tmp_path / "broken.json").write_text(content)
    with pytest.raises(ValueError, match="broken.json.* is not valid JSON"):
        read_json(tmp_path / "broken.json")


def test_missing_files_are_named(tmp_path):
    for read in (read_json, read_jsonl):
        with pytest.raises(FileNotFoundError, match="no file .*missing"):
            read(tmp_path / "missing")


def test_records_are_appended(tmp_path):
    records = [{"epoch": epoch, "prompt": 'a\nline "break" ü'} for epoch in range(5)]
    for record in records:
        append_jsonl(tmp_path / "new" / "metrics.jsonl", record)
    assert read_jsonl(tmp_path / "new" / "metrics.jsonl") == records
    write_jsonl(tmp_path / "copy.jsonl", records)
    assert (tmp_path / "copy.jsonl").read_bytes() == (tmp_path / "new" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("torn", [b'{"epoch": 1', b'{"epoch": 1}', '{"prompt": "ü'.encode()[:-1], b""])
def test_a_torn_line_is_left_out_and_replaced(tmp_path, torn):
    path = append_jsonl(tmp_path / "metrics.jsonl", {"epoch": 0})
    with open(path, "ab") as file:
        file.write(torn)
    assert read_jsonl(path) == [{"epoch": 0}]
    append_jsonl(path, {"epoch": 1})
    assert read_jsonl(path) == [{"epoch": 0}, {"epoch": 1}]


def test_an_empty_file_has_no_records(tmp_path):
    assert read_jsonl(write_jsonl(tmp_path / "metrics.jsonl", [])) == []


def test_results_come_from_the_checkout_or_from_the_repository(tmp_path, monkeypatch):
    asked = []

    def answer(address, timeout):
        asked.append(address)
        return io.BytesIO(b'{"seed": 2}\n')

    monkeypatch.setattr(files, "urlopen", answer)
    monkeypatch.setattr(files, "results_folder", tmp_path)
    append_jsonl(tmp_path / "a" / "b.jsonl", {"seed": 1})
    assert read_results("a/b.jsonl") == [{"seed": 1}] and not asked
    assert read_results("a/c.jsonl") == [{"seed": 2}] and asked == [f"{files.results_address}/a/c.jsonl"]


def test_missing_results_are_named(tmp_path, monkeypatch):
    def no_network(address, timeout):
        raise OSError("no network")

    monkeypatch.setattr(files, "urlopen", no_network)
    monkeypatch.setattr(files, "results_folder", tmp_path)
    with pytest.raises(FileNotFoundError, match="no results 'a.jsonl'.*no network"):
        read_results("a.jsonl")
