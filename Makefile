# The two commands: `make demo` does the main job, `make test` checks everything. `make help` lists the rest.
# Nothing but Python 3.11+ and make is needed; all that is installed goes into .venv.

PYTHON ?= python3
VENV ?= .venv
OUT ?= out/demo
PYTEST ?=
WORKERS ?= 2

BIN := $(VENV)/bin
SETUP := pyproject.toml constraints.txt hatch_build.py
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# What the demo passes on, each only where it is set: make demo DATA=prefs.jsonl EPSILON=4 STEPS=20
DEMO_OPTIONS = --out "$(OUT)" \
  $(if $(DATA),--data "$(DATA)") $(if $(COLUMNS),--columns "$(COLUMNS)") $(if $(EPSILON),--epsilon $(EPSILON)) \
  $(if $(DELTA),--delta $(DELTA)) $(if $(UNIT),--unit $(UNIT)) $(if $(STEPS),--steps $(STEPS)) $(if $(SEED),--seed $(SEED)) \
  $(if $(MODEL),--model "$(MODEL)")

# One thread a process: faster for models this small, and the same result on any number of cores.
export OMP_NUM_THREADS ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train with privacy on preference data; leaves record, reports, model and trail in $(OUT)/"
	@echo "             DATA=file|name  COLUMNS=ours=theirs,...  EPSILON=8  DELTA=1e-5  UNIT=annotator|pair  STEPS=n  SEED=n"
	@echo "make test    lint, types and the whole test suite (PYTEST='-k word' passes options on, WORKERS=n processes)"
	@echo "make lint    only lint and types"
	@echo "make bench   measure what auditing and privacy cost on this machine; one table"
	@echo "make clean   remove the environment and what was made"
	@echo "PYTHON=python3.12 picks the interpreter (3.11 or later); VENV=dir another place for the environment."

demo: $(VENV)/.ready-demo
	@$(BIN)/rlhf-audit demo $(DEMO_OPTIONS)

test: lint
	@echo "==> running the tests ($(WORKERS) processes)"
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST)

lint: $(VENV)/.ready-test
	@echo "==> checking style and types"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready-demo
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks $(BENCH)

clean:
	rm -rf "$(VENV)" out build dist .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: $(PYTHON) is not Python 3.11 or later ($$($(PYTHON) --version 2>&1 | head -n 1))."; \
	  echo "Next step: install one, or name it: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo "==> creating the environment in $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv "$(VENV)" || { \
	  echo "error: $(PYTHON) cannot create an environment."; \
	  echo "Next step: install its venv module (Debian: apt-get install python3-venv)."; exit 2; }

$(VENV)/.ready-demo: $(SETUP) | $(VENV)/bin/python
	@echo "==> installing the package and what it needs (once; a few minutes, mostly torch)"
	@$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.ready-test: $(SETUP) | $(VENV)/bin/python
	@echo "==> installing the package and what its tests need (once; a few minutes, mostly torch)"
	@$(PIP_INSTALL) -e ".[test]"
	@touch $@ $(VENV)/.ready-demo
