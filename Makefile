# Two commands are enough: `make train` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
SHELL := /bin/bash
BIN := .venv/bin

.PHONY: help train test test-full check audit install format clean

help:      ## show this
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

train: .venv/installed  ## prepare the embedded data, train the small hybrid model, print the results
	$(BIN)/python train.py

test: .venv/installed-test  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-full: .venv/installed-test  ## the tests with 50 kills and 20,000 examples instead of 5 and 500; log in test-full.log
	set -o pipefail; MMBERT_FULL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --timeout=3600 \
		--durations=20 2>&1 | tee test-full.log

check: .venv/installed-dev  ## what CI runs besides the tests: lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

audit: .venv/installed-dev  ## known vulnerabilities of what is installed; needs the network
	$(BIN)/python -m pip install --quiet --editable '.[audit]'
	@# Without --strict what the service does not know would pass as clean.
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' > .venv/frozen.txt
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement .venv/frozen.txt

install: .venv/installed  ## create .venv and install mmbert into it

format: .venv/installed-dev  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:     ## remove the environment and the drawn data; runs/ stays
	rm -rf .venv build dist *.egg-info data/shapes/images data/shapes/annotations data/shapes/tokenizer

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mmbert needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/installed-test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@ .venv/installed

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ .venv/installed .venv/installed-test
