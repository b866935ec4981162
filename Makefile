# Every verb works on a fresh machine: the first one makes the virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup demo test proofs check bench docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   roll out the small trained checkpoints through the real server; results in demo-out/"
	@echo "make test   the test suite"
	@echo "make proofs the long tests: every row of every table, soak, that training learns and what it cannot learn from"
	@echo "make check  format, lint, types, layers"
	@echo "make docs   the documentation site, with strict links, in build/site"
	@echo "make bench  speed, side by side with diffusers; results in benchmarks/results/"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: setup
	$(BIN)/flowroll demo --out demo-out

# Two at a time, a module on one worker: modules share engines, and a process can hold one engine of several ranks.
# OpenMP's threads sleep while they wait: where two workers share two cores, threads that spin hold up the others.
test proofs: export OMP_WAIT_POLICY = PASSIVE
test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

proofs: setup
	$(BIN)/python -m pytest --proofs -m "proof or slow" --numprocesses 2 --dist loadfile

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m benchmarks.run

docs: setup
	$(BIN)/python -m tools.docs

clean:
	rm -rf $(VENV) build demo-out .pytest_cache .mypy_cache .ruff_cache
