# Every target works on a fresh clone: `venv` is made once, and again when its inputs change.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tried in this order; name one yourself with `make venv PYTHON=/path/to/python`.
PYTHON ?=
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3)
# As many tests at once as there are cores; more than four gain little beside the longest files.
# One after another, as a debugger needs them: `make test PARALLEL=`.
PARALLEL ?= -n logical --maxprocesses 4 --dist worksteal
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: help venv demo test soak lint claims gpu core-lines format coverage

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## everything into .venv: packages at the versions of constraints.txt, and Redis

demo: export OVERNIGHT_HOME := $(or $(OVERNIGHT_HOME),$(CURDIR)/.overnight)
demo: venv ## label 500 movie reviews with the shipped model, through the real queue and worker
	@$(BIN)/overnight demo

test: lint ## lint, then the whole test suite
	@$(BIN)/python -m pytest -q $(PARALLEL)

soak: lint ## the whole test suite with the cases that `make test` leaves out for their time
	@$(BIN)/python -m pytest -q $(PARALLEL) -m "soak or not soak"

lint: venv ## style, types, import arrows
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@PYTHONPATH=. $(BIN)/lint-imports

claims: venv ## measure every figure that the documentation states; `make claims ONLY=name` for one
	@set -f; $(BIN)/python -m benchmarks.claims $(ONLY)

gpu: export OVERNIGHT_HOME := $(or $(OVERNIGHT_HOME),$(CURDIR)/.overnight)
gpu: venv ## with an NVIDIA GPU: test and measure it, and write docs/gpu.md; `make gpu STEPS=tests,demo` for some
	@$(BIN)/python -m benchmarks.gpu $(addprefix --steps=,$(STEPS))

core-lines: venv ## how many lines a reader of one pass has before them
	@$(BIN)/python -m benchmarks.core_lines

format: venv ## mend what ruff can mend
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

coverage: venv ## the test suite with branch coverage
	@$(BIN)/python -m pytest -q $(PARALLEL) --cov --cov-report=term:skip-covered

# A command that exists may still not run (version managers leave such shims), so each candidate is
# asked, also for `venv` and `ensurepip`, which Debian packages apart.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -c 'import pip' 2>/dev/null; then \
	  found=; \
	  for candidate in $(CANDIDATES); do \
	    if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	    then found=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "make venv: none of [$(CANDIDATES)] is a Python 3.11 or later with the venv module." >&2; \
	    echo "Install Python 3.11 or 3.12 (on Debian and Ubuntu with python3-venv), or name one:" >&2; \
	    echo "    make venv PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$("$$found" --version)"; \
	  "$$found" -m venv $(VENV); \
	fi
	@echo "Installing packages into $(VENV) (once; PyTorch is the large one)"
	@$(PIP) install -c constraints.txt pip hatchling editables
	@$(PIP) install -c constraints.txt --no-build-isolation -e . --group dev
	@touch $(STAMP)
