# make demo   train DPO and DPOP on generated low-edit pairs and compare them (offline, minutes)
# make test   lint, then the test suite
# make lint   ruff and pyright
# make bench  measure against the peers that are installed (ten minutes), then write the figures in README and docs
# make docs   the documentation as a site, site/index.html, in an environment of its own
# make hub-kernel   the kernels as Hugging Face's `kernels` loads them, in build/hub
#
# Each target sets up .venv by itself, only when it is missing or its inputs changed.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DOCS_VENV := .venv-docs
READY  := $(VENV)/.ready
TEST_WORKERS ?= 2

.PHONY: demo test lint bench docs hub-kernel clean

demo: $(READY)
	@$(BIN)/dpop demo

test: lint
	@$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

bench: $(READY)
	@$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds \
		--records benchmarks/results/levels.jsonl
	@$(BIN)/python -m benchmarks.report

# Pages and what they link to keep their places, so that every link works in the repository and on the site alike
docs: $(DOCS_VENV)/.ready
	@rm -rf build/pages && mkdir -p build/pages
	@git ls-files --cached --others --exclude-standard -- '*.md' '*.png' '*.yaml' '*.sbatch' LICENSE CITATION.cff examples \
		| tar -cf - -T - | tar -xf - -C build/pages
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet
	@! grep -rnE '<(script|link|img|iframe)[^>]*(src|href)="?(https?:)?//' site --include='*.html' || \
		{ echo "site: expected pages that load nothing from elsewhere, found the above."; exit 1; }
	@echo "Written: site/index.html (its search wants a server: python -m http.server -d site)"

$(DOCS_VENV)/.ready: pyproject.toml
	@echo "Setting up $(DOCS_VENV) (once)"
	@$(PYTHON) -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip install --quiet 'pip>=25.1'
	@$(DOCS_VENV)/bin/python -m pip install --quiet --group docs
	@touch $@

hub-kernel: $(READY)
	@$(BIN)/python hub/assemble.py build/hub

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (once; log: $(VENV)/install.log)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt \
		> $(VENV)/install.log 2>&1 || { tail -n 30 $(VENV)/install.log; exit 1; }
	@touch $(READY)

clean:
	rm -rf $(VENV) $(DOCS_VENV) build site runs .pytest_cache .ruff_cache
