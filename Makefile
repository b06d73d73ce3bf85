# tdxlab: one command for each habit. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
.SUFFIXES:

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
PIP_COMPILE_FLAGS := --quiet --generate-hashes --all-extras --allow-unsafe --strip-extras --no-header \
	--no-annotate --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options

CHECKS := check-format check-lint check-types check-imports check-duplicates
PYTEST := $(BIN)/python -m pytest
# The tests of a file stay in one process, one after the other; so do the cells of a notebook.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
NBVAL := --nbval --nbval-current-env --nbval-sanitize-with=tests/sanitize.cfg --nbval-cell-timeout=60

define NO_VENV
make: $(PYTHON) cannot make virtual environments: its venv module (with ensurepip) is missing.
  Debian, Ubuntu: apt-get install python3-venv      Fedora: dnf install python3-pip
  or name another interpreter: make PYTHON=/path/to/python3
endef
export NO_VENV

define OLD_PYTHON
make: tdxlab needs Python 3.11 or newer, and $(PYTHON) is older or missing.
  Name another interpreter: make PYTHON=/path/to/python3.11
endef
export OLD_PYTHON

.PHONY: help
help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' Makefile

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$OLD_PYTHON" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$$NO_VENV" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

.PHONY: install
install: $(READY)  ## make .venv from the lock file

.PHONY: lab
lab: $(READY)  ## copy the notebooks to ./tdxlab-notebooks and open them in JupyterLab
	@$(BIN)/tdxlab lab

.PHONY: test
test: $(READY)  ## every test: recorded traces, pytest over tests and notebooks, the browser
	@$(MAKE) --no-print-directory --keep-going test-conformance test-pytest test-browser

.PHONY: test-conformance
test-conformance: $(READY)  ## replay the recorded traces of the real TDX module and of KVM
	$(BIN)/tdxlab replay data/conformance

.PHONY: test-pytest
test-pytest: $(READY)  ## the tests and the notebooks, in several processes, without the browser
	$(PYTEST) $(PARALLEL) $(NBVAL) notebooks tests --ignore=tests/browser

.PHONY: test-unit
test-unit: $(READY)  ## the tests alone, in several processes, without notebooks and browser
	$(PYTEST) $(PARALLEL) tests --ignore=tests/browser

.PHONY: test-notebooks
test-notebooks: $(READY)  ## nbval, strict, on every notebook; then the series at GPAW 52
	$(PYTEST) $(PARALLEL) $(NBVAL) notebooks tests/test_house_notebooks.py

.PHONY: test-browser
test-browser: $(READY)  ## drive the notebooks in a real browser, two at a time
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder tests/browser

.PHONY: check
check: $(READY)  ## format, lint, types, import contracts, duplicated code
	@$(MAKE) --no-print-directory --keep-going $(CHECKS)

.PHONY: $(CHECKS)
check-format: $(READY)
	$(BIN)/ruff format --check .

check-lint: $(READY)
	$(BIN)/ruff check .

check-types: $(READY)
	$(BIN)/mypy --strict tdxlab

check-imports: $(READY)
	$(BIN)/lint-imports --no-logo

check-duplicates: $(READY)
	$(BIN)/pylint --score=no --disable=all --enable=duplicate-code tdxlab

.PHONY: format
format: $(READY)  ## let ruff format the code and mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: notebooks
notebooks: $(READY)  ## execute every notebook again and save it with its outputs
	$(BIN)/python -m tools.execute_notebooks notebooks

.PHONY: bench
bench: $(READY)  ## the benchmark, as ratios to a plain-Python baseline
	$(BIN)/tdxlab bench

.PHONY: lock
lock: $(READY)  ## pin the newest versions of everything in requirements.lock
	@head -n 2 requirements.lock > requirements.lock.new
	$(BIN)/pip-compile $(PIP_COMPILE_FLAGS) --upgrade --output-file=- pyproject.toml >> requirements.lock.new
	@mv requirements.lock.new requirements.lock

.PHONY: clean
clean:  ## remove .venv, caches and built files; notebooks and ./tdxlab-notebooks stay
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
