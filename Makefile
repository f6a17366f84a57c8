# Each target makes its own environment in .venv first, once: `make demo` or `make test` may be the first thing typed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all soak audit lint bench experiments collect tables claims

demo: .venv/ready
	PYTHON=../$(BIN)/python mlp/demo.sh

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test: .venv/ready
	$(PYTEST) -m "not slow"

test-all: .venv/ready
	$(PYTEST)

soak: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/campaigns.py --kills 60 --flips 3000 --files 20000 --command_lines 20000 \
		--image_trees 500 --checkpoints 5000 --environments 150 --own_networks 700 --record results/soak.json

audit: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --requirement requirements-export.txt --disable-pip --no-deps

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/ready
	for name in training speed accuracy ranking real_layer; do $(BIN)/python benchmarks/$$name.py || exit; done

experiments: .venv/ready
	PYTHON=../$(BIN)/python JOBS=$(shell nproc) experiments/mnist.sh

collect: .venv/ready
	$(BIN)/python experiments/collect.py

tables: .venv/ready
	$(BIN)/python experiments/report.py
	$(BIN)/python experiments/figures.py
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python experiments/readme.py

claims: .venv/ready
	$(BIN)/python experiments/claims.py

.venv/ready: requirements.txt requirements-cluster.txt requirements-export.txt requirements-dev.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
