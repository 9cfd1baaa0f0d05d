# Every target sets up what it needs; python3 >= 3.11 and make suffice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SPACE := $(VENV)/space

.DEFAULT_GOAL := help
.PHONY: help demo space test newest oldest quick fuzz lint format wheel docs benchmark sizes clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("$(PYTHON) is %d.%d; 3.11 or newer is needed" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED)  ## train on real cells, generate new ones, compare them: outputs/demo (about four minutes)
	$(BIN)/python training/demo.py

space: $(SPACE)  ## serve the page on which anyone can generate cells (hub_cards/space) on this machine
	PYTHONPATH=$(SPACE) $(BIN)/python hub_cards/space/app.py

# Apart from the rest: gradio asks for an older Pillow than constraints.txt has.
$(SPACE): $(INSTALLED)
	grep -vi '^pillow==' constraints.txt >$(VENV)/constraints-space.txt
	rm -rf $@ && $(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints-space.txt --target $@ gradio playwright

test: $(INSTALLED) $(SPACE)  ## run the tests, on two to four cores
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
	@# Apart from the rest: wherever torchao is installed, every import of diffusers writes five lines.
	test -d $(VENV)/torchao || $(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt \
		--target $(VENV)/torchao torchao
	PYTHONPATH=$(VENV)/torchao $(BIN)/python -m pytest tests/test_first_class.py -k int8
	PYTHONPATH=$(SPACE) $(BIN)/python -m pytest -m '' tests/test_space_app.py

# Not in .venv but in outputs/; PIP_INDEX_URL and the like hold. Old libraries warn of what they call in newer ones.
newest:  ## run the tests on the newest versions of all dependencies
	$(PYTHON) -m venv outputs/newest
	outputs/newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[test]'
	outputs/newest/bin/python -m pytest

oldest:  ## run the tests on the oldest versions that pyproject.toml allows
	$(PYTHON) -m venv outputs/oldest
	grep -oE '"[A-Za-z0-9-]+>=[0-9.]+"' pyproject.toml | tr -d '"' | sed 's/>=/==/' >outputs/oldest/constraints.txt
	outputs/oldest/bin/python -m pip install --quiet --constraint outputs/oldest/constraints.txt --editable '.[test]'
	outputs/oldest/bin/python -m pytest -W ignore::DeprecationWarning

quick: lint  ## check style and types, and run the tests that need no training (under 90 seconds)
	$(BIN)/python -m pytest -q -m 'not slow and not training'

fuzz: $(INSTALLED)  ## try thousands of random cells and damaged files instead of some (hours)
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -q --timeout 0 tests/test_properties.py

lint: $(INSTALLED)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## mend style where ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(INSTALLED)  ## build the wheel, install it into an empty environment, run its commands there: outputs/wheel
	rm -rf outputs/wheel
	$(BIN)/python -m hatchling build -t wheel -d outputs/wheel
	$(PYTHON) -m venv outputs/wheel/venv
	outputs/wheel/venv/bin/pip install --quiet --constraint constraints.txt "$$(ls outputs/wheel/*.whl)[train]"
	cd outputs/wheel && export PATH="$$PWD/venv/bin:$$PATH" && scrdit demo && \
		scrdit evaluate --dataset outputs/demo/train.h5ad --labels_key cell_type --split_dir split && \
		scrdit train --dataset split/train.h5ad --labels_key cell_type --max_train_steps 50 --output_dir model && \
		scrdit generate --pipeline model --num_cells 50 --output cells.h5ad && \
		scrdit evaluate --split_dir split --pipeline model --output_dir evaluation

docs: $(INSTALLED)  ## build the documentation: outputs/docs/index.html
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -d outputs/doctrees docs outputs/docs

benchmark: $(INSTALLED)  ## measure training and sampling speed against the paper's model
	$(BIN)/python training/benchmarks/speed.py

sizes: $(INSTALLED)  ## list how large files and functions are, beside those of the last version before the redesign
	$(BIN)/python training/benchmarks/sizes.py

clean:  ## remove the environment and all outputs
	rm -rf $(VENV) outputs .pytest_cache .mypy_cache .ruff_cache *.egg-info
