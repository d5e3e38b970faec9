# The doors of Tandem. `make help` lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
RUN = $(VENV)/bin/python
CONFIG ?= configs/helpdesk.yaml
MODEL ?=
BENCH ?= training front $(if $(shell nvidia-smi -L 2> /dev/null),step_profile memory shared_base packing serving adapters)
export TANDEM_VENV = $(VENV)

.PHONY: help setup demo down test check format lock bench

help: ## list these commands
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: ## make .venv from the lock; does nothing where all is in place
	@$(PYTHON) cluster/bootstrap.py

demo: setup ## the whole job, from nothing to a live chatbot: [MODEL=...] [CONFIG=...]
	@$(RUN) -m serve demo $(CONFIG) $(if $(MODEL),model.name=$(MODEL))

down: ## stop what `make demo` or `python -m cluster up` started
	@$(RUN) -m cluster down

test: setup ## all tests that this machine can run
	@$(RUN) -m pytest -n 2

check: setup ## format, lint, types, import rules
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(RUN) -m mypy
	@$(VENV)/bin/lint-imports --no-cache

format: setup ## put the code in shape
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

lock: setup ## compile both locks from pyproject.toml
	@$(RUN) -m cluster.lock

bench: setup ## benchmarks of minutes each, on a cluster that is up and idle: [BENCH="soak chaos"]; to tests/benchmarks/results
	@failed=; for name in $(BENCH); do PYTHONPATH=. $(RUN) tests/benchmarks/$$name.py || failed="$$failed $$name"; done; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }
