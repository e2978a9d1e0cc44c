# ftlaunch: everything a fresh machine needs is `make quickstart` and `make test`. `make help` lists the rest.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
# The interpreters that are tried, in this order; PYTHON=/path/to/python goes first.
PYTHON ?=
PYTHONS := $(PYTHON) python3.13 python3.12 python3.11 python3
# What `make quickstart` writes to, how many test processes run at once (each takes a whole file, so that what tests of a
# module share is made once; in their order, which has the long ones first, so that all end together), and more arguments
# for pytest.
DIR ?= quickstart
WORKERS ?= 2
ARGS ?=
NAME ?=

PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --no-input
# Not `python -m pytest`, which would put our folders (`distributed`, `cluster`, ...) on the import path bare.
PYTEST := $(BIN)/pytest

.PHONY: help quickstart install install-test test evidence benchmark check lint format types contracts clean

help: ## List what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: install ## Install, then train and compare a small model on this machine (DIR=quickstart)
	@$(BIN)/ftlaunch quickstart $(DIR)

test: install-test ## The quick tier of tests (ARGS="-k name" narrows it, WORKERS=2 processes)
	@$(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not evidence and not gpu and not hub" $(ARGS)

evidence: install-test ## One long proof, whole: NAME=...; without NAME: list them
ifeq ($(strip $(NAME)),)
	@echo "Choose a proof with NAME=...; these are there:"
	@$(PYTEST) -q -m evidence --collect-only $(ARGS)
else
	@$(PYTEST) -m evidence -k "$(NAME)" --timeout 0 $(ARGS)
endif

benchmark: $(VENV)/.installed-bench ## One benchmark: NAME=...; without NAME: list them (ARGS="--rounds 9")
ifeq ($(strip $(NAME)),)
	@echo "Choose a benchmark with NAME=...; these are there:"
	@grep -l '^CLAIM' benchmarks/*.py | sed 's|.*/\(.*\)\.py|  \1|'
else
	@$(BIN)/python benchmarks/$(NAME).py $(ARGS)
endif

check: lint types contracts test ## Everything a change must pass

lint: install-test ## Style: ruff's rules and its format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: install-test ## Rewrite the files as ruff would have them
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# mypy does not see editable installs, so the root is linked under the package's name.
types: install-test ## mypy --strict
	@mkdir -p $(VENV)/types && ln -sfn ../.. $(VENV)/types/ftlaunch
	@$(BIN)/mypy

contracts: install-test ## Who may import whom
	@$(BIN)/lint-imports

install: $(VENV)/.installed ## The virtual environment, for users
install-test: $(VENV)/.installed-test ## The same, with the test extras

# A stamp is older than pyproject.toml when the dependencies may have changed; code is installed editable.
$(VENV)/.installed: pyproject.toml | $(VENV)/.created
	@echo "Installing ftlaunch and what it needs into $(VENV) (torch is large: some minutes on the first time) ..."
	@$(PIP) -e .
	@touch $@

# The test extras include everything that users get, so their stamp stands for both.
$(VENV)/.installed-test: pyproject.toml | $(VENV)/.created
	@echo "Installing ftlaunch with its test extras into $(VENV) (torch is large: some minutes on the first time) ..."
	@$(PIP) -e '.[test]'
	@touch $(VENV)/.installed $@

# Peers for benchmarks come on top of the test extras.
$(VENV)/.installed-bench: $(VENV)/.installed-test
	@echo "Installing the peers of the benchmarks into $(VENV) ..."
	@$(PIP) -e '.[bench]'
	@touch $@

# An interpreter counts when it starts (a version manager's shim may not), is new enough and can make environments.
$(VENV)/.created:
	@for python in $(PYTHONS); do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    echo "Making $(VENV) with $$("$$python" -c 'import platform, sys; print(sys.executable, platform.python_version())') ..."; \
	    "$$python" -m venv $(VENV) && touch $@ && exit 0; \
	    exit 1; \
	  fi; \
	done; \
	echo "ftlaunch needs Python 3.11 or newer with its venv module; tried: $(strip $(PYTHONS))." >&2; \
	echo "Install one (Debian and Ubuntu: apt-get install python3 python3-venv), or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; \
	exit 1

clean: ## Remove the environment, caches and build output
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
