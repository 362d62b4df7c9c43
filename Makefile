# Everything that is done with this repository. Each target makes .venv first (Python 3.11 or newer).

SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ROOMS := -p mc_opt.ir -p mc_opt.targets -p mc_opt.passes -p mc_opt.tools -p mc_opt.mc_opt
# Added to every pytest run, as in `make test PYTEST_FLAGS=--require-tools`.
PYTEST_FLAGS ?=
UNMARKED := not models and not qemu and not browser and not slow and not gpu
# Test processes: one a core, four at most, as each loads torch.
PYTEST := $(BIN)/pytest -n auto --maxprocesses=4 --dist=worksteal
# One thread: results and times do not depend on what else runs.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help venv demo train test check test-all lint types fmt bench-models bench-headline bench-training bench-speed bench-big clean

help:  ## this list
	@grep -hE '^[a-z][a-z-]*:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "  make %-22s %s\n", $$1, $$2}'

venv: $(STAMP)  ## make .venv from the pinned constraints

# Made again when the constraints or the packaging change. The new stamp is written last, so that an
# interrupted installation is repeated.
$(STAMP): constraints.txt pyproject.toml
	@set -e; python=; for name in python3.11 python3.12 python3.13 python3.14 python3; do \
	  if command -v $$name >/dev/null && $$name -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	  then python=$$name; break; fi; done; \
	if [ -z "$$python" ]; then \
	  echo 'make: Python 3.11 or newer with venv is needed (Debian: apt-get install python3 python3-venv)' >&2; exit 2; fi; \
	rm -f $(STAMP); \
	[ -x $(BIN)/python ] || { echo "making $(VENV) with $$($$python --version)"; $$python -m venv $(VENV); }; \
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,models]'; \
	touch $(STAMP)

demo: $(STAMP)  ## train the digits CNN to Kronecker factors in 4 bits; for ONNX Runtime, x86, ARM and as a C library
	@$(BIN)/python examples/digits/demo.py

train: $(STAMP)  ## train the demo's CNN again (the result is in the repository)
	@$(BIN)/python examples/digits/train.py

test: lint types  ## lint, types, and the unmarked and `ci` tests (10 minutes at most)
	@$(PYTEST) $(PYTEST_FLAGS) -m '($(UNMARKED)) or (ci and not gpu)'

check: lint types  ## lint, types and the unmarked tests (90 seconds at most)
	@$(PYTEST) $(PYTEST_FLAGS) -m '$(UNMARKED)'

test-all: lint types  ## every test: all public models, slow, gpu
	@$(PYTEST) $(PYTEST_FLAGS) -m ''

lint: $(STAMP)  ## ruff: rules, fences and format
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check . || { echo 'some files are not formatted: make fmt' >&2; exit 1; }

fmt: $(STAMP)  ## format, and mend what ruff can mend
	@$(BIN)/ruff check -q --fix . ; $(BIN)/ruff format -q .

# A type checker run on the editable install checks nothing; the link makes the rooms a package again.
types: $(STAMP) .typing/mc_opt  ## mypy --strict on the four rooms
	@MYPYPATH=.typing $(BIN)/mypy --no-error-summary $(ROOMS)

.typing/mc_opt:
	@mkdir -p .typing && ln -sfn .. .typing/mc_opt

bench-models: $(STAMP)  ## every public model: exact passes, then denseshift on x86, each beside its bounds
	@$(BIN)/python -m benchmarks.public_models
	@$(BIN)/python -m benchmarks.public_models --passes fold-batch-norm,denseshift --target x86

bench-headline: $(STAMP)  ## sekron,denseshift on every public model for onnx, x86 and arm (needs qemu-user)
	@$(BIN)/python -m benchmarks.headline

bench-training: $(STAMP)  ## every trained method on 10,000 digits, paired with float (2 hours; goes on where it stopped)
	@$(BIN)/python -m benchmarks.training

bench-speed: $(STAMP)  ## every model beside ONNX Runtime and torch, 1 and 2 threads (an hour; goes on where it stopped)
	@$(BIN)/python -m benchmarks.speed

bench-big: $(STAMP)  ## a model of 2.5 GiB: seconds and peak memory
	@$(BIN)/python -m benchmarks.big_model

clean:  ## remove what make and the tests made (keeps .venv and the fetched models)
	rm -rf out build dist .typing .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
