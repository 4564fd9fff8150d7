# Every target builds what it needs in a virtual environment of its own, from the package index alone.
#   make demo                       train on handwritten digits, sample, and measure the samples
#   make test                       the fast tests
#   make test TORCH=torch==2.13.0   the same with a given build of torch
TORCH ?= torch
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format clean

help:
	@sed -n 's/^#   //p' Makefile

# torch is installed first and by itself, so that the requirement given in TORCH decides which build is used.
$(VENV)/.installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[$*]"
	touch $@

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo dist .pytest_cache .ruff_cache .hypothesis
