# Every command of the README, in a private environment (.venv). PYTHON picks the interpreter that makes it.
PYTHON ?= $(shell command -v python3.12 >/dev/null 2>&1 && python3.12 -c '' 2>/dev/null && echo python3.12 || echo python3.11)
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
# Two test processes share two cores better than one: tracing and XLA's compiler are mostly single-threaded.
TEST_PROCESSES ?= 2

.PHONY: help train test prove bench lint format clean

help:  ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[train]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[train,test]'
	@touch $@ $(VENV)/.train

train: $(VENV)/.train  ## train the embedded default: a small SANA that writes handwritten digits (ARGS="--steps 100 ...")
	$(BIN)/python -m train.main $(ARGS)

test: $(VENV)/.test lint  ## everything that must hold on a CPU
	$(BIN)/python -m pytest -m 'not prove and not gpu' -n $(TEST_PROCESSES) --dist worksteal $(ARGS)

prove: $(VENV)/.test  ## the longer proofs: models that must really learn, full-size figures
	$(BIN)/python -m pytest -m 'prove and not gpu' $(ARGS)

bench: $(VENV)/.test  ## the benchmark tables
	$(BIN)/python -m tests.benchmarks.sana_cpu $(ARGS)

lint: $(VENV)/.test  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the private environment and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
