# Every command of the README, in a private environment (.venv). PYTHON picks the interpreter that makes it.
PYTHON ?= $(shell for python in python3.12 python3.13 python3.11 python3; do \
  $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$python && break; done)
# Where there is an NVIDIA GPU, JAX for it and the kernels' compilers are installed too; `make GPU= ...` leaves them out.
GPU ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo ,gpu)
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
# Two test processes share two cores better than one: tracing and XLA's compiler are mostly single-threaded.
TEST_PROCESSES ?= 2

.PHONY: help train test prove bench lint format clean

help:  ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 found; install one, or name it: make PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[train$(GPU)]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[train,test]'
	@touch $@ $(if $(GPU),,$(VENV)/.train)

# Also what `--against diffusers` runs. PyTorch's CUDA build asks for the triton of jax-triton on Python 3.12 and 3.13.
$(VENV)/.bench: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[train,test$(GPU)]'
	@touch $@ $(VENV)/.test $(VENV)/.train

train: $(VENV)/.train  ## train the embedded default: a small SANA that writes handwritten digits (ARGS="--steps 100 ...")
	$(BIN)/python -m train.main $(ARGS)

# In two parts, so that no process has to hold the programs of all tests.
test: $(VENV)/.test lint  ## everything that must hold on a CPU
	$(BIN)/python -m pytest -m 'not prove and not gpu' -n $(TEST_PROCESSES) --dist worksteal --ignore tests/train $(ARGS)
	$(BIN)/python -m pytest -m 'not prove and not gpu' -n $(TEST_PROCESSES) --dist worksteal tests/train $(ARGS)

prove: $(VENV)/.test  ## the longer proofs: models that must really learn, full-size figures
	XLA_FLAGS="$(XLA_FLAGS)" $(BIN)/python -m pytest -m 'prove and not gpu' $(ARGS)

bench: $(VENV)/.bench  ## the benchmark tables, in runs/benchmarks: under 9 minutes on a GPU; on a CPU at sizes that fit
	$(BIN)/python -m kernels.benchmark --seconds 150
	$(BIN)/python -m sana_jax.benchmark --seconds 180 $(ARGS)
	$(BIN)/python -m train.benchmark --seconds 60

lint: $(VENV)/.test  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the private environment and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
