# Each target sets up what it needs in .venv and works from a fresh clone.
#
#   make demo    train on digits, compare EMA with PreciseBN, write docs/demo.png
#   make test    the whole test suite
#   make lint    ruff, clang-format, mypy
#   make bench   all benchmarks against the peers, into benchmarks/results/
#
# PYTHON chooses the interpreter, TESTFLAGS and BENCHFLAGS are passed on.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Threads of OpenMP that wait by spinning take the cores from each other where other work runs too.
export OMP_WAIT_POLICY ?= PASSIVE

BUILD_INPUTS := setup.py setup.cfg pyproject.toml constraints.txt $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

.PHONY: demo test lint format bench clean

demo: $(VENV)/ready-demo
	$(BIN)/python examples/digits.py $(DEMOFLAGS)

test: $(VENV)/ready-test
	$(BIN)/python -m pytest $(TESTFLAGS)

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
	$(BIN)/mypy

format: $(VENV)/ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

bench: $(VENV)/ready-bench
	$(BIN)/python -m benchmarks --plot $(BENCHFLAGS)

clean:
	rm -rf $(VENV) build dist *.egg-info precisebn/*.so

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The build tools and torch first, so that the extension is built against the very torch that it will run with.
$(VENV)/ready-build: $(VENV)/bin/python constraints.txt
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel ninja numpy torch
	touch $@

$(VENV)/ready-%: $(VENV)/ready-build $(BUILD_INPUTS)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[$*]"
	touch $@
