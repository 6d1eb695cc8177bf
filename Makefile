# `make study` sets up and runs the quickstart; `make test` sets up and passes the tests.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: study test test-all soak check setup clean

study: $(READY)
	$(BIN)/bigbatch run recipes/quickstart.yaml

test: $(READY)
	$(BIN)/python -m pytest

test-all: $(READY)
	$(BIN)/python -m pytest -m "not gpu" --timeout 3600 --hypothesis-profile new

# About an hour on two idle cores; fewer: make soak KILLS=20
KILLS ?= 200
soak: $(READY)
	$(BIN)/python -m benchmarks.soak --kills $(KILLS)

check: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(READY)

# torch first and by its exact version, so that no other package picks another build of it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[ray,wandb,deepspeed,dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
