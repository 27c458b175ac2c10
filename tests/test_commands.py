"""Places, signals and output: what every command shares, whatever it does."""

import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path

import pytest

from sdpo_nb.commands import (
    Terminated,
    check_setting,
    check_writable,
    flags_of,
    plain_path,
    read_value,
    replace_unprintable,
    run_command,
    termination_raises,
    uninterrupted,
)
from sdpo_nb.config import RunConfig, TrainConfig, resolve
from sdpo_nb.request import method_settings


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    return str(tmp_path)


PLACES = ["policy", "prompts", "reward_vae", "output_dir", "resume"]


def test_every_place_is_plain(home):
    "In Python, and as a flag; a folder that is called ~ comes of it nowhere"
    assert [f.name for f in fields(RunConfig) if f.metadata["path"]] == PLACES
    given = dict(policy="~/model/", output_dir=Path("~/run"), resume="~/run//", reward_vae="~/vae")
    config = resolve(TrainConfig(**given))
    assert [getattr(config, name) for name in given] == [f"{home}/{name}" for name in ("model", "run", "run", "vae")]
    for kind in (TrainConfig, method_settings("spo"), method_settings("lasro")):
        flags = flags_of(kind)
        assert {read_value(name, flags[name], "~/x/") for name in PLACES} == {f"{home}/x"}
        assert read_value("reward", flags["reward"], "~/x.py:f") == "~/x.py:f"  # its own room reads it
    assert check_writable("output", "~/new/a.png", ".png") == Path(home) / "new" / "a.png"


@pytest.mark.parametrize(
    "given, plain",
    [
        ("a/", "a"),
        ("./a//", "./a"),
        ("/", "/"),
        ("C:/", "C:/"),
        ("", ""),
        ("~no_such_user/x", "~no_such_user/x"),
        ("a~", "a~"),
        ("owner/name", "owner/name"),
        (Path("a"), "a"),
        (3, 3),
        (None, None),
        (["~"], ["~"]),
    ],
)
def test_plain_paths(given, plain):
    assert plain_path(given) == plain == plain_path(plain)


def test_places_that_cannot_be_written(tmp_path):
    for name in ("a\0b", "x" * 300 + "/run"):
        with pytest.raises((ValueError, OSError)):
            check_writable("output_dir", tmp_path / name)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not a folder"):
        check_writable("output_dir", tmp_path / "file" / "deeper")
    field = next(f for f in fields(RunConfig) if f.name == "output_dir")
    for wrong in (3, b"x", ["a"], None, {}):
        with pytest.raises(ValueError, match="^output_dir is .*; give a text.$"):
            check_setting(field, wrong)


def pool_worker(queue):
    queue.put("ready")
    time.sleep(60)


def test_a_forked_process_is_no_run(capfd):
    "SIGTERM ends the worker of a pool as if no handler were there"
    context = multiprocessing.get_context("fork")
    with termination_raises():
        queue = context.SimpleQueue()
        worker = context.Process(target=pool_worker, args=(queue,))
        worker.start()
        assert queue.get() == "ready"
        worker.terminate()
        worker.join(20)
    assert worker.exitcode == -signal.SIGTERM and capfd.readouterr().err == ""


def test_signals():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Terminated), termination_raises():
        with uninterrupted():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
                signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    seen = []

    def elsewhere():  # only the main thread may say what signals do
        with termination_raises(), uninterrupted():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before[0]]


def test_whatever_standard_output_is(monkeypatch):
    for stream in (None, io.StringIO(), io.TextIOWrapper(io.BytesIO(), "ascii")):
        monkeypatch.setattr(sys, "stdout", stream)
        replace_unprintable()
        print("λ", file=stream)
    assert stream.buffer.getvalue() in (b"", b"?\n")  # it may not be flushed yet
    stream.close()
    replace_unprintable()


def test_a_reader_that_has_left_is_no_disk_that_is_full():
    def work():
        raise BrokenPipeError(32, "Broken pipe")

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as errors:
        assert run_command("tea", work) == 1
        sys.stdout.close()
    assert errors.getvalue() == "tea: nobody reads the output any longer; what was written to files is there.\n"


def test_termination_has_a_status_of_its_own(capfd):
    def work():
        with termination_raises():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    assert run_command("tea", work) == 143
    assert capfd.readouterr().err == "tea: terminated\n"
