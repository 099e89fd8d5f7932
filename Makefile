# Everything runs from .venv, which the first target that needs it sets up. `make help` lists the targets.

PYTHON ?= python3
METHOD ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
STAMP := $(VENV)/.installed

# one process per core, never very many: a test may itself start four ranks
PYTEST_WORKERS ?= --numprocesses logical --maxprocesses 8 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install demo test check format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## set up .venv: pinned dependencies, the C++ extension, the tropd command

demo: $(STAMP) ## distil the tiny student, TP=2 on CPU: METHOD=name picks the method, ARGS="train.steps=20" overrides
	$(BIN)/tropd demo $(if $(METHOD),--method $(METHOD)) $(ARGS)

test: export OMP_NUM_THREADS := 1
test: $(STAMP) ## run the test suite: ARGS="tests/test_config.py -k unknown" runs a part
	$(BIN)/python -m pytest $(PYTEST_WORKERS) $(ARGS)

check: $(STAMP) ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## fix what ruff can fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove all that make has made; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f megatron_tropd/_C.*.so
	find megatron_tropd tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that no other package's wish decides which build of it comes
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "megatron_tropd needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	    "Install one and say, for example, make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) pybind11 setuptools wheel
	$(PIP) --no-build-isolation --editable '.[dev,tensorboard]'
	@ls megatron_tropd/_C.*.so >/dev/null 2>&1 || echo "The C++ extension was not built: the packer runs in plain Python," \
	  "with the same result. For the fast one install a C++17 compiler and say make clean install." >&2
	@touch $@
