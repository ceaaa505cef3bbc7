# Every target prepares what it needs; see README.md.

PYTHON ?= python3

.PHONY: help setup demo test lint docs clean

help:
	@echo "make demo    set up, then run a real vLLM server with and without trimtab"
	@echo "make test    set up, then lint, types, unit and integration tests"
	@echo "make setup   create .venv with the pinned CPU stack and every distribution"
	@echo "make lint    style, types, import arrows, spelling, documentation"
	@echo "make docs    serve the documentation"
	@echo "make clean   remove .venv, .tox and what the tools left"

setup:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "there is no $(PYTHON): install Python 3.11, 3.12 or 3.13" >&2; exit 2; }
	@"$(PYTHON)" tools/setup.py

demo: setup
	@.venv/bin/python -m trimtab.cli demo

test: setup
	@.venv/bin/python -m tox run -e lint,types,unit
	@.venv/bin/python -m tox run -qq -e integration

lint: setup
	@.venv/bin/python -m tox run -e lint,types

docs: setup
	@.venv/bin/python -m mkdocs serve

clean:
	rm -rf .venv .tox .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis site
