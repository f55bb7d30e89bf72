# Each target does its own set-up in .venv; nothing but Python >= 3.11 and make is needed.
# PYTHON=python3.13 chooses the interpreter (then `make clean` first),
# ARGS="-k cancel" is passed to pytest, or to the demo and the benchmark.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check
COMPOSE_SCHEMA := vendor.compose-spec

.DEFAULT_GOAL := help
.SUFFIXES:
.PHONY: help demo test test-long lint lint-ruff lint-mypy lint-pyright lint-imports lint-compose \
	bench bench-smoke bench-parts build ci clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) \
		| while IFS='|' read -r name text; do printf '  make %-13s %s\n' "$$name" "$$text"; done

demo: $(VENV)/installed-demo ## run the five scenarios on a SQLite file and a local S3 server
	$(BIN)/aioblobcol demo $(ARGS)

test: $(VENV)/installed-test ## run the tests, but for those that take minutes
	$(BIN)/python -m pytest -m "not long" $(ARGS)

test-long: $(VENV)/installed-test ## run the tests that take minutes
	$(BIN)/python -m pytest -m long $(ARGS)

lint: lint-ruff lint-mypy lint-pyright lint-imports lint-compose ## check everything but behaviour

lint-ruff: $(VENV)/installed-dev
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check

lint-mypy: $(VENV)/installed-dev
	$(BIN)/python -m mypy

# The package brings node along, so that nothing is downloaded when it runs. Without a file it
# would be content.
lint-pyright: $(VENV)/installed-dev
	@ls tests/typing/*.py >/dev/null
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

lint-imports: $(VENV)/installed-dev
	$(BIN)/lint-imports

lint-compose: $(VENV)/installed-dev
	$(BIN)/check-jsonschema --builtin-schema $(COMPOSE_SCHEMA) docker-compose.yml

# The peers have environments of their own: the tests and the linters run without them.
BENCH := .venv-bench
BENCH_AIOBOTO3 := .venv-bench-aioboto3
RUN_BENCH := $(BENCH)/bin/python benchmarks/run.py \
	--environment aioboto3=$(BENCH_AIOBOTO3)/bin/python

bench: $(BENCH)/installed $(BENCH_AIOBOTO3)/installed ## compare with the peers and judge the goals
	$(RUN_BENCH) --output benchmarks --plot docs/benchmark.png $(ARGS)

bench-smoke: $(BENCH)/installed $(BENCH_AIOBOTO3)/installed ## show that the comparison works
	$(RUN_BENCH) --smoke $(ARGS)

$(BENCH)/installed: pyproject.toml
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install -qq --disable-pip-version-check --editable ".[bench]"
	@touch $@

$(BENCH_AIOBOTO3)/installed:
	$(PYTHON) -m venv $(BENCH_AIOBOTO3)
	$(BENCH_AIOBOTO3)/bin/python -m pip install -qq --disable-pip-version-check "aioboto3>=15.5"
	@touch $@

bench-parts: $(VENV)/installed-test ## time managed columns and the journal by themselves
	$(BIN)/python benchmarks/create_row.py $(ARGS)
	$(BIN)/python benchmarks/managed_create.py
	$(BIN)/python benchmarks/journal_triggers.py
	$(BIN)/python benchmarks/journal_create.py

build: $(VENV)/installed-dev ## build the wheel and the source archive into dist/
	rm -rf dist
	$(BIN)/python -m build --quiet >/dev/null
	@ls dist

ci: ## run what has to pass before a merge
	bash .ci/run

clean: ## remove environments, caches and builds
	rm -rf $(VENV) $(BENCH) $(BENCH_AIOBOTO3) .venv-ci-* dist build .mypy_cache .pytest_cache .ruff_cache
	rm -rf .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The extras contain each other: whoever has dev needs no installation for test.
within-dev := test demo
within-test := demo
$(VENV)/installed-%: $(VENV)/created pyproject.toml
	$(INSTALL) --editable ".[$*]"
	@touch $@ $(addprefix $(VENV)/installed-,$(within-$*))

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'aioblobcol needs Python 3.11 or later; `$(PYTHON)` is not.' >&2; \
		echo 'Name another one: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@
