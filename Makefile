# Two commands do everything: `make run` serves, `make test` tests. Both set up what they need first.
# A machine without uv gets one in .uv/, through pip in a private environment; outside this folder only caches are written.

SHELL := /bin/bash
PYTHON ?= python3
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
PY := .venv/bin/python

# With it set, every start would compile every module again: seconds, each time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run setup test check clean bench bench-csm soak audit clients

run: .venv/.run-stamp
	@exec $(PY) server.py

setup: .venv/.run-stamp

# A stamp, so that a second start does not even ask uv. --inexact keeps what another target has installed.
.venv/.run-stamp: pyproject.toml | $(UV)
	$(UV) sync --quiet --inexact
	@touch $@

.venv/.dev-stamp: pyproject.toml | $(UV)
	$(UV) sync --quiet --inexact --group dev
	@touch $@ .venv/.run-stamp

.uv/bin/uv:
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet --disable-pip-version-check uv==0.13.9

test: .venv/.dev-stamp
	$(PY) -m pytest --numprocesses 2 --dist loadfile $(ARGS)

check: .venv/.dev-stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# OpenClaw, OpenAI's libraries and others, for the tests that run them; about 1.6 GB. Without it those tests are skipped.
clients: | $(UV)
	UV=$(abspath $(UV)) tests/clients/install.sh

bench: .venv/.dev-stamp
	$(PY) benchmarks/speech.py

bench-csm: .venv/.dev-stamp
	$(PY) benchmarks/csm.py

# Mixed requests for as long as ARGS say, and what they leave behind: test-results/soak.png and a verdict.
soak: .venv/.dev-stamp
	$(PY) benchmarks/soak.py $(ARGS)

# Asks an advisory database on the network, so it is no part of `check`.
audit: .venv/.dev-stamp
	.venv/bin/pip-audit --local

clean:
	rm -rf .venv .uv .mypy_cache .ruff_cache .pytest_cache .hypothesis .tiny-csm test-results \
		tests/clients/.venv tests/clients/.venv-wyoming tests/clients/node_modules
