# Each target does all its own set-up; a second call is quick. Needs Python 3.11
# or newer (choose one with `make PYTHON=python3.12 ...`), make and git.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

# One thread a process: tests run two at a time, and their results must not
# depend on the number of cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.PHONY: help install check test test-slow demo docs clean

help:
	@echo "make install    a virtual environment in $(VENV) with the tested versions"
	@echo "make check      lint, formatting, types, architecture"
	@echo "make test       the tests, without the slow ones"
	@echo "make test-slow  the slow ones"
	@echo "make demo       train, kill, resume: the same bits?"
	@echo "make docs       the documentation, into docs/_build/html"
	@echo "make clean      remove the environment and everything built"

install: $(STAMP)

# torch comes first and alone: pip then takes the pinned release that its
# settings offer, and nothing later can move it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Helios needs Python 3.11 or newer; '$(PYTHON)' is" \
	    "$$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -qq --constraint constraints.txt torch
	$(PIP) install -qq --constraint constraints.txt --editable '.[dev,docs]'
	@touch $@

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(ONE_THREAD) $(BIN)/python -m pytest -q tests/test_architecture.py

test: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

test-slow: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadgroup -m slow

demo: $(STAMP)
	$(BIN)/python examples/demo.py

docs: $(STAMP)
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf $(VENV) build dist docs/_build .coverage .coverage.* htmlcov
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
