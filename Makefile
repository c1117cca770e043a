# Set-up needs Python 3.11 or 3.12, pip and make; everything else goes into .venv.
PYTHON ?= $(shell for candidate in python3.11 python3.12 python3; do \
	$$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$candidate && break; done)
BIN := .venv/bin
READY := .venv/.ready
COMPILE := $(BIN)/uv pip compile --quiet --no-annotate --no-header --python-version 3.11 pyproject.toml

.PHONY: help install demo test coverage test-slow benchmark lint lock clean

help: ## Show the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(READY) ## Make .venv with the exact versions of requirements-dev.lock

# .venv always has what the tests need, too. Images and clusters install requirements.lock, which is what running needs.
$(READY): requirements-dev.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found. Install one, or name it: make PYTHON=/path/to/python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements-dev.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $(READY)

demo: $(READY) ## Run everything, from a list of URLs to pictures, on this machine
	$(BIN)/unclip run demo

lint: $(READY) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

WHOLE_RUNS := tests/pipelines/test_end_to_end.py
# Tests often wait, so there are more processes than CPUs. The longest files come first, so that none waits for another at the end.
LONGEST := tests/pipelines/test_data_half.py tests/pipelines/test_toy_system.py tests/tasks/stages/test_download.py \
	tests/unclip/training/test_training_on_workers.py tests/unclip/training/test_memory.py
PARTS := --numprocesses 3 --dist loadfile --no-loadscope-reorder $(LONGEST) tests $(addprefix --ignore=,$(WHOLE_RUNS))

test: lint ## Run the tests: parts side by side in three processes, then a whole run, which needs both CPUs, by itself
	$(BIN)/python -m pytest $(PARTS)
	$(BIN)/python -m pytest $(WHOLE_RUNS)

# Apart from `make test`, because counting lines takes a fifth more time. Child processes and Ray's workers are not counted.
coverage: $(READY) ## Run the tests and say which lines of each file none of them reaches in the tests' own processes
	$(BIN)/python -m pytest $(PARTS) --cov --cov-report=
	$(BIN)/python -m pytest $(WHOLE_RUNS) --cov --cov-append --cov-report=term

test-slow: $(READY) ## Run the slow tests
	$(BIN)/python -m pytest -m slow

benchmark: $(READY) ## Compare decoding, embedding, downloading and training with what others use (20 minutes)
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.embed
	$(BIN)/python -m benchmarks.download
	$(BIN)/python -m benchmarks.training

# The second is constrained by the first, so that both name the same versions.
lock: $(READY) ## Resolve requirements-dev.lock and requirements.lock anew from pyproject.toml
	$(COMPILE) --extra dev --output-file requirements-dev.lock
	$(COMPILE) --constraint requirements-dev.lock --output-file requirements.lock

clean: ## Remove .venv and the default storage folder
	rm -rf .venv unclip-data
