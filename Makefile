# `make quickstart` and `make test` do all their own set-up, in .venv, `make test-lowest` in
# .venv-lowest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOWEST := .venv-lowest
PYTEST := --numprocesses logical --maxprocesses 4 --dist loadgroup

.PHONY: quickstart test test-lowest lint install clean

quickstart: $(STAMP)
	$(BIN)/xray run quickstart

test: $(STAMP) lint
	$(BIN)/python -m pytest $(PYTEST)

# The suite with the lowest versions that setup.cfg allows.
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest $(PYTEST)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

$(LOWEST)/.installed: setup.cfg pyproject.toml tools/lowest_versions.py
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(PYTHON) tools/lowest_versions.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c $(LOWEST)/constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) runs data
