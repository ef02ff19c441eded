# Every target sets up what it needs; `make` alone lists them.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest
EXTRAS := dev,export,geo,medical,app,search,plots,docs
PIP_INSTALL := -m pip install --quiet --constraint
# One process per core; the tests of a file stay together, as they share fixtures.
SPREAD := -n auto --dist loadfile
# The behaviour that depends on the version of Transformers; everything else runs on the newest one alone.
OLDEST_TESTS := tests/test_auto_classes.py tests/hub/test_remote_code.py \
    $(addprefix tests/training/test_, trainer.py segformer_trainer.py arguments.py) \
    $(addprefix tests/model/test_, modeling.py modeling_common.py configuration.py image_processing.py pipeline.py \
        peft.py offload.py compile.py)

.PHONY: help install demo test test-slow test-all test-browser test-oldest docs lint types check fuzz bench bench-large \
    learn screenshot chromium clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/.installed ## set up .venv (the only step that needs a network)

.venv/.installed: pyproject.toml constraints.txt tests/support/fetch_transformers_tests.py
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP_INSTALL) constraints.txt torch
	$(BIN)/python $(PIP_INSTALL) constraints.txt --editable '.[$(EXTRAS)]'
	$(BIN)/python tests/support/fetch_transformers_tests.py
	touch $@

demo: .venv/.installed ## train on generated shapes, save, load again, draw a prediction
	$(BIN)/segformer train shapes_b0

test: .venv/.installed ## run the tests that every change must pass
	$(BIN)/python -m pytest $(SPREAD)

test-slow: .venv/.installed ## run the tests marked slow: compilers, several processes, killed runs
	grep -rl --include='test_*.py' 'mark\.slow' tests | sort | xargs -P 2 -I {} sh -c \
	    "$(BIN)/python -m pytest -m 'slow and not browser' {} || [ \$$? = 5 ]"

test-all: test test-slow test-browser ## run all tests on the newest Transformers

.cache/node/.installed: tests/node/package.json tests/node/package-lock.json
	mkdir -p .cache/node
	cp tests/node/package.json tests/node/package-lock.json .cache/node
	cd .cache/node && ONNXRUNTIME_NODE_INSTALL=skip ONNXRUNTIME_NODE_INSTALL_CUDA=skip npm ci --no-fund --no-audit
	touch $@

.venv/.browser: .venv/.installed
	$(BIN)/python $(PIP_INSTALL) constraints.txt --editable '.[$(EXTRAS),browser]'
	touch $@

chromium:
	@command -v chromedriver > /dev/null && { command -v chromium || command -v google-chrome; } > /dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && apt-get update --quiet \
	     && apt-get install --yes --quiet --no-install-recommends chromium chromium-driver; } \
	|| { echo "Chromium and its driver are required: sudo apt-get install chromium chromium-driver"; exit 1; }

test-browser: .venv/.browser .cache/node/.installed chromium ## run the tests that need Node or Chromium
	$(BIN)/python -m pytest -m browser

$(OLDEST)/.installed: pyproject.toml constraints.txt constraints-oldest.txt tests/support/fetch_transformers_tests.py
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP_INSTALL) constraints-oldest.txt torch
	$(OLDEST)/bin/python $(PIP_INSTALL) constraints-oldest.txt --editable '.[dev]'
	$(OLDEST)/bin/python tests/support/fetch_transformers_tests.py
	touch $@

test-oldest: $(OLDEST)/.installed ## run what depends on Transformers on the oldest supported version
	$(OLDEST)/bin/python -m pytest $(SPREAD) $(OLDEST_TESTS)

docs: .venv/.installed ## build the documentation site in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: .venv/.installed ## check format, style and English
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python tests/support/lint_english.py

types: .venv/.installed ## check the types
	$(BIN)/mypy

check: lint types test ## run what every change must pass: lint, types, test

fuzz: .venv/.installed ## feed ten thousand damaged files to every reader
	$(BIN)/python -m tests.support.fuzz_loaders --number 10000

.venv/.bench: .venv/.installed
	$(BIN)/python $(PIP_INSTALL) constraints.txt --editable '.[$(EXTRAS),bench]'
	touch $@

bench: .venv/.bench ## measure speed and memory, rewrite benchmarks/results and docs/benchmarks.md (20 minutes)
	$(BIN)/python -m benchmarks

bench-large: .venv/.bench ## measure folders of images, and rasters up to 30,000 x 30,000 pixels (20 minutes)
	$(BIN)/python -m benchmarks predict large_images

learn: .venv/.installed ## train on the hard shapes and compare the mean IoU with benchmarks/results/learning.json
	$(BIN)/python -m benchmarks.learning

screenshot: .venv/.browser chromium ## draw docs/images/app.png again, with the model of `make demo`
	PYTHONPATH=. $(BIN)/python tests/support/screenshot.py

clean: ## remove environments, caches and outputs
	rm -rf .venv .venv-oldest .cache build dist outputs *.egg-info
