# Two commands matter: `make demo` and `make test`. Each builds .venv by itself, from the versions in constraints.txt, and again
# only when pyproject.toml or constraints.txt changed. PYTHON=python3.12 chooses another interpreter.

BIN := .venv/bin
WORKERS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)

# One thread a process: the tests already run one process for each core. PYTHONSAFEPATH keeps the repository root off sys.path,
# where kernels/ would be found as a package.
TEST_ENV := OMP_NUM_THREADS=1 PYTHONSAFEPATH=1

.PHONY: help demo results test test-slow gate test-triton fuzz audit mutants lint format freeze picture clean

help:
	@echo "make demo       translate the sample drawings with the built-in checkpoint; writes demo/report.html"
	@echo "make test       the tests"
	@echo "make results    Pix2Pix, Pix2PixHD, the paper's recipe, ours and a student, each trained for MINUTES=30 on DATA=pairs/emoji; into"
	@echo "                results/. OPTIONS=\"--ablations --seeds 0 1 2\" and the like are those of \`clipdit results --help\`"
	@echo "make test-slow  the tests that take minutes: training that is killed, two processes, real quality"
	@echo "make gate       what the kernels must pass without a GPU, alone: numbers, machine code, order; a part of \`make test\`"
	@echo "make mutants    bugs put into the kernels one by one: the tests must find each"
	@echo "make fuzz       five minutes of damaged uploads for the decoder; SECONDS=60 is shorter, and finds are kept in fuzz/"
	@echo "make test-triton  a bundle in a real Triton Inference Server, which is downloaded into triton/ (55 MB)"
	@echo "make audit      known holes in the dependencies, and risky lines in the code; its tools get an environment of their own"
	@echo "make sbom.json  what .venv holds, as CycloneDX"
	@echo "make lint       style, types and import rules (\`make test\` checks them too)"
	@echo "make format     put the style right"
	@echo "make picture    make the README's pictures anew, from a demo and with Chromium"
	@echo "make freeze     write the versions that .venv holds now to constraints.txt"
	@echo "make clean      remove .venv and caches"

demo: .venv/installed
	$(BIN)/clipdit demo --out demo

DATA ?= pairs/emoji
MINUTES ?= 30

results: .venv/installed $(DATA)
	$(BIN)/clipdit results --data $(DATA) --out results --minutes $(MINUTES) $(OPTIONS)

pairs/emoji:
	$(BIN)/clipdit data emoji --out $@

# A file of tests on one worker: what they share (a bundle, a service on Ray) is made once. (With pytest 9.2 the groups of
# pytest-xdist 3.8 had no effect: with `--dist loadgroup` each worker made its own.)
test: .venv/installed
	$(TEST_ENV) $(BIN)/pytest -n $(WORKERS) --dist loadfile -m "not slow"

test-slow: .venv/installed
	$(TEST_ENV) $(BIN)/pytest -m slow

gate: .venv/installed
	$(TEST_ENV) $(BIN)/pytest -n $(WORKERS) --dist worksteal -m "not slow" tests/kernels/test_*.py

mutants: .venv/installed
	$(TEST_ENV) $(BIN)/pytest -n $(WORKERS) -m slow tests/kernels/test_mutants.py

fuzz: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/serve/fuzz_decoding.py fuzz --seconds $(or $(SECONDS),300)

# The server comes inside a wheel that wants NumPy 1: into a folder of its own, which no Python looks into.
test-triton: .venv/installed triton/pytriton
	$(TEST_ENV) CLIPDIT_TRITON_SERVER=triton $(BIN)/pytest tests/export/test_triton_server.py

triton/pytriton:
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target triton nvidia-pytriton==0.7.0

# pip-audit asks a vulnerability service on the Internet; --strict makes it fail where that does not know a package, rather than pass.
audit: .venv/installed audit/bin/bandit
	audit/bin/bandit --quiet --recursive --severity-level medium clipdit export kernels serve
	audit/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

sbom.json: .venv/installed audit/bin/bandit
	audit/bin/cyclonedx-py environment --no-validate --output-file $@ .venv

audit/bin/bandit:
	$(BIN)/python -m venv audit
	audit/bin/pip install --quiet --disable-pip-version-check bandit cyclonedx-bom pip-audit

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error
	$(BIN)/lint-imports --no-cache

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

picture: demo
	cp demo/sheet.png docs/images/edges2emoji.png
	$(TEST_ENV) CLIPDIT_SCREENSHOT=docs/images/page.png $(BIN)/pytest -q tests/serve/test_in_a_browser.py -k drawing

# Without `+cpu` and the like: that part names a download, not a version.
freeze: .venv/installed
	{ grep '^#' constraints.txt; $(BIN)/pip freeze --all --exclude pip --exclude-editable | sed 's/+.*//' | sort -f; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf .venv .pytest_cache .ruff_cache *.egg-info

# setuptools comes first, at its pinned version, and builds without isolation: an isolated build would fetch the newest one.
.venv/installed: pyproject.toml constraints.txt
	@python=""; for name in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
	  if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$name; break; fi; done; \
	if [ -z "$$python" ]; then \
	  echo "clipdit needs Python 3.11 or newer; $(or $(PYTHON),python3) is `$(or $(PYTHON),python3) --version 2>&1`. Install one, or name it: make PYTHON=/path/to/python3"; \
	  exit 2; fi; \
	[ -x $(BIN)/pip ] || $$python -m venv .venv || { rm -rf .venv; exit 2; }
	@echo "installing into .venv; the first time takes two to five minutes"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	@touch $@
