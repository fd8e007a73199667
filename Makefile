# Everything a fresh machine needs, with Python 3.11 and pip only. `make demo` runs the main job, `make test` the tests.
SHELL  := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# One thread per process: trainer, server and tests share few cores, and spinning OpenMP threads cost a factor of 40 here.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test test-fast lint bench clean
help:
	@echo "make demo       a real GRPO run drives a real vLLM server through an embedded Hub, exact at every step"
	@echo "make test       everything: linters, types, unit and end-to-end tests"
	@echo "make test-fast  linters, types and the tests that start no vLLM (under 5 minutes)"
	@echo "make bench      the codec benchmark on synthetic weights"

setup: $(READY)

$(READY): requirements/cpu.txt requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "The pinned CPU environment needs Python 3.11; found $$($(PYTHON) --version). Try: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# PyPI carries only the CUDA build under this version; the CPU build comes from a configured index, or from PyTorch's own.
	$(BIN)/pip install -q --no-deps "torch==2.13.0+cpu" || \
		$(BIN)/pip install -q --no-deps "torch==2.13.0+cpu" --index-url https://download.pytorch.org/whl/cpu
	$(BIN)/pip install -q --no-deps -r requirements/cpu.txt -r requirements/dev.txt
	$(BIN)/pip install -q --no-deps --editable .
	@touch $@

demo: $(READY)
	$(BIN)/hubsync demo $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest $(ARGS)

test-fast: lint
	$(BIN)/pytest -m "not server" $(ARGS)

bench: $(READY)
	$(BIN)/python -m benchmarks.codec $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
