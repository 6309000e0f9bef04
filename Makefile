# Every target works from a bare clone: the environment is made in .venv on first use and remade when
# pyproject.toml or constraints.txt changes. Nothing needs to be activated.
PYTHON ?= python3
# Extra arguments for the command a target runs: make test ARGS="-k conv -x"
ARGS ?=
# The folder of cifar-10-batches-py, FashionMNIST and multi30k, for the experiments: make experiments DATA=DIR
DATA ?=

VENV := .venv
BIN := $(VENV)/bin
# -qq: errors only.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# A stamp is touched only after its installation succeeded, so an interrupted one is done again. There is one
# for everyday work and one on top of it for what only bench and experiments need; they depend on each
# other, so that make -j never runs two installers in one environment.
READY := $(VENV)/.ready
READY_BENCH := $(VENV)/.ready-bench

export PYTHONUNBUFFERED := 1
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo demo-optimisers test slow matrix lint format notebooks docs bench conformance experiments experiments-smoke verdicts clean

help: ## show this list
	@echo "make TARGET [ARGS=\"...\"] [PYTHON=python3.11]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(READY) ## make .venv with everything but the benchmark extras

demo: $(READY) ## in a minute: who is right, what it costs, what it is good for; table, JSON and figure in results/demo
	$(BIN)/python -m fngd demo --out results/demo $(ARGS)

demo-optimisers: $(READY) ## train on digits with SGD, AdamW, NGD and FNGD; table, JSON and figure in results/demo-optimisers
	$(BIN)/python -m fngd compare --out results/demo-optimisers $(ARGS)

test: $(READY) ## the tests, but for the slow ones, on all cores
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal $(ARGS)

slow: $(READY) ## the slow tests, and many more examples for each property
	$(BIN)/python -m pytest -m slow --hypothesis-profile=slow $(ARGS)

matrix: $(READY) ## the tests on other Pythons and torches, one new environment after the other; table in README.md
	$(BIN)/python tests/helpers/matrix.py $(ARGS)

lint: $(READY) ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(READY) ## execute the notebooks at full size and store their output
	$(BIN)/jupyter-execute --inplace $(ARGS) notebooks/*.ipynb

docs: $(READY) ## build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

bench: $(READY_BENCH) ## speed and memory beside plain training and other libraries
	$(BIN)/python -m benchmarks $(ARGS)

conformance: $(READY_BENCH) ## every backend and other libraries on every case: exact, refused or wrong
	$(BIN)/python -m persample conformance --peers --out docs/conformance.md --totals README.md $(ARGS)
	$(BIN)/python -m fngd.demo.verdicts

experiments: $(READY_BENCH) ## the papers' tables and figures at small scale, DATA=DIR; goes on where it stopped
	$(BIN)/python -m experiments all --scale small $(if $(DATA),--data-dir "$(DATA)") $(ARGS)
	$(BIN)/python -m experiments verdicts

experiments-smoke: $(READY_BENCH) ## each experiment for a minute at most, on data that need no folder
	rm -rf results/tmp/smoke
	$(BIN)/python -m experiments all --scale smoke --minutes 1 --out results/tmp/smoke $(ARGS)

verdicts: $(READY) ## fill the table of experiments/README.md from the results
	$(BIN)/python -m experiments verdicts

clean: ## remove .venv, caches and what the demo wrote
	rm -rf $(VENV) build dist *.egg-info results/demo results/demo-optimisers results/tmp .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (a minute or two, once)"
	@$(PIP) -e '.[test,demo,opacus,dev]'
	@touch $@

$(READY_BENCH): $(READY)
	@echo "installing the peers for the benchmarks into $(VENV)"
	@$(PIP) -e '.[bench,experiments]'
	@touch $@
