# Each target makes its own environment in .venv first, once: `make demo` or `make test` may be the first thing typed.
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin

.PHONY: demo test lint bench tables experiments

demo: .venv/ready
	PYTHON=$(BIN)/python mlp/demo.sh

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/ready
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/scoring.py

experiments: .venv/ready
	PYTHON=$(BIN)/python mlp/experiments.sh

tables: .venv/ready
	$(BIN)/python -m common.report

.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
