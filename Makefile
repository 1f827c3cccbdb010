# Each target sets up what it needs in .venv and works from a fresh clone.
#
#   make demo        train on digits, compare EMA with PreciseBN, draw build/demo.png
#   make docs-demo   the same, into docs/demo.png, which the README shows
#   make test        the whole test suite
#   make lint        ruff, clang-format, mypy; builds nothing
#   make format      what of that can be mended without thought
#   make bench       all benchmarks against the peers, into benchmarks/results/
#   make hooks       run `make lint`'s tools on every commit (pre-commit)
#
# PYTHON chooses the interpreter; TESTFLAGS, DEMOFLAGS and BENCHFLAGS are passed on.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

CXX_SOURCES := $(wildcard $(addprefix csrc/,*.h *.cpp */*.h */*.cpp */*.cu */*/*.h */*/*.cpp))
BUILD_INPUTS := setup.py setup.cfg pyproject.toml constraints.txt $(CXX_SOURCES)

.PHONY: demo docs-demo test lint format bench hooks clean

demo: $(VENV)/ready-demo
	$(BIN)/python examples/digits.py $(DEMOFLAGS)

docs-demo: $(VENV)/ready-demo
	$(BIN)/python examples/digits.py --output docs/demo.png $(DEMOFLAGS)

# Threads of OpenMP that wait by spinning take the cores from each other where other work runs too. Tests judge results,
# not speed; benchmarks run in the environment that users have.
test: export OMP_WAIT_POLICY ?= PASSIVE
test: $(VENV)/ready-test
	$(BIN)/python -m pytest $(TESTFLAGS)

lint: $(VENV)/ready-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "$(BIN)/clang-format --dry-run --Werror: $(words $(CXX_SOURCES)) files in csrc/"
	@$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/mypy

format: $(VENV)/ready-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@echo "$(BIN)/clang-format -i: $(words $(CXX_SOURCES)) files in csrc/"
	@$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(VENV)/ready-bench
	$(BIN)/python -m benchmarks --plot $(BENCHFLAGS)

hooks: $(VENV)/ready-lint
	$(BIN)/pre-commit install

clean:
	rm -rf $(VENV) build dist *.egg-info precisebn/*.so precisebn/*.not_built

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/ready-lint: $(VENV)/bin/python requirements-dev.txt constraints.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt torch
	touch $@

# The build tools and torch first, so that the extension is built against the very torch that it will run with.
$(VENV)/ready-build: $(VENV)/bin/python constraints.txt
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel ninja numpy torch
	touch $@

$(VENV)/ready-%: $(VENV)/ready-build $(BUILD_INPUTS)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[$*]"
	touch $@
