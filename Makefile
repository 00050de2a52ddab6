# Targets for users and developers; `make help` lists them.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
    "$$p" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$p" && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
EXPERIMENT ?= experiments/digits_pfedgate.toml
METHODS ?= pfedgate fedavg local
WORKERS ?= 2
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SETUP := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help run flower deployment-demo test check bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(VENV)/.installed ## install, train pFedGate, FedAvg and local models on the digits, compare them
	@out="runs/digits-$$(date +%Y%m%d-%H%M%S)-$$$$"; folders=""; \
	for method in $(METHODS); do \
	    echo "== $$method"; folders="$$folders $$out/$$method"; \
	    $(BIN)/fedsparse run $(EXPERIMENT) --method $$method --out "$$out/$$method" || exit $$?; \
	done; \
	echo "== compare"; $(BIN)/fedsparse compare $$folders

flower: $(VENV)/.installed-dev ## run EXPERIMENT in Flower's simulation runtime
	$(BIN)/python experiments/flower_runtime.py simulation $(EXPERIMENT) --out "runs/flower-$$(date +%Y%m%d-%H%M%S)-$$$$"

deployment-demo: $(VENV)/.installed-dev ## a SuperLink and three SuperNodes with TLS here; is the digest the local engine's?
	$(BIN)/python experiments/flower_runtime.py deployment $(EXPERIMENT) --set partition.clients=3 --set rounds=2 --compare

test: $(VENV)/.installed-dev ## install what the tests need, run them
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

check: $(VENV)/.installed-dev ## lint, formatting, types, import rules
	$(BIN)/ruff check --no-cache
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed ## time rounds of the engine beside bare PyTorch loops
	$(BIN)/python experiments/benchmarks/engine.py

clean: ## remove the environment and caches; run folders stay
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer with venv found; name one: make PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SETUP) | $(BIN)/python
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(SETUP) | $(BIN)/python
	@echo "installing into $(VENV), with the development tools (a few minutes the first time)"
	$(PIP) --editable '.[dev,models]'
	@touch $@ $(VENV)/.installed
