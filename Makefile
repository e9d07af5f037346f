# Every target makes its own .venv and redoes it only when the pins changed.
PYTHON ?= python3
PROFILE ?= laptop
OUT ?= runs/$(PROFILE)
VENV := .venv
BIN := $(VENV)/bin
PINS := $(shell cat constraints.txt pyproject.toml | cksum | cut -d' ' -f1)
READY := $(VENV)/ready-$(PINS)
RUN := $(BIN)/python -m nbs_lib.run

.PHONY: demo test run bench notebooks clean help

help:            ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*##/\t/'

$(READY):
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)   ## the whole chain on a synthetic paddock -> runs/demo
	$(RUN) --profile demo --output runs/demo $(ARGS)

test: $(READY)   ## every check
	$(BIN)/python -m ruff check tests nbs_lib
	$(BIN)/python -m pytest

run: $(READY)    ## the chain on DATA=path/to/csiro-biomass, PROFILE=laptop
	@test -n "$(DATA)" || { echo "error: say where the competition's folder is: make run DATA=path/to/csiro-biomass PROFILE=laptop" >&2; exit 2; }
	$(RUN) --profile $(PROFILE) --input "$(DATA)" --output "$(OUT)" $(ARGS)

bench: $(READY)  ## speed and memory, side by side -> runs/bench
	$(BIN)/python -m nbs_lib.bench --output runs/bench $(ARGS)

notebooks: $(READY)  ## execute the lessons again and export the library
	$(BIN)/python tests/notebooks.py --write
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export

clean:           ## remove what was made, but for the .venv
	rm -rf runs build dist wheelhouse *.egg-info .pytest_cache .ruff_cache catboost_info
