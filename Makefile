# A fresh machine needs Python 3.11+ and nothing else. Both commands set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread a process: the tests run in two processes, and tiny models gain nothing from more. Compiled modules are kept, also where
# images of containers say otherwise: half of what collecting takes is assertions that pytest rewrites.
TEST_ENV := OMP_NUM_THREADS=1 PYTHONHASHSEED=0 PYTHONDONTWRITEBYTECODE=
JOBS ?= 2
N ?= 10000
SEED ?= 0

# What a release of transformers breaks first: families once each, site names, layers, caches, generate() and the commands.
HF_TESTS := tests/models/test_families.py tests/matching/test_attention.py tests/generation/caches/test_sparse_cache.py tests/generation/caches/test_cache_errors.py tests/generation/caches/test_cache_transformers.py tests/passes/test_kv_evict.py tests/models/test_encoders.py \
	tests/commands/test_calibrate_errors.py tests/commands/test_main.py tests/commands/test_meta_model.py tests/graph/test_module_paths.py \
	tests/generation/regions/test_regions.py tests/generation/decoding/test_loop.py tests/generation/caches/test_full_cache.py
QUICK := not gpu and not slow and not interpreter

.PHONY: demo test test-all test-newest test-newest-transformers test-oldest constraints gpu fuzz soak sweep docs lint clean

# .venv holds the versions that last passed, .venv-KIND those that tools/setup_venv.sh says
%/.done: pyproject.toml tools/setup_venv.sh tools/constraints/tested.txt tools/constraints/oldest.txt
	PYTHON=$(PYTHON) bash tools/setup_venv.sh $* $(or $(patsubst .venv-%,%,$(filter .venv-%,$*)),tested)
	touch $@

demo: $(VENV)/.done
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.demo

test: $(VENV)/.done
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) -m "$(QUICK)" $(RECORD)
	$(TEST_ENV) TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) tests/backends -m "interpreter and not slow" $(RECORD)

# The same on the newest releases that the registry has, and on the oldest that are promised; each in an environment of its own.
test-newest: .venv-newest/.done
	$(MAKE) test VENV=.venv-newest

test-oldest: .venv-oldest/.done
	$(MAKE) test VENV=.venv-oldest

# The newest transformers on the tested torch, with the tests that its releases break: short enough for every run of CI.
test-newest-transformers: .venv-newest-transformers/.done
	$(TEST_ENV) .venv-newest-transformers/bin/python -m pytest -n $(JOBS) -m "$(QUICK)" $(HF_TESTS) $(RECORD)

# Renews tools/constraints/tested.txt: the newest releases, frozen once the tests have passed on them.
constraints: test-newest-transformers
	$(MAKE) test VENV=.venv-newest-transformers
	.venv-newest-transformers/bin/python tools/freeze_constraints.py

test-all: $(VENV)/.done
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) -m "not gpu and not interpreter"
	$(TEST_ENV) TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) tests/backends -m interpreter

gpu: $(VENV)/.done
	$(BIN)/python -m pytest -m gpu

fuzz: $(VENV)/.done
	$(TEST_ENV) $(BIN)/python -m tests.fuzz.run --examples $(N) --seed $(SEED) --jobs $(JOBS) $(if $(RECORD),--record)

soak: $(VENV)/.done
	$(TEST_ENV) $(BIN)/python -m tests.models.soak $(if $(RECORD),--record)

# Every model type of transformers, tiny; goes on where it stopped. ONLY=llama,gemma3 for some; RECORD=1 afterwards.
sweep: $(VENV)/.done
	$(TEST_ENV) $(BIN)/python -m tests.sweep.run --attention sdpa eager --jobs $(JOBS) $(if $(ONLY),--only $(ONLY)) $(if $(RECORD),--record)

# The site, build/site/index.html, to be read from the folder as it is. A link that leads nowhere is an error.
.venv-docs/.done: tools/setup_venv.sh tools/constraints/docs.txt
	PYTHON=$(PYTHON) bash tools/setup_venv.sh .venv-docs docs
	touch $@

docs: .venv-docs/.done
	.venv-docs/bin/python tools/site/pages.py build/pages
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "build/site/index.html"

lint: $(VENV)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv* build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .import_linter_cache demo-out
