# `make quickstart` and `make test` do all their own set-up, in .venv, `make test-lowest` in
# .venv-lowest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOWEST := .venv-lowest
# Without an NVIDIA GPU, torch comes from this index if it answers: without the libraries of CUDA.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
GPU ?= /dev/nvidiactl
PIP := -m pip install --quiet --disable-pip-version-check
ANSWERS := import sys, urllib.request as web; web.urlopen(sys.argv[1], timeout=5)
PYTEST := --numprocesses auto --dist loadgroup --no-loadscope-reorder

.PHONY: quickstart test test-lowest lint docs install clean

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

# The manual, as a site: site/index.html. A warning is an error.
docs: $(STAMP)
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d site/.doctrees docs site

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if ! test -e $(GPU) && timeout 10 $(BIN)/python -c "$(ANSWERS)" $(CPU_INDEX)/ 2> /dev/null; then \
		$(BIN)/python $(PIP) --retries 1 --timeout 15 torch torchvision --index-url $(CPU_INDEX) \
			|| echo "torch for the CPU was not installed: PyPI's build follows, with CUDA"; \
	fi
	$(BIN)/python $(PIP) -e ".[dev,docs]"
	touch $@

$(LOWEST)/.installed: setup.cfg pyproject.toml tools/lowest_versions.py
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(PYTHON) tools/lowest_versions.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python $(PIP) -c $(LOWEST)/constraints.txt -e ".[dev,docs]"
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) runs data site
