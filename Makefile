# `make train` and `make test` create .venv and install mmbert first. `make help` lists all targets.
PYTHON ?= python3
SHELL := /bin/bash
BIN := .venv/bin

.PHONY: help train test test-full check audit install format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

train: .venv/installed  ## train the quickstart: a small hybrid model on data/shapes, which is generated if it is missing
	$(BIN)/python train.py

test: .venv/installed-test  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-full: .venv/installed-test  ## run the tests with 10 to 50 times as many random cases; log in test-full.log
	set -o pipefail; MMBERT_FULL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --timeout=3600 \
		--durations=20 2>&1 | tee test-full.log

check: .venv/installed-dev  ## lint, format check and type check, as in CI
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

audit: .venv/installed-dev  ## list known vulnerabilities of installed packages; needs the network
	$(BIN)/python -m pip install --quiet --editable '.[audit]'
	@# Without --strict a package that the service does not know would count as clean.
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' > .venv/frozen.txt
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement .venv/frozen.txt

install: .venv/installed  ## create .venv and install mmbert in it

format: .venv/installed-dev  ## format the code and fix lint errors
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove .venv, builds and generated data; keep runs/
	rm -rf .venv build dist *.egg-info data/shapes/{images,annotations,tokenizer,.lock} data/easy_vqa/{tokenizer,.lock}

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mmbert needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml setup.py | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/installed-test: pyproject.toml setup.py | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@ .venv/installed

.venv/installed-dev: pyproject.toml setup.py | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ .venv/installed .venv/installed-test
