# `make demo` and `make test` work from a fresh clone: both first make .venv with everything they need.
#   PYTHON=/path/to/python3.12          the interpreter to build .venv with (default: found on PATH, in pyenv or by uv)
#   LOCK=requirements-cuda13.lock       install JAX with CUDA 13 for an NVIDIA GPU (Linux x86_64)
#   WORKERS=N                           test processes (default 2)
PY := .venv/bin/python
LOCK ?= requirements.lock
WORKERS ?= 2
INSTALLED := .venv/$(LOCK).installed
COMPILE = uv pip compile --quiet --no-header --python-version 3.12 --generate-hashes $(LOCK_FLAGS)
DEMO = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["demo"], sep="\n")
export PYTHON

.PHONY: help demo test lint notebooks lock clean

help:
	@echo 'make demo        serve 24 chat requests with a small real model, on CPU'
	@echo 'make test        lint, types, tests, notebooks and every config at smoke size, on CPU'
	@echo 'make lint        ruff and pyright alone'
	@echo 'make notebooks   run the notebooks anew from their scripts and keep the outputs'
	@echo 'make lock        pin the dependencies anew (needs uv; LOCK_FLAGS=--upgrade for newer versions)'
	@echo 'make clean       remove .venv and caches'

$(INSTALLED): $(LOCK) requirements-demo.lock pyproject.toml
	@bash .ci/install '$(LOCK)'
	@touch $@

demo: $(INSTALLED)
	@$(PY) -m experiments.demo

lint: $(INSTALLED)
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m pyright --pythonpath $(PY)

test: export JAX_PLATFORMS = cpu
test: lint
	@$(PY) -m pytest -m 'not gpu' -n $(WORKERS) --dist loadfile

notebooks: $(INSTALLED)
	@$(PY) -m jupytext --quiet --to ipynb notebooks/*.py
	@$(PY) -c 'from nbclient.cli import main; main()' --inplace notebooks/*.ipynb

lock:
	@$(COMPILE) --universal --extra dev --extra notebooks pyproject.toml -o requirements.lock
	@$(COMPILE) --python-platform x86_64-manylinux_2_28 --extra cuda13 --extra dev --extra notebooks \
	  -c requirements.lock pyproject.toml -o requirements-cuda13.lock
	@uv run --no-project --python '>=3.12' python -c '$(DEMO)' | $(COMPILE) --universal --no-deps - -o requirements-demo.lock

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
