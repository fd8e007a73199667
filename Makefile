# Everything a fresh machine needs, with Python 3.11 and pip only. `make demo` runs the main job, `make test` the tests.
SHELL  := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# The older end of the supported vLLM range has an environment of its own.
OLD       := .venv-0.27
OLD_READY := $(OLD)/.ready

# The older end of the supported TRL range, which lies before the environment's own TRL.
OLD_TRL := .trl-1.13

# DeepSpeed, bitsandbytes and lion-pytorch, for the tests with them: beside the environment, where others would import them.
EXTRAS       := .extras
EXTRAS_READY := $(EXTRAS)/.ready

# One thread per process: trainer, server and tests share few cores, and spinning OpenMP threads cost a factor of 40 here.
export OMP_NUM_THREADS ?= 1

# Tests that need vLLM and no TRL.
ON_VLLM := tests/servers/test_extension.py tests/servers/test_commits.py

.PHONY: help setup docs demo test test-fast test-versions test-trl test-extras test-soak test-matrix lint bench chaos clean
help:
	@echo "make demo       a real GRPO run drives a real vLLM server through an embedded Hub, exact at every step"
	@echo "make test       everything: linters, types, unit and end-to-end tests"
	@echo "make test-fast  linters, types and the tests that start no vLLM and no ranks (under 5 minutes)"
	@echo "make test-versions  the tests of the vLLM side with vLLM 0.27 and 0.32"
	@echo "make test-trl   the tests of TRL's trainers with TRL 1.13 (make test has those with 1.16)"
	@echo "make test-extras    the tests with DeepSpeed and with optimizers of bitsandbytes and lion-pytorch"
	@echo "make test-matrix  every architecture in every layout (20 minutes)"
	@echo "make test-soak  200 commits in a row under load, with clients that are killed anywhere"
	@echo "make chaos      200 random histories of kills, stalls and faults: exact, or loud (10 minutes)"
	@echo "make bench      the codec benchmark on synthetic weights"

setup: $(READY)

$(READY): requirements/cpu.txt requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "The pinned CPU environment needs Python 3.11; found $$($(PYTHON) --version). Try: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(call install,$(VENV),requirements/cpu.txt)
	@touch $@

$(OLD_READY): requirements/cpu-0.27.txt requirements/dev.txt pyproject.toml
	$(call install,$(OLD),requirements/cpu-0.27.txt)
	@touch $@

# PyPI carries only the CUDA build of torch under this version; the CPU build comes from a configured index, or PyTorch's own.
define install
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install -q --no-deps "torch==2.13.0+cpu" || \
		$(1)/bin/pip install -q --no-deps "torch==2.13.0+cpu" --index-url https://download.pytorch.org/whl/cpu
	$(1)/bin/pip install -q --no-deps -r $(2) -r requirements/dev.txt
	$(1)/bin/pip install -q --no-deps --editable .
endef

demo: $(READY)
	$(BIN)/hubsync demo $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest $(ARGS)

test-fast: lint
	$(BIN)/pytest -m "not server and not slow and not extras" $(ARGS)

# What talks to vLLM, on both ends of the supported range.
test-versions: $(READY) $(OLD_READY)
	$(OLD)/bin/pytest -m server $(ON_VLLM) $(ARGS)
	$(BIN)/pytest -m server $(ON_VLLM) $(ARGS)

# The trainers, on the older end of the supported TRL range; the environment has the newer one.
test-trl: $(READY) $(OLD_TRL)
	PYTHONPATH=$(OLD_TRL) $(BIN)/pytest tests/integrations/test_trl.py tests/integrations/test_trl_family.py tests/servers/test_trl_server.py $(ARGS)

$(OLD_TRL): $(READY)
	$(BIN)/pip install -q --no-deps --upgrade --target $@ "trl==1.13.0"
	@touch $@

# Trainers under DeepSpeed ZeRO, on CPUs, and optimizers that are not torch's.
test-extras: $(READY) $(EXTRAS_READY)
	PYTHONPATH=$(CURDIR)/$(EXTRAS) DS_ACCELERATOR=cpu $(BIN)/pytest -m extras tests/publish/test_deepspeed.py tests/servers/test_accelerate.py tests/publish/test_sliced.py $(ARGS)

$(EXTRAS_READY): $(READY) requirements/extras.txt
	$(BIN)/pip install -q --no-deps --upgrade --target $(EXTRAS) -r requirements/extras.txt
	@touch $@

# Every architecture that is promised, alone, tensor parallel and expert parallel.
test-matrix: $(READY)
	$(BIN)/pytest -m matrix $(ARGS)

# 200 commits in a row under load, with clients that are killed anywhere.
test-soak: $(READY)
	HUBSYNC_TEST_COMMITS=200 $(BIN)/pytest -m server tests/servers/test_commits.py -k many_commits $(ARGS)

bench: $(READY)
	$(BIN)/python -m benchmarks.codec $(ARGS)

# Random histories; one seed again: make chaos ARGS="--only 17".
chaos: $(READY)
	$(BIN)/python -m benchmarks.chaos --runs 200 $(ARGS)

# The documentation site, with an API reference from docstrings: build/docs/index.html.
DOCS := .venv-docs
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build $(ARGS)

$(DOCS)/.ready: requirements/docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install -q -r requirements/docs.txt
	@touch $@

clean:
	rm -rf $(VENV) $(OLD) $(OLD_TRL) $(EXTRAS) .pytest_cache .mypy_cache .ruff_cache .hypothesis
