# Every target makes its own .venv and redoes it only when the pins changed.
PYTHON ?= python3
PROFILE ?= laptop
GPU ?= T4x2
OUT ?= runs/$(PROFILE)
TO ?= weights
MODEL ?= runs/demo/model.zip
VENV := .venv
BIN := $(VENV)/bin
PINS := $(shell cat constraints.txt pyproject.toml | cksum | cut -d' ' -f1)
READY := $(VENV)/ready-$(PINS)
RUN := $(BIN)/python -m nbs_lib.run

# Kaggle's image, rebuilt: Python 3.12 and the packages of constraints-kaggle.txt, nothing else.
# A python3.12 counts when it runs: the shims that pyenv puts on the path do so only for a version that is switched on.
PYTHON312 ?= $(shell for p in $$(which -a python3.12) "$$(pyenv root 2>/dev/null)"/versions/3.12*/bin/python3.12 "$$(uv python find 3.12 2>/dev/null)"; do \
	"$$p" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo "$$p" && break; done)
IMAGE := .venv-kaggle
IMAGE_READY := $(IMAGE)/ready-$(shell cksum < constraints-kaggle.txt | cut -d' ' -f1)
LOCK := datasets-metadata/wheels/wheelhouse.lock
KAGGLE := $(BIN)/python -m nbs_lib.kaggle
SPREAD := -n logical --maxprocesses 3 --dist loadfile  # a process a core, two gigabytes each; what a file's tests share is made once
SENDING := $(if $(filter 1 yes,$(SEND)),--send)

.PHONY: demo test test-all run predict bench results budget wheelhouse test-kaggle test-lowest weights push submit data notebooks clean help

help:            ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*##/\t/'

$(READY):
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)   ## the whole chain on a synthetic paddock, and a bundle of it -> runs/demo, runs/demo/model.zip
	$(RUN) --profile demo --output runs/demo $(ARGS)
	$(BIN)/python -m nbs_lib.predict pack runs/demo --to runs/demo/model.zip

test: $(READY)   ## every check but the long drills
	$(BIN)/python -m ruff check nbs_lib tests tools benchmarks notebooks
	$(BIN)/python -m pytest $(SPREAD) -m "not slow"

test-all: $(READY)  ## the long drills that `make test` leaves out
	$(BIN)/python -m pytest $(SPREAD) -m slow

run: $(READY)    ## the chain on DATA=path/to/csiro-biomass, PROFILE=laptop
	@test -n "$(DATA)" || { echo "error: say where the competition's folder is: make run DATA=path/to/csiro-biomass PROFILE=laptop" >&2; exit 2; }
	$(RUN) --profile $(PROFILE) --input "$(DATA)" --output "$(OUT)" $(ARGS)

predict: $(READY) ## MODEL=runs/laptop (or a bundle), PHOTOS=folder: grams and kg/ha of any photos -> runs/predictions
	@test -n "$(PHOTOS)" || { echo "error: PHOTOS is empty; make predict MODEL=runs/laptop PHOTOS=folder" >&2; exit 2; }
	$(BIN)/python -m nbs_lib.predict --model "$(MODEL)" $(PHOTOS) --output runs/predictions $(ARGS)

budget: PROFILE = kaggle
budget: $(READY) ## will it fit? GPU memory, hours, disk of PROFILE=kaggle, GPU=T4x2 -> runs/budget
	$(BIN)/python -m nbs_lib.budget --profile $(PROFILE) --gpu $(GPU) --output runs/budget $(ARGS)

bench: $(READY)  ## speed and memory, side by side -> runs/bench
	$(BIN)/python -m benchmarks.bench --output runs/bench $(ARGS)

results: demo    ## keep the demo's scores and picture, and what `make bench` measured -> results/, README.md
	$(BIN)/python tools/tables.py --run runs/demo $(if $(wildcard runs/bench/bench.csv),--bench runs/bench) --write

$(IMAGE_READY):
	@test -n "$(PYTHON312)" || { echo "error: Kaggle has Python 3.12 and none that runs was found here (on the path, below pyenv, or by uv): install it, or say where: make $(MAKECMDGOALS) PYTHON312=path/to/python3.12" >&2; exit 2; }
	$(PYTHON312) -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 12) else "Python 3.12 is needed, this is " + sys.version.split()[0])'
	$(PYTHON312) -m venv --clear $(IMAGE)
	$(IMAGE)/bin/python -m pip install --quiet --requirement constraints-kaggle.txt
	touch $@

wheelhouse: $(READY) $(IMAGE_READY)  ## wheels for an offline kernel, and those in wheelhouse/extra/ -> wheelhouse/, verified in Kaggle's image
	$(KAGGLE) wheelhouse --image $(IMAGE) $(ARGS)

NO_NBDEV := tests/test_house.py::test_library_and_notebooks_agree tests/test_readme.py::test_another_stage_and_another_head \
	tests/test_readme.py::test_command_can_be_typed[nbdev-clean] tests/test_readme.py::test_command_can_be_typed[nbdev-export]  # the overlay goes without nbdev

test-kaggle: $(READY) $(IMAGE_READY)  ## the tests with the versions of Kaggle's image; TESTS=tests/test_model.py for some
	$(BIN)/python -c 'from pathlib import Path; from nbs_lib.wheelhouse import make_overlay; make_overlay(Path("$(IMAGE)"), Path("$(IMAGE)/tests"))'
	$(IMAGE)/tests/bin/python -m pip install --quiet --no-deps --requirement $(LOCK)
	$(IMAGE)/tests/bin/python -m pip install --quiet pytest pytest-xdist hypothesis jupytext kaggle pillow-heif
	PYTHONPATH="$(CURDIR)" JUPYTER_PATH="$(CURDIR)/$(IMAGE)/share/jupyter" $(IMAGE)/tests/bin/python -m pytest $(SPREAD) $(NO_NBDEV:%=--deselect=%) $(TESTS)

# The lowest versions that pyproject.toml admits, together, on the oldest Python that it admits; torch among them, so this downloads several GB.
# Left out: sentencepiece below 0.2.2 loads half of a tokenizer's file as a smaller vocabulary, without an error.
PYTHON311 ?= python3.11
LOWEST := .venv-lowest
LOWEST_READY := $(LOWEST)/ready-$(shell cat pyproject.toml tools/floors.py | cksum | cut -d' ' -f1)
LOWEST_TESTS := $(patsubst %,tests/test_%.py,images demo store inpaint features weights model boosting targets ensemble train report budget) \
	tests/test_run.py::test_a_stage_runs_in_this_interpreter tests/test_run.py::test_lessons_run_in_this_interpreter

$(LOWEST_READY):
	$(PYTHON311) -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 11) else "Python 3.11 is needed, this is " + sys.version.split()[0])'
	$(PYTHON311) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python tools/floors.py dev phone > $(LOWEST)/floors.txt
	$(LOWEST)/bin/python -m pip install --quiet --only-binary :all: --requirement $(LOWEST)/floors.txt
	touch $@

test-lowest: $(LOWEST_READY)  ## the tests with the lowest versions that pyproject.toml admits; TESTS=tests/test_model.py for some
	PYTHONPATH="$(CURDIR)" $(LOWEST)/bin/python -m pytest $(SPREAD) --deselect='tests/test_features.py::test_half_a_file_is_refused[spiece.model]' $(or $(TESTS),$(LOWEST_TESTS))

weights: PROFILE = kaggle
weights: $(READY) ## download NAME=dinov3 (siglip, a timm backbone, a hub repository; none: what PROFILE=kaggle needs) -> TO=weights
	$(KAGGLE) --profile $(PROFILE) $(ARGS) weights $(NAME) --to "$(TO)"

push: $(READY)   ## STAGE=train (or another kernel or dataset): print the request; SEND=1 sends it, WATCH=1 follows the run
	@test -n "$(STAGE)" || { echo "error: STAGE is empty; make push STAGE=train; kernels: eda, train, features, submit, suite; datasets: the folders of datasets-metadata" >&2; exit 2; }
	$(KAGGLE) $(ARGS) push $(STAGE) $(if $(FROM),--source "$(FROM)") $(SENDING) $(if $(filter 1 yes,$(WATCH)),--watch)

submit: $(READY) ## VERSION=3 of the kernel submit; SEND=1 sends it
	$(KAGGLE) $(ARGS) submit $(if $(VERSION),--version $(VERSION)) $(if $(MESSAGE),--message "$(MESSAGE)") $(if $(FROM),--run "$(FROM)") $(SENDING)

data: $(READY)   ## download the competition's data, for users who accepted its rules -> data/csiro-biomass
	$(KAGGLE) data

notebooks: demo  ## execute lessons and, on the demo, stages again; export the library
	$(BIN)/python tools/notebooks.py --run runs/demo --write
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export

clean:           ## remove what was made, but for the .venv
	rm -rf runs build dist wheelhouse/nbs-lib wheelhouse/wheels *.egg-info .pytest_cache .ruff_cache catboost_info
