# `make` runs the server, `make test` the tests, `make help` lists the rest. Each target installs what it needs first: a machine without uv
# gets one in .uv/. Nothing outside this folder is written except caches. Works with GNU make 3.81 and bash 3.2, the versions of macOS.

SHELL := /bin/bash
PYTHON ?= python3
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
PY := .venv/bin/python

# On a Mac, uv installs and keeps this Python, which .ci/run tests too. An upgrade of Homebrew would remove its own, and .venv with it.
MAC_PYTHON := 3.11
ifeq ($(shell uname -s),Darwin)
export UV_PYTHON := $(MAC_PYTHON)
export UV_MANAGED_PYTHON := 1
endif

# Empty, unless the Python of .venv has been removed.
BROKEN := $(shell test ! -e .venv || $(PY) -S -c '' 2>/dev/null || echo broken-environment)
# On a terminal, uv shows what it downloads.
QUIET := $(shell test -t 2 || echo --quiet)

# If it were set, Python would compile all modules again at every start, which takes seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run setup test check clients bench bench-reading bench-attacks bench-csm bench-guard acceptance soak audit clean help
.PHONY: broken-environment

run: .venv/.run-stamp ## run the server on port 8880 (the default target)
	@test ! -t 2 || printf 'Starting\r' >&2
	@exec $(PY) server.py

setup: .venv/.run-stamp ## install the server's packages into .venv

test: .venv/.dev-stamp ## run all tests; one file: make test ARGS=tests/test_config.py
	$(PY) -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

check: .venv/.dev-stamp ## run the linter, the format check and the type checker
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Without them, the tests that run them are skipped.
clients: | $(UV) ## install OpenClaw, OpenAI's libraries and other clients for their tests (1.6 GB)
	UV=$(abspath $(UV)) tests/clients/install.sh

bench: .venv/.dev-stamp ## measure speed and latency with the built-in voice
	$(PY) benchmarks/speech.py

bench-reading: .venv/.dev-stamp ## measure how much of written text is heard right, with and without verbalizing
	$(PY) benchmarks/reading.py

bench-attacks: .venv/.dev-stamp ## attack a server in all known ways for two minutes; measure stalls and an honest client's waits
	$(PY) benchmarks/attacks.py $(ARGS)

bench-csm: .venv/.dev-stamp ## measure CSM's generation with a small random model
	$(PY) benchmarks/csm.py

bench-guard: .venv/.dev-stamp ## measure which failures of CSM's speech the quality checks find
	$(PY) benchmarks/guard.py $(ARGS)

acceptance: .venv/.dev-stamp ## check the requirements on this machine: speed, memory, words, recovery; prints a table
	$(PY) benchmarks/acceptance.py $(ARGS)

soak: .venv/.dev-stamp ## send 10,000 mixed requests; fails if memory, processes or files leak
	$(PY) benchmarks/soak.py $(ARGS)

# Not part of `check`, because it needs the network.
audit: .venv/.dev-stamp ## look up known vulnerabilities of the installed packages
	.venv/bin/pip-audit --local

clean: ## remove everything that the other targets installed or wrote here
	rm -rf .venv .uv .mypy_cache .ruff_cache .pytest_cache .hypothesis .tiny-csm test-results acceptance \
		tests/clients/.venv tests/clients/.venv-wyoming tests/clients/node_modules

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

# Stamp files, so that later runs do not start uv. --inexact keeps packages that other targets installed.
.venv/.run-stamp: pyproject.toml $(BROKEN) | $(UV)
	@echo "Installing the Python packages into .venv" >&2
	@$(UV) sync $(QUIET) --inexact
	@touch $@

.venv/.dev-stamp: pyproject.toml $(BROKEN) | $(UV)
	@echo "Installing the Python packages into .venv, with the tests' tools" >&2
	@$(UV) sync $(QUIET) --inexact --group dev
	@touch $@ .venv/.run-stamp .venv/.mcp-stamp

# For `sesame mcp` only.
.venv/.mcp-stamp: pyproject.toml $(BROKEN) | $(UV)
	@echo "Installing the packages of sesame mcp into .venv" >&2
	@$(UV) sync $(QUIET) --inexact --group mcp
	@touch $@ .venv/.run-stamp

broken-environment:
	@echo ".venv/bin/python does not run: its Python was removed or upgraded. Installing the environment again." >&2
	rm -rf .venv

.uv/bin/uv:
	@echo "Installing uv, which installs Python packages, into .uv" >&2
	@$(PYTHON) -m venv .uv
	@.uv/bin/pip install $(QUIET) --disable-pip-version-check uv==0.13.9
