# Needs Python >= 3.10 with venv, and make:
#   make demo            train the embedded model and print its rewards before and after
#   make test            notebooks and tests, as one report, on all cores
#   make test-slow       the tests and cells that take minutes, and ground that is rarely touched
#   make check NB=17_advantages   format, export and run one notebook, its tests and those of the style
#   make format          the one formatter, over cells, tests and benchmarks
#   make export-check    are the notebooks clean and in step with the modules?
#   make gpu-check       speed, memory and exactness on this machine's GPU, within ten minutes; a rehearsal without one
#   make time-to-gain    processor seconds until a visible gain, for every method and for TRL's DDPOTrainer
#   make docs            the site, in _docs (needs Quarto 1.10)
#   make clean           remove the environment, builds and caches
#
# TORCH chooses the torch build, e.g. on a laptop: make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
# Without it: the newest torch where there is a GPU, the one of constraints/cpu.txt elsewhere.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?=

BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip install --disable-pip-version-check --quiet
FACTS := settings.ini setup.py pyproject.toml constraints/cpu.txt
# One process of one thread for each core; who has finished takes over tests of the others.
PARALLEL := --numprocesses auto --dist worksteal
# How long that takes, and where: said first, since pytest is silent until the large packages are imported
SAY := $(BIN)/python -c 'import os, sys; print(f"{sys.argv[1]}, in $(VENV), on the CPU: a process on each of {os.cpu_count()} cores. A dot is a test, the percentage is what is done.", flush=True)'
CONSTRAINT := $(if $(TORCH)$(shell command -v nvidia-smi 2>/dev/null),,--constraint constraints/cpu.txt)

.PHONY: help demo test test-slow check format export-check gpu-check time-to-gain docs clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}: pass PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(FACTS) | $(BIN)/python
	$(if $(TORCH),$(PIP) $(TORCH))
	$(PIP) $(CONSTRAINT) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) $(CONSTRAINT) --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	rm -rf runs/demo
	$(BIN)/sdpo-train tiny --output_dir runs/demo

test: $(VENV)/.installed-dev
	@$(SAY) "About eleven minutes on two cores"
	$(BIN)/python -m pytest -q $(PARALLEL)

test-slow: $(VENV)/.installed-dev
	@$(SAY) "About a quarter of an hour on two cores"
	$(BIN)/python -m pytest -q $(PARALLEL) -m slow

check: $(VENV)/.installed-dev
	@$(BIN)/python .ci/check.py $(NB)

format: $(VENV)/.installed-dev
	$(BIN)/ruff format nbs tests benchmarks .ci
	$(BIN)/ruff check --fix nbs tests benchmarks .ci

export-check: $(VENV)/.installed-dev
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	@git status --short nbs sdpo_nb
	@test -z "$$(git status --porcelain nbs sdpo_nb)" || { echo "these differ from what is committed: commit what nbdev-export and nbdev-clean wrote"; exit 1; }

gpu-check: $(VENV)/.installed
	$(BIN)/python benchmarks/gpu_check.py

time-to-gain: $(VENV)/.installed
	$(BIN)/python benchmarks/time_to_gain.py

docs: $(VENV)/.installed-dev
	@command -v quarto >/dev/null || { echo "make docs needs Quarto 1.10: https://quarto.org/docs/download/"; exit 1; }
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python .ci/docs.py

clean:
	rm -rf $(VENV) build dist *.egg-info _proc _docs .pytest_cache .ruff_cache
	find nbs sdpo_nb tests -name __pycache__ -prune -exec rm -rf {} +
	find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} +
