# `make demo` and `make test` set up what they need: a virtual environment, pinned dependencies, the package.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Options for the suite; CI counts lines (`--cov …`), which takes half as long again.
COVER ?=

.PHONY: demo test lint types check cluster browser seeds clean

demo: $(VENV)/.runtime
	$(BIN)/sparring demo

test: $(VENV)/.dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(COVER)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

check: lint types test

# Processes that play and train together; each starts torch anew, so these are not part of `make test`.
cluster: $(VENV)/.dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m cluster

# The report's pages in a real browser; needs Debian's chromium, skips without. Screenshots: SPARRING_SCREENSHOTS=folder
browser: $(VENV)/.dev
	$(PIP) -e '.[browser]'
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_browser.py

# The figures of docs/demo.md: five seeds, every control.
seeds: $(VENV)/.runtime
	$(BIN)/python benchmarks/demo_seeds.py

$(VENV)/.runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info src/*.egg-info
