# Two commands for everybody, `make demo` and `make test`; the rest is for developers. Each does its own set-up.

PYTHON ?= python3
PYTEST_ARGS ?=
WORKERS ?= auto
PORT ?= 3000

BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq
FAST := not slow and not rgw and not browser and not foreign

.PHONY: help demo ui test test-all test-lowest fuzz check format bench docs site lock clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The lock is complete, so pip resolves nothing (--no-deps) and takes nothing that has no hash there: hatchling, which
# builds the editable install, comes from it as well (--no-build-isolation).
$(READY): requirements.lock pyproject.toml
	@test -x $(BIN)/pip || PYTHON=$(PYTHON) tools/make-venv .venv
	@echo "blobflow: installing the locked dependencies into .venv"
	@$(PIP) install --no-deps --require-hashes -r requirements.lock
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

# The demo's runs are kept, so that `make ui` shows them. dg warns unless it runs in the activated project environment.
DG := DAGSTER_HOME=$(CURDIR)/.blobflow/dagster VIRTUAL_ENV=$(CURDIR)/.venv PATH=$(CURDIR)/$(BIN):$$PATH dg
.blobflow/dagster/dagster.yaml: examples/dagster.yaml
	@mkdir -p $(@D)
	@cp $< $@

demo: $(READY) .blobflow/dagster/dagster.yaml ## move a real directory through all five steps, into .blobflow/
	@$(DG) launch --assets '+key:"demo/mirror"' \
	    --config-json '{"loggers": {"console": {"config": {"log_level": "INFO"}}}}'
	@DEMO_STORE=$${BLOBFLOW_STORE:-.blobflow/store}; printf '%s\n' '' \
	    "The store:   $$DEMO_STORE      $(BIN)/blobflow --store $$DEMO_STORE ls" \
	    "The mirror:  $${BLOBFLOW_MIRROR:-.blobflow/mirror}/current" \
	    "The run:     make ui"

ui: $(READY) .blobflow/dagster/dagster.yaml ## open Dagster's web UI with the demo's runs (PORT=3000)
	@$(DG) dev --no-check-yaml --host 127.0.0.1 --port $(PORT)

test: $(READY) ## the tests that need nothing but this checkout
	@$(BIN)/python -m pytest -n $(WORKERS) -m "$(FAST)" $(PYTEST_ARGS)

# In CI a missing server or browser is a failure, not a skip.
test-all: export BLOBFLOW_CI := $(if $(filter true 1,$(CI)),1)
test-all: $(READY) ## every test, also the slow ones and those that need Ceph, a browser or a foreign server
	@$(BIN)/python -m pytest -n $(WORKERS) --maxschedchunk=1 $(PYTEST_ARGS)

# atheris has no wheel for every machine and every Python, so it is not in the lock: it gets an environment beside it,
# which sees the locked one.
FUZZ := .venv-fuzz
FUZZ_SECONDS ?= 600
FUZZ_ARGS ?=
$(FUZZ)/.ready: $(READY) tests/fuzz/requirements.txt
	@test -x $(FUZZ)/bin/pip || PYTHON=$(BIN)/python tools/make-venv $(FUZZ)
	@$(FUZZ)/bin/python tests/fuzz/borrow.py .venv
	@$(FUZZ)/bin/python -m pip --disable-pip-version-check --no-input -qq install --only-binary :all: \
	    -r tests/fuzz/requirements.txt || echo "blobflow: no atheris for $$($(FUZZ)/bin/python -V) on this" \
	    "$$(uname -m): the fuzzing will be without coverage, which finds less"
	@touch $@

fuzz: $(FUZZ)/.ready ## every parser of foreign bytes, FUZZ_SECONDS=600 each (FUZZ_ARGS="--target index" for one)
	@$(FUZZ)/bin/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)

# Without the lock: what `pip install blobflow` may meet at the worst. botocore is held down beside s3fs, which would take
# the newest. Development tools are at their lowest, too.
LOWEST := .venv-lowest
test-lowest: $(READY) ## the unit tests on the lowest version of everything that pyproject.toml asks for
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(LOWEST)
	@$(BIN)/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct -e '.[mirror,ui]' \
	    --group dev 'botocore<1.41'
	@BLOBFLOW_LOWEST=1 $(LOWEST)/bin/python -m pytest -n $(WORKERS) -m "$(FAST)" tests/unit $(PYTEST_ARGS)

check: $(READY) ## lint, format, types and the layers of the house
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright
	@$(BIN)/lint-imports --no-logo

format: $(READY) ## let ruff mend what it can
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

bench: $(READY) ## blobflow and every peer that is installed, in one table
	@$(BIN)/python -m benchmarks

docs: $(READY) ## screenshots, docs/seeds.md and the site
	@$(BIN)/python docs/tools/seeds_page.py
	@$(if $(wildcard docs/tools/screenshots.py),$(BIN)/python docs/tools/screenshots.py)
	@$(MAKE) --no-print-directory site

site: $(READY) ## the documentation site in site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lock: $(READY) ## renew requirements.lock from pyproject.toml (UPGRADE=--upgrade for newer versions)
	@$(BIN)/uv pip compile pyproject.toml --extra ui --group dev --group docs --universal --python-version 3.10 \
	    --generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
	    $(UPGRADE) --quiet --output-file requirements.lock

clean: ## remove what the demo, the tests and the docs left here
	@rm -rf .blobflow .venv-fuzz .fuzz site dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
