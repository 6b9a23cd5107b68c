# `make test` and `make demo` set everything up themselves: Python >= 3.10, a C++ compiler and make are enough.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
NATIVE := $(shell find csrc -type f)
CPP    := $(filter-out %.md,$(NATIVE)) $(wildcard tests/csrc/*.cpp tests/csrc/*.h)

.PHONY: help setup test test-slow demo bench lint format wheel clean

help:
	@echo "make test       set up .venv and run the fast tests"
	@echo "make test-slow  run every test, sanitizers and both CUDA settings included"
	@echo "make demo       edit the bundled model, show the result in demo-out/"
	@echo "make bench      pytest-benchmark micro-benchmarks"
	@echo "make lint       ruff, clang-format and mypy (make format: apply)"
	@echo "make wheel      sdist and wheel into dist/"

setup: $(STAMP)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("xpatch needs Python 3.10 or newer, found " + sys.version) if sys.version_info < (3, 10) else 0'
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(NATIVE) | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	touch $@

# One worker a core; tests/conftest.py gives each one thread.
test: $(STAMP)
	$(BIN)/python -m pytest -q -m "not slow" -n auto --dist worksteal

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q

demo: $(STAMP)
	$(BIN)/xpatch demo --out demo-out --json demo-out/demo.json

bench: $(STAMP)
	$(BIN)/python -m pytest -q benchmarks --benchmark-enable --benchmark-only

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

wheel: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf build dist demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
