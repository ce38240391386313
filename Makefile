# Targets make .venv and install what they need. Python 3.11 or later; no root.
VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$p && break; done)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := $(VENV)/.peers-installed

PEER_TESTS := $(addprefix tests/test_,peft_agreement.py harness.py observers.py row_sources.py cluster.py)

.PHONY: quickstart test test-long test-browser test-peers faults benchmark doctor lab notebooks \
	lint help clean

quickstart: $(INSTALLED)  ## fine-tune a real model, and show the result
	$(BIN)/python -m workbench.runs.notebooks notebooks/00_quickstart.ipynb --out build --echo -p verbose True
	@echo "The executed notebook: build/00_quickstart.ipynb. To look at it: make lab"

test: $(INSTALLED)  ## the tests, every notebook once with small parameters: two at a time
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-long: $(INSTALLED)  ## every kill and disk fault; the notebooks again, compared by nbval
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "long and not browser"

test-browser: $(INSTALLED)  ## the live panel in JupyterLab and Chromium, if there is one
	$(BIN)/python -m pytest -m browser -rs

test-peers: $(PEERS)  ## our adapters, models, rows and sweeps in other tools: PEFT, lm-eval, dask …
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[peers]"
	$(BIN)/python -m pytest -m "not browser" -rs $(PEER_TESTS)

faults: $(INSTALLED)  ## what kills, full disks, hostile files and bad numbers did: a table
	$(BIN)/python -m pytest -m "not browser" tests/faults tests/test_resume.py tests/test_bad_steps.py tests/test_interrupts.py

benchmark: $(PEERS)  ## against mlx-lm and torch with PEFT: about 15 minutes on two CPU cores
	$(BIN)/python -m workbench.runs.notebooks notebooks/09_benchmark.ipynb --out build --echo -p verbose True
	@echo "The executed notebook: build/09_benchmark.ipynb; the figures: notebooks/out/benchmark.json"

doctor: $(INSTALLED)  ## what works on this machine, and how to cure what does not
	$(BIN)/python -m workbench doctor

lab: $(INSTALLED)  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir=.

notebooks: $(INSTALLED)  ## execute every notebook anew, in place; the benchmark has its own target
	$(BIN)/python -m workbench.runs.notebooks $(filter-out notebooks/09_%,$(wildcard notebooks/*.ipynb))

lint: $(INSTALLED)  ## ruff, on code and notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1 \2/p' $(MAKEFILE_LIST) | while read name what; do \
		printf '%-13s %s\n' "$$name" "$$what"; done

clean:  ## remove what the other targets made
	rm -rf $(VENV) build *.egg-info

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later with venv found." \
		"Install one (Debian, Ubuntu: python3-venv; conda: see environment.yml)" \
		"or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "Installing into $(VENV): about a minute, 1 GB"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install -qq -e ".[dev]"
	@touch $@

$(PEERS): $(INSTALLED)
	@echo "Installing torch and PEFT into $(VENV)"
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[benchmarks]"
	@touch $@
