# make demo         train DPO and DPOP on generated low-edit pairs and compare them (offline, minutes)
# make test         lint, then the test suite
# make lint         ruff and pyright
# make dist-check   build the wheel and the sdist, and try both in an empty environment (four minutes, mostly pip)
# make bench        measure against the peers that are installed (ten minutes), then write README's and docs' figures
#
# Each target sets up .venv by itself, only when it is missing or its inputs changed.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TEST_WORKERS ?= 2

.PHONY: demo test lint dist-check bench clean

demo: $(READY)
	@$(BIN)/dpop demo

test: lint
	@$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

dist-check: $(READY)
	@$(BIN)/python tests/dist_check.py

bench: $(READY)
	@$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds \
		--records benchmarks/results/levels.jsonl
	@$(BIN)/python -m benchmarks.report

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (once; log: $(VENV)/install.log)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt \
		> $(VENV)/install.log 2>&1 || { tail -n 30 $(VENV)/install.log; exit 1; }
	@touch $(READY)

clean:
	rm -rf $(VENV) runs dist .pytest_cache .ruff_cache
