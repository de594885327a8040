# `make demo` and `make test` do all of their own set-up. PYTHON chooses the interpreter, VENV where it is installed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
comma := ,

.PHONY: help demo test setup lint fast slow clean

help:
	@echo "make demo    quantize a real language model and show what it costs (writes demo/)"
	@echo "make test    lint, type check and the fast tests with coverage"
	@echo "make slow    tests on real models (minutes, downloads weights)"

# What is installed is decided by what can be imported, so that either command completes the other's set-up.
define install
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c "import $(1)" 2>/dev/null || \
		{ $(BIN)/python -m pip install --quiet --upgrade pip && \
		$(BIN)/python -m pip install --quiet --editable ".[$(2)]"; }
endef

demo:
	$(call install,jaxq$(comma) rdata,demo)
	$(BIN)/python demo/run.py

test: lint fast

# torch is a test dependency: the models are compared with the originals.
setup:
	$(call install,jaxq$(comma) rdata$(comma) pytest$(comma) torch,test$(comma)parity)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

fast: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov=jaxq --cov-report=term-missing:skip-covered --cov-fail-under=90

slow: setup
	$(BIN)/python -m pytest -m slow --durations=0

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .coverage demo/results.json demo/report.html demo/out
