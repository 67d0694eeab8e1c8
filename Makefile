# make demo         train DPO and DPOP on generated low-edit pairs and compare them (offline, minutes)
# make demo-chat    the same with a real chat model of 135 million parameters (a quarter of an hour, fetches 93 MB once)
# make test         lint, then the test suite
# make lint         ruff and pyrefly
# make portability  the numeric tests under every arithmetic of this processor, and their closest bounds
# make test-newest  the test suite on the newest versions of everything, in an environment of its own
# make test-oldest  ... on the lower bounds of pyproject.toml
# make test-device  ... on the versions of the machine that GPU figures are measured on
# make test-survival  runs of six kinds killed at a file operation, twenty times each, and held against whole ones
# make test-distributed  every engine with every layout, LoRA and all weights, against one process
# make test-attacks  500 mutated command lines, 500 damaged files, 50,000 records: what is told, and how many stood
# make dist-check   build the wheel and the sdist, and try both in an empty environment (four minutes, mostly pip)
# make bench        measure against the peers that are installed (ten to twenty minutes), then write README's and docs' figures
# make docs         the documentation as a site, site/index.html, in an environment of its own
# make hub-kernel   the kernels as Hugging Face's `kernels` loads them, in build/hub
#
# Each target sets up .venv by itself, only when it is missing or its inputs changed.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DOCS_VENV := .venv-docs
DEEPSPEED_VENV := .venv-deepspeed
READY  := $(VENV)/.ready
TEST_WORKERS ?= 3

.PHONY: demo demo-chat test lint portability test-newest test-oldest test-device dist-check bench docs \
	hub-kernel test-survival test-attacks test-distributed clean

demo: $(READY)
	@$(BIN)/dpop demo

demo-chat: $(READY)
	@$(BIN)/dpop demo --chat

# Compiled code is kept even where the environment says not to: the next run starts ten CPU seconds ahead
test: lint
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyrefly check --summary=none

test-survival: $(READY)
	@$(BIN)/python tests/survival.py 20

test-distributed: $(DEEPSPEED_VENV)/.ready
	@$(DEEPSPEED_VENV)/bin/python -m pytest tests/engines.py

test-attacks: $(READY)
	@$(BIN)/python tests/helpers/attacks.py 500

dist-check: $(READY)
	@$(BIN)/python tests/dist_check.py

bench: $(READY)
	@$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds \
		--records benchmarks/results/levels.jsonl
	@$(BIN)/python -m benchmarks.report

portability: $(READY)
	@$(BIN)/python tests/portability.py

test-newest test-oldest test-device: test-%: .venv-%/.ready
	@.venv-$*/bin/python -m pytest -n $(TEST_WORKERS) --dist worksteal

# Python versions that each environment takes, the best first; what uv is asked for there
PYTHONS_newest := 3.14 3.13 3.12 3.11 3.10
PYTHONS_oldest := 3.12 3.11 3.10
PYTHONS_device := 3.12 3.11
VERSIONS_newest := --upgrade
VERSIONS_oldest := --resolution lowest-direct
VERSIONS_device := torch==2.11.0 triton==3.6.0 transformers==5.17.0 'numpy<2.4'

.venv-newest/.ready .venv-oldest/.ready .venv-device/.ready: .venv-%/.ready: pyproject.toml
	@python=$$(for v in $(PYTHONS_$*); do for p in python$$v "$$HOME"/.pyenv/versions/$$v.*/bin/python; do \
		"$$p" -c '' 2>/dev/null && { echo "$$p"; exit; }; done; done); \
	test -n "$$python" || { echo "python: expected one of $(PYTHONS_$*), found none. Install one."; exit 1; }; \
	echo "Setting up .venv-$* (once; $$("$$python" --version); log: .venv-$*/install.log)"; \
	"$$python" -m venv .venv-$* && .venv-$*/bin/python -m pip install --quiet uv && \
	.venv-$*/bin/uv pip install --python .venv-$*/bin/python $(VERSIONS_$*) --editable '.[dev]' \
		> .venv-$*/install.log 2>&1 || { tail -n 30 .venv-$*/install.log; exit 1; }
	@touch $@

# Pages and what they link to keep their places, so that every link works in the repository and on the site alike
docs: $(DOCS_VENV)/.ready
	@rm -rf build/pages && mkdir -p build/pages
	@git ls-files --cached --others --exclude-standard -- '*.md' '*.svg' '*.yaml' '*.sbatch' LICENSE CITATION.cff examples \
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

# What $(VENV) has, and DeepSpeed, which the other tests are to do without
$(DEEPSPEED_VENV)/.ready: $(READY)
	@echo "Setting up $(DEEPSPEED_VENV) (once)"
	@$(BIN)/python -m venv $(DEEPSPEED_VENV)
	@$(BIN)/python -c "import sysconfig; print(f'import site; site.addsitedir({sysconfig.get_path(\"purelib\")!r})')" \
		> $$($(DEEPSPEED_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth
	@$(DEEPSPEED_VENV)/bin/python -m pip install --quiet --upgrade 'setuptools>=77' wheel
	@DS_BUILD_OPS=0 $(DEEPSPEED_VENV)/bin/python -m pip install --quiet --no-build-isolation deepspeed==0.19.8
	@touch $(DEEPSPEED_VENV)/.ready

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (once; log: $(VENV)/install.log)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt \
		> $(VENV)/install.log 2>&1 || { tail -n 30 $(VENV)/install.log; exit 1; }
	@touch $(READY)

clean:
	rm -rf $(VENV) $(DOCS_VENV) $(DEEPSPEED_VENV) .venv-newest .venv-oldest .venv-device build dist site runs .pytest_cache .ruff_cache
