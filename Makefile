# A fresh machine needs Python 3.11+ and nothing else. Both commands set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread a process: the tests run in two processes, and tiny models gain nothing from more.
TEST_ENV := OMP_NUM_THREADS=1 PYTHONHASHSEED=0
JOBS ?= 2
N ?= 10000
SEED ?= 0

.PHONY: demo test test-all interpreter gpu fuzz lint bench clean

$(VENV)/.done: pyproject.toml tools/setup_venv.sh
	PYTHON=$(PYTHON) bash tools/setup_venv.sh $(VENV)
	touch $@

demo: $(VENV)/.done
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.demo

test: $(VENV)/.done
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) -m "not gpu and not slow and not interpreter"
	$(TEST_ENV) TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) tests/kernels -m "interpreter and not slow"

test-all: $(VENV)/.done
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) -m "not gpu and not interpreter"
	$(TEST_ENV) TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) tests/kernels -m interpreter

gpu: $(VENV)/.done
	$(BIN)/python -m pytest -m gpu

fuzz: $(VENV)/.done
	$(TEST_ENV) $(BIN)/python -m tests.fuzz --examples $(N) --seed $(SEED)

lint: $(VENV)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .import_linter_cache demo-out
