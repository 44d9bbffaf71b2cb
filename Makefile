# Every target sets itself up: a virtual environment in .venv, made on first use and renewed when pyproject.toml changes.
PYTHON ?= python3
TORCH ?= torch==2.13.0
EXTRAS ?= dev,data,peft,tensorboard
VENV ?= .venv
SCALE ?= quick
BIN := $(VENV)/bin
# What runs Skipstone, and what its tests and checks need besides: the demonstration waits for the first alone.
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
# Heavy tools, in an environment of their own: torchao alone makes every import of transformers print warnings.
TOOLS ?= $(EXTRAS),trl,eval,serve,torchao
# Bytecode is kept, or every process of the tests would compile sources and rewrite assertions anew.
TEST_THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
# As many processes of tests as cores, at most four: each holds a gigabyte. WORKERS=0 runs them in this one.
WORKERS ?= auto
PARALLEL := -n $(WORKERS) --maxprocesses 4 --dist worksteal
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
# What `make gpu` runs with: the environment of this checkout if it exists, else one that has torch for CUDA already.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_OUT ?= results

.PHONY: help setup setup-dev demo test test-all test-ecosystem test-browser screenshots distributed gpu gpu-paper gpu-rehearsal check format count docs release clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

setup: $(STAMP)  ## make the virtual environment and install Skipstone into it

setup-dev: $(DEV_STAMP)  ## the same with what tests and checks need

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Skipstone needs Python 3.11 or newer; name one with PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone, so that TORCH=... can choose another build and pip does not replace it afterwards: a wheel,
# or a version such as torch==2.13.0+cpu with PIP_EXTRA_INDEX_URL naming PyTorch's index of builds for CPUs. Without it,
# pip takes what its index has for this machine, on Linux mostly a build for CUDA, several times as large.
$(STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install '$(TORCH)'
	$(PIP) install -e .
	@touch $@

$(DEV_STAMP): $(STAMP)
	$(PIP) install -e '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP)  ## train and compare dense, MoD, TSA, PolyGLU and all three (SCALE=laptop: larger ones, minutes each)
	$(BIN)/skipstone reproduce demo --scale $(SCALE)

test: $(DEV_STAMP)  ## the quick tests
	$(TEST_THREADS) $(BIN)/python -m pytest -m "not slow" --cpu-seconds $(PARALLEL)

test-all: $(DEV_STAMP)  ## every test, the slow ones and the whole product of every law too
	$(TEST_THREADS) $(BIN)/python -m pytest --cpu-seconds $(PARALLEL)

test-ecosystem:  ## the tests with other people's tools: TRL, lm-evaluation-harness, a server
	$(MAKE) VENV=.venv-tools EXTRAS=$(TOOLS) setup-dev
	$(TEST_THREADS) .venv-tools/bin/python -m pytest tests/ecosystem

# Chromium has to be on the PATH (apt-get install chromium); the tests that need it are skipped elsewhere.
BROWSER := $(EXTRAS),view,browser,notebooks
PAGES := tests/view/test_in_browser.py tests/report/test_in_browser.py tests/examples

test-browser:  ## the tests of all pages in Chromium
	$(MAKE) VENV=.venv-browser EXTRAS=$(BROWSER) setup-dev
	$(TEST_THREADS) .venv-browser/bin/python -m pytest $(PAGES)

# Two models of the demonstration, the first with a budget table, on the same prompt.
PICTURED := runs/demo/quick
screenshots:  ## make the pictures of docs/view.md again
	$(MAKE) VENV=.venv-browser EXTRAS=$(BROWSER) setup-dev
	.venv-browser/bin/skipstone reproduce demo --scale quick --arms mod,all
	test -f $(PICTURED)/mod-seed0/model/budget.json || .venv-browser/bin/skipstone calibrate $(PICTURED)/mod-seed0
	SKIPSTONE_SCREENSHOTS=docs SKIPSTONE_VIEW_RUNS=$(PICTURED)/mod-seed0:$(PICTURED)/all-seed0 \
		$(TEST_THREADS) .venv-browser/bin/python -m pytest $(PAGES) -k "screenshots or run-watch"

distributed: $(DEV_STAMP)  ## measure the table of docs/distributed.md again (processes on this machine, half an hour)
	$(TEST_THREADS) PYTHONPATH=tests $(BIN)/python -m train.distributed_table docs/distributed.md

gpu:  ## on a machine with a CUDA GPU: run everything that a GPU should be asked, in 9 minutes, into results/gpu.md
	PYTHONPATH=src $(GPU_PYTHON) tools/gpu.py --out $(GPU_OUT)

gpu-paper:  ## on a machine with a CUDA GPU: Token-Selective Attention at its paper's size, the arms as processes on one GPU
	PYTHONPATH=src $(GPU_PYTHON) tools/gpu.py --paper --out $(GPU_OUT)

gpu-rehearsal:  ## the parts of `make gpu` with tiny sizes on a CPU
	PYTHONPATH=src $(GPU_PYTHON) tools/gpu.py --rehearse --out $(GPU_OUT)

check: $(DEV_STAMP)  ## format, lint, types, and the floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(TEST_THREADS) $(BIN)/python -m pytest -q tests/test_floors.py

format: $(DEV_STAMP)  ## rewrite the code as ruff would
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

count:  ## count lines, files, imports, Any, class checks and circles of imports
	$(PYTHON) tools/count.py

# The site has an environment of its own: its tools read the sources as text and need neither torch nor Skipstone.
docs:  ## build the documentation site into site/, strictly and offline
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip --disable-pip-version-check install -q 'mkdocs-material>=9.6,<10' 'mkdocstrings[python]>=1.0'
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

# In an environment of its own. The wheel is built from the sdist, which so proves to hold all that it takes.
release:  ## build sdist and wheel into dist/, and check what they hold
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/python -m pip --disable-pip-version-check install -q 'build>=1.3' 'twine>=6.2'
	rm -rf dist && .venv-release/bin/python -m build
	.venv-release/bin/python -m twine check --strict dist/*
	$(PYTHON) tools/check_release.py dist

clean:  ## remove the virtual environment, caches and build folders (runs and results stay)
	rm -rf $(VENV) .venv-tools .venv-browser .venv-docs .venv-release site build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
