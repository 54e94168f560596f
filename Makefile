# Everything runs in .venv; `make setup` makes it, and every other target calls that first.
PYTHON ?= python3
UV_VERSION := 0.13.9
BIN := .venv/bin
UV := $(BIN)/uv
STAMP := .venv/.synced
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
NEXT_DUCKDB := duckdb==2.0.0
export UV_PYTHON_DOWNLOADS := never
unexport VIRTUAL_ENV

.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help setup test lint typecheck imports unit test-kube test-cluster cluster-up cluster-down cluster-tools next-duckdb soak format docs demo bench images wheel clean

# List the targets.
help:
	@awk '/^# /{text=substr($$0,3)} /^[a-z][a-z-]*:/{if(text){sub(/:.*/,"");printf "  make %-14s %s\n",$$0,text}; text=""} /^$$/{text=""}' Makefile

# Make .venv with the locked dependencies (needs Python 3.11+ and a package index).
setup: $(STAMP)

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say which with make PYTHON=...")'
	@echo "== making .venv"
	@$(PYTHON) tools/bootstrap.py .venv uv==$(UV_VERSION)

$(STAMP): $(UV) uv.lock pyproject.toml
	@echo "== installing the locked dependencies"
	@$(UV) sync --frozen --inexact --quiet --compile-bytecode
	@$(BIN)/python -m compileall -q operator worker_image
	@touch $(STAMP)

# Run every check and every test; what CI runs.
test: lint typecheck imports unit test-kube next-duckdb
	@printf '\nall green\n'

# Check style and layout with ruff.
lint: setup
	@printf '\n== ruff\n'
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

# Check types with mypy --strict.
typecheck: setup
	@printf '\n== mypy --strict\n'
	@$(BIN)/mypy

# Check who imports whom.
imports: setup
	@printf '\n== import rules\n'
	@$(BIN)/lint-imports --no-cache

# Run pytest over all suites but those on Kubernetes.
unit: setup
	@printf '\n== pytest\n'
	@$(BIN)/pytest -q --ignore=tests/cluster --ignore=tests/kube_api --ignore=tests/chart

# Run the tests on an API server without nodes: operator, kinds, chart.
test-kube: setup
	@printf '\n== on an API server\n'
	@$(BIN)/pytest -q tests/kube_api tests/chart

# Run the tests on a cluster, made for them if there is none.
test-cluster: setup
	@printf '\n== on a cluster\n'
	@$(BIN)/pytest -q tests/cluster

# Make a two-node Kubernetes cluster and leave it up.
cluster-up: setup
	@PYTHONPATH=tests $(BIN)/python -m cluster.harness up

# Remove the cluster of cluster-up without a trace.
cluster-down: setup
	@PYTHONPATH=tests $(BIN)/python -m cluster.harness down

# Build what a cluster needs into the cache, or only some: TOOLS="helm kubectl".
cluster-tools: setup
	@PYTHONPATH=tests $(BIN)/python -m cluster.harness tools $(TOOLS)

# Run the ledger's tests on the next major version of DuckDB.
next-duckdb: setup
	@printf '\n== the ledger on %s\n' '$(NEXT_DUCKDB)'
	@$(UV) run --frozen --isolated --quiet --with '$(NEXT_DUCKDB)' pytest -q -p no:cacheprovider $$(ls tests/unit/test_db_*.py tests/integration/test_ledger_*.py tests/contract/test_ledger_*.py tests/integration/test_api_storage_history.py)

# Run the long forms: simulation (SEEDS=50000), faults, poison, power loss, fuzzing, load (MINUTES=10).
soak: SEEDS ?= 50000
soak: MINUTES ?= 10
soak: setup
	@printf '\n== %s minutes at load\n' '$(MINUTES)'
	@CASPARIAN_SOAK_SECONDS=$$(( $(MINUTES) * 60 )) $(BIN)/pytest -q -s tests/chaos/test_steady_load.py
	@printf '\n== 1,000 kills and stops; poison among 10,000 files\n'
	@CASPARIAN_CHAOS_FAULTS=1000 CASPARIAN_POISON_FILES=10000 $(BIN)/pytest -q -s tests/chaos/test_random_kills.py tests/chaos/test_poison_files.py
	@printf '\n== power loss and fuzzing\n'
	@CASPARIAN_POWER_CUTS=10000 CASPARIAN_FUZZ_FRAMES=10000000 CASPARIAN_FUZZ_SOURCES=1000000 CASPARIAN_FUZZ_MCP_CALLS=10000 $(BIN)/pytest -q -s --timeout=86400 $(wildcard tests/power tests/fuzz)
	@printf '\n== 200 plugins under one operator\n'
	@CASPARIAN_PLUGINS=200 $(BIN)/pytest -q -s --timeout=900 tests/kube_api/test_operator_life.py
	@printf '\n== simulation, %s seeds\n' '$(SEEDS)'
	@CASPARIAN_SIM_SEEDS=$(SEEDS) $(BIN)/pytest -q -s tests/simulation

# Reformat the sources.
format: setup
	@$(BIN)/ruff check --fix --quiet; $(BIN)/ruff format

# Write the tables of docs/configuration.md and docs/cli.md, and crds/, anew.
docs: setup
	@$(BIN)/python tools/reference.py
	@$(BIN)/python tools/crds.py
	@$(BIN)/python tools/chart.py

# Show the whole flow on real files; leaves its results in ./demo.
demo: setup
	@$(BIN)/python examples/demo.py

# Measure speed beside peers into docs/benchmarks.md; one row: ROW=3; small sizes: QUICK=1.
bench: setup
	@$(UV) sync --frozen --inexact --quiet --group bench
	@$(BIN)/python -m bench $(if $(ROW),--row $(ROW)) $(if $(QUICK),--quick)

# Build the images casparian-operator and casparian-worker with docker; other base: BASE_IMAGE=...
images:
	@for part in operator worker; do \
		DOCKER_BUILDKIT=1 docker build --network=host $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) \
			--file Dockerfile.$$part --tag casparian-$$part:$(VERSION) . || exit 1; done
	@docker image ls --format '{{.Repository}}:{{.Tag}}  {{.Size}}' | grep '^casparian-.*:$(VERSION) '

# Build the wheel and the source archive into dist/.
wheel: setup
	@$(UV) build --quiet && ls dist

# Remove what the other targets made.
clean:
	@rm -rf .venv build dist demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
