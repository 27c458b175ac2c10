"""Hands the facts of settings.ini to the build; every field passed here is listed as dynamic in pyproject.toml."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).resolve().parent / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
lib = cfg["lib_name"]
stages = {"2": "Pre-Alpha", "3": "Alpha", "4": "Beta", "5": "Production/Stable"}


def lines(key):
    "The non-empty lines of a multi-line value"
    return [line.strip() for line in cfg[key].splitlines() if line.strip()]


def python_versions():
    "The supported Python versions, e.g. `['3.10', '3.11']`"
    low, high = (int(cfg[key].split(".")[1]) for key in ("min_python", "max_python"))
    return [f"3.{minor}" for minor in range(low, high + 1)]


setup(
    version=cfg["version"],
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    license=cfg["license"],
    python_requires=f">={cfg['min_python']}",
    classifiers=[
        f"Development Status :: {cfg['status']} - {stages[cfg['status']]}",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Natural Language :: English",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: {version}" for version in python_versions()),
    ],
    packages=find_namespace_packages(include=[lib, f"{lib}.*"], exclude=["*__pycache__*"]),  # its assets, too
    package_data={lib: ["assets/**/*"]},
    install_requires=lines("requirements"),
    extras_require={
        "dev": lines("dev_requirements"),
        "track": lines("track_requirements"),
        "data": lines("data_requirements"),
    },
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": [f"{lib} = {lib}._modidx:d"]},
    zip_safe=False,
)
