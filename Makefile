# Every target sets itself up: a virtual environment in .venv, made on first use and renewed when pyproject.toml changes.
PYTHON ?= python3
TORCH ?= torch==2.13.0
EXTRAS ?= dev,data,peft,tensorboard
VENV ?= .venv
SCALE ?= laptop
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Heavy tools, in an environment of their own: torchao alone makes every import of transformers print warnings.
TOOLS ?= $(EXTRAS),trl,eval,serve,torchao
TEST_THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# As many processes of tests as cores, at most four: each holds a gigabyte. WORKERS=0 runs them in this one.
WORKERS ?= auto
PARALLEL := -n $(WORKERS) --maxprocesses 4 --dist worksteal
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-ecosystem check format count docs clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

setup: $(STAMP)  ## make the virtual environment and install Skipstone into it

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Skipstone needs Python 3.11 or newer; name one with PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone, so that TORCH=... can choose another build and pip does not replace it afterwards.
$(STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install '$(TORCH)'
	$(PIP) install -e '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP)  ## train and compare dense, MoD, TSA, PolyGLU and all three (minutes on a laptop)
	$(BIN)/skipstone reproduce demo --scale $(SCALE)

test: $(STAMP)  ## the quick tests
	$(TEST_THREADS) $(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-all: $(STAMP)  ## every test, the slow ones and the whole product of every law too
	$(TEST_THREADS) $(BIN)/python -m pytest $(PARALLEL)

test-ecosystem:  ## the tests with other people's tools: TRL, lm-evaluation-harness, a server
	$(MAKE) VENV=.venv-tools EXTRAS=$(TOOLS) setup
	$(TEST_THREADS) .venv-tools/bin/python -m pytest tests/ecosystem

check: $(STAMP)  ## format, lint, types, and the floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(TEST_THREADS) $(BIN)/python -m pytest -q tests/test_floors.py

format: $(STAMP)  ## rewrite the code as ruff would
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

count:  ## count lines, files, imports, Any, class checks and circles of imports
	$(PYTHON) tools/count.py

# The site has an environment of its own: its tools read the sources as text and need neither torch nor Skipstone.
docs:  ## build the documentation site into site/, strictly and offline
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip --disable-pip-version-check install -q 'mkdocs-material>=9.6,<10' 'mkdocstrings[python]>=1.0'
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

clean:  ## remove the virtual environment, caches and build folders (runs and results stay)
	rm -rf $(VENV) .venv-tools .venv-docs site build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
