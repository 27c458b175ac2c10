"""The package as users get it: built from the source archive, installed outside the checkout, with its model."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from configparser import ConfigParser
from email.parser import HeaderParser
from pathlib import Path

import pytest
from conftest import LEFTOVERS, copy_checkout

ROOT = Path(__file__).resolve().parent.parent
settings = ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini", encoding="utf-8")
facts = settings["DEFAULT"]
name, version = facts["lib_name"], facts["version"]


def run(*command, cwd):
    "Run `command` in the folder `cwd`, away from this checkout's modules; its output, and that of its errors"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The folder with the source archive and the wheel built from it, and what the build said"
    folder = tmp_path_factory.mktemp("archives")
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", ".")
    return folder, run(*build, cwd=copy_checkout(folder / "tree"))


@pytest.fixture(scope="module")
def archives(built):
    folder, _ = built
    return folder / "dist" / f"{name}-{version}.tar.gz", folder / "dist" / f"{name}-{version}-py3-none-any.whl"


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory):
    "The `bin` folder of a fresh environment with the wheel, which borrows the other packages from the running one"
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "venv", cwd=folder)
    scripts = Path(sysconfig.get_path("scripts", vars={"base": str(folder / "venv")}))
    run(scripts / "python", "-m", "pip", "install", "--no-index", "--no-deps", archives[1], cwd=folder)
    site = Path(
        run(scripts / "python", "-c", 'import sysconfig; print(sysconfig.get_path("purelib"))', cwd=folder).strip()
    )
    (site / "borrowed.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}) + "\n")
    return scripts


@pytest.fixture(scope="module")
def metadata(archives):
    "The wheel's METADATA"
    with zipfile.ZipFile(archives[1]) as wheel:
        return HeaderParser().parsestr(wheel.read(f"{name}-{version}.dist-info/METADATA").decode())


def test_the_build_warns_of_nothing(built):
    "But of what an environment variable says: not to compile"
    said = [line for line in built[1].splitlines() if re.search(r"(?i)warning|deprecat", line)]
    assert [line for line in said if "byte-compiling is disabled" not in line] == []


def test_every_dynamic_field_reaches_the_wheel(metadata):
    assert metadata["Version"] == version
    assert metadata["Requires-Python"] == f">={facts['min_python']}"
    assert facts["license"] in (metadata["License"], metadata["License-Expression"])
    assert metadata["Author"] == facts["author"]
    assert metadata["Keywords"].replace(",", " ").split() == facts["keywords"].split()
    assert set(metadata.get_all("Provides-Extra")) == {"dev", "track", "data"}
    wanted = {line.split(">")[0] for line in facts["requirements"].split()}
    assert wanted == {
        need.split(">")[0].split("<")[0] for need in metadata.get_all("Requires-Dist") if "extra ==" not in need
    }
    for field in ("Summary", "Description", "Classifier", "Project-URL", "License-File"):
        assert metadata[field] or metadata.get_payload()


def test_archives_hold_the_assets_and_the_sources(archives):
    assets = {path.relative_to(ROOT).as_posix() for path in (ROOT / name / "assets").rglob("*") if path.is_file()}
    weights = {"/".join(path.split("/")[2:-1]) for path in assets if path.endswith(".safetensors")}
    assert weights >= {"tiny/unet", "tiny_flow/transformer", "networks"}
    assert archives[1].stat().st_size <= 12e6
    with zipfile.ZipFile(archives[1]) as wheel:
        assert assets <= set(wheel.namelist())
    with tarfile.open(archives[0]) as archive:
        held = {path.split("/", 1)[-1] for path in archive.getnames()}
    notebooks = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nbs").glob("*.ipynb")}
    assert assets | notebooks | {"settings.ini", "LICENSE", "README.md"} <= held


def test_the_source_archive_can_run_its_tests(archives, tmp_path):
    "It holds what they read, and a few of those that read most pass in it"
    folders = ("tests", "benchmarks", "constraints", "nbs", ".ci", ".github")
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not {*LEFTOVERS} & {*path.relative_to(ROOT).parts}
    }
    with tarfile.open(archives[0]) as archive:
        assert wanted - {path.split("/", 1)[-1] for path in archive.getnames()} == set()
        archive.extractall(tmp_path, filter="data")
    chosen = (
        "test_demo.py",
        "test_advantages.py",
        "test_project.py::test_site_configuration",
        "test_project.py::test_readme_is_made_from_the_index",
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path / f"{name}-{version}")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{path}" for path in chosen)],
        cwd=tmp_path / f"{name}-{version}",
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_wheel_imports_outside_the_checkout(installed, tmp_path):
    where = run(
        installed / "python", "-c", f"import {name}; print({name}.__version__, {name}.__file__)", cwd=tmp_path
    ).split()
    assert where[0] == version
    assert installed.parent.resolve() in Path(where[1]).resolve().parents


@pytest.mark.slow
def test_wheel_loads_the_embedded_model(installed, tmp_path):
    code = 'from sdpo_nb.models import load_policy; print(type(load_policy("tiny")).__name__)'
    assert run(installed / "python", "-c", code, cwd=tmp_path).strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [line.split("=")[0].strip() for line in facts["console_scripts"].strip().splitlines()]
)
def test_command_is_installed(command, installed, tmp_path):
    assert "usage" in run(installed / command, "--help", cwd=tmp_path).lower()
