# Everything a clean checkout needs, in one place. `make help` lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PY := .venv/bin/python
STAMP := .venv/.ready

MAJORS := 15 16 17 18
SOAK_MINUTES ?= 20

.PHONY: help setup demo test lint unit test-slow test-majors soak cost-table bench bench-archive clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

$(STAMP): pyproject.toml .ci/constraints.txt .ci/setup
	@bash .ci/setup
	@touch $(STAMP)

setup: $(STAMP) ## Debian packages (if any is missing) and a .venv with pinned Python packages
	@bash .ci/setup --check || bash .ci/setup

demo: setup ## one minute: a database, a mistake, a branch from just before it
	@.venv/bin/tl demo

lint: setup ## formatting, lint, types, layers
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

test: lint ## lint, types and all tests but the slow ones
	$(PY) -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: setup ## the long ones: durability, fidelity over many moments
	$(PY) -m pytest -q -m slow

test-majors: setup ## what depends on Postgres's formats, slow ones too, on every version (fetches them)
	@$(PY) -m tests.support.postgres_wheels $(MAJORS)
	TL_TEST_MAJORS="$(MAJORS)" $(PY) -m pytest -q -n 2 --dist loadfile -m majors

soak: setup ## twenty minutes of a daemon and all its jobs while servers, store and archiver fail (SOAK_MINUTES=3: short)
	$(PY) -m tests.soak.run --minutes $(SOAK_MINUTES)

cost-table: setup ## the README's table of requests, objects and bytes, simulated anew
	$(PY) -m benchmarks.cost --write README.md

bench: setup ## time to first query of a branch, by database size and store
	$(PY) -m benchmarks.branch --json

bench-archive: setup ## archiver throughput beside pg_receivewal
	$(PY) -m benchmarks.archive --json

clean: ## remove what make made (not the Debian packages)
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build *.egg-info
