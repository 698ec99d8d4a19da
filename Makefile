# make quickstart: the whole road on data drawn here. make test: checks and the quick tests.
# make test-all: the slow ones. make test-cluster: those on hosts in network namespaces, as root.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# Slow tests that compute, two files at a time, the longest first.
COMPUTING := tests/test_quickstart.py tests/contract tests/detectors tests/weights tests/nn tests/anchors tests/data \
  tests/training tests/test_fitting.py tests/test_cli.py tests/test_cli_anchors.py tests/bench
# Those that harm a cluster or wait for one's answer in time want the machine for themselves.
ALONE := $(addprefix tests/cluster/test_, jobs.py lost_head.py resume.py watchdog.py faults.py exhausted.py doctor.py)

.PHONY: setup quickstart test test-all test-cluster check format constraints clean

setup: $(READY)

# uv takes torch and torchvision from one index: pip would prefer a local CPU build that torchvision cannot import with.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --build-constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: setup
	$(BIN)/onestage quickstart

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m 'not slow and not cluster'

test-all: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow $(COMPUTING)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'slow and not cluster' \
	  tests $(COMPUTING:%=--ignore=%) $(ALONE:%=--ignore=%)
	$(BIN)/pytest -m 'slow and not cluster' $(ALONE)

test-cluster: setup
	$(BIN)/pytest -m cluster

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Pins for Python 3.11 to 3.13 of everything that setup installs.
constraints: setup
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-header --no-annotate \
	  --no-emit-index-url --upgrade pyproject.toml --output-file constraints.txt

clean:
	rm -rf .venv runs shards quickstart mlruns mlflow.db
