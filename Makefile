# Every target does its own set-up: a virtual environment with the locked, hashed dependencies.
PYTHON ?= $(shell for p in python3.13 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
WORKERS ?= 2

.PHONY: study test test-slow lint types docs check lock clean help

help:  ## say what each target does
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

study: $(VENV)/.run  ## run the main job on real data and leave a report to open
	$(BIN)/elbowroom study collinear_logistic --out reports/collinear_logistic

test: $(VENV)/.dev  ## pass the tests
	$(BIN)/python -m pytest -n $(WORKERS)

test-slow: $(VENV)/.dev  ## the tests that take minutes
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

lint: $(VENV)/.dev  ## style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## the type checker
	$(BIN)/mypy

docs: $(VENV)/.dev  ## build the documentation; warnings are errors
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

check: lint types test docs  ## everything that CI runs

lock: $(VENV)/.dev  ## resolve the dependencies again (needs uv)
	uv pip compile -q --universal --python-version 3.12 --generate-hashes --no-header --no-emit-index-url \
		--extra build pyproject.toml -o requirements.lock
	uv pip compile -q --universal --python-version 3.12 --generate-hashes --no-header --no-emit-index-url \
		--extra dev --extra data -c requirements.lock pyproject.toml -o requirements-dev.lock

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) reports docs/_build .pytest_cache .ruff_cache .mypy_cache build *.egg-info

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Expected Python 3.12 or newer on the PATH, found none: install one, or say 'make PYTHON=/path/to/python'." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: requirements.lock pyproject.toml | $(VENV)/bin/python
	$(PIP) install --require-hashes -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.run
	$(PIP) install --require-hashes -r requirements-dev.lock
	@touch $@
