# Python 3.11 or newer: the first of these that is. Another one: make PYTHON=/path/to/python
PYTHON ?= $(shell for candidate in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$candidate && break; done)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# Stamps of installations: make installs again if a requirements file is newer.
DEMO := $(VENV)/.installed-demo
DEV := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help demo picture test faults client client-test check format bench soak lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DEMO) ## See it work: servers, workers, 20,000 pieces of work, every unit accounted for
	@$(BIN)/meterfall demo

picture: $(DEMO) ## Draw docs/demo.svg, the picture of the README, from a new run of the demo
	@$(BIN)/python docs/picture.py

# How many tests at once; 0: one after the other, in one process.
JOBS ?= 2

# Each process takes a part, and helps out when done: so a module's tests stay together, and share its set-up.
test: $(DEV) ## Run all tests but the slow ones, on DATABASE_URL and REDIS_URL if set, else on servers started for them
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

faults: $(DEV) ## Run the fault matrix, slow tests too: servers and workers killed, frozen and cut off, and the books after it
	@$(BIN)/python -m pytest -m "faults or slow"

client: $(DEV) ## Build the wheel meterfall-client, for services, into dist/
	@$(BIN)/python distributions/client/build.py dist
	@ls dist/meterfall_client-*.whl

client-test: $(DEV) ## Test that wheel in empty environments, with the newest and the lowest releases of what it needs
	@$(BIN)/python -m pytest -m wheel

# The examples import `meterfall`, which is only in the wheel.
check: $(DEV) ## Check format, lint and types
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/ruff check --quiet
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/python distributions/client/build.py --sources build/client
	@MYPYPATH=build/client $(BIN)/mypy --no-error-summary examples/*/*.py
	@$(BIN)/lint-imports --no-logo

format: $(DEV) ## Format the code and mend what lint can mend
	@$(BIN)/ruff check --fix --quiet
	@$(BIN)/ruff format --quiet

# A run and its size: make bench EVENTS=100000 ROUNDS=5
EVENTS ?= 200000
USERS ?= 10000
ROUNDS ?= 3

bench: $(DEV) ## Measure CPU, throughput and latency on this machine; write docs/benchmarks.md and the README's figures
	@$(BIN)/meterfall bench --events $(EVENTS) --users $(USERS) --rounds $(ROUNDS) --out out
	@$(BIN)/python -m benchmarks.publish out/bench.json

# How long, and which load and faults: make soak MINUTES=60 SEED=7
MINUTES ?= 10
SEED ?= 1

soak: $(DEV) ## Soak for MINUTES (10) with SEED (1): random load and faults, the books proved again and again
	@$(BIN)/python -m tests.soak --minutes $(MINUTES) --seed $(SEED) --out out

LOCK := $(BIN)/uv pip compile --universal --generate-hashes --python-version 3.11 --no-header --no-annotate --quiet

# Each file holds the one before it: the demo and the tests use the very releases that a dyno runs.
lock: $(BIN)/uv ## Pin all dependencies of pyproject.toml, with hashes: of a dyno, of the service, of the demo, of the tests
	@$(LOCK) pyproject.toml --output-file requirements.txt
	@$(LOCK) pyproject.toml --constraint requirements.txt --extra serve --output-file requirements-serve.txt
	@$(LOCK) pyproject.toml --constraint requirements.txt --extra demo --output-file requirements-demo.txt
	@$(LOCK) pyproject.toml --constraint requirements-demo.txt --extra demo --extra dev --extra sentry --extra serve --output-file requirements-dev.txt

clean: ## Delete the environment, the caches and the output
	@rm -rf $(VENV) out build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing that venv installs: with it the environment is whole.
$(BIN)/pip:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo 'No Python 3.11 or newer here. Install one, or say where it is: make PYTHON=/path/to/python' >&2; exit 1; }
	@"$(PYTHON)" -m venv $(VENV)

$(DEMO): requirements-demo.txt pyproject.toml | $(BIN)/pip
	@echo 'Installing requirements-demo.txt into $(VENV)'
	@$(PIP) install --require-hashes -r requirements-demo.txt
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(DEV): requirements-dev.txt pyproject.toml | $(BIN)/pip
	@echo 'Installing requirements-dev.txt into $(VENV)'
	@$(PIP) install --require-hashes -r requirements-dev.txt
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(BIN)/uv: | $(BIN)/pip
	@$(PIP) install uv
