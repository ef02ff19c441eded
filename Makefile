# Every target sets up what it needs; `make` alone lists them.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest
# A process a core; the tests of a file stay together.
SPREAD := -n auto --dist loadfile

.PHONY: help install demo test test-browser screenshot chromium test-oldest lint types check fuzz bench bench-large clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/.installed ## set up .venv (the only step that needs a network)

.venv/.installed: pyproject.toml constraints.txt tests/support/fetch_transformers_tests.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,export,geo,app]'
	$(BIN)/python tests/support/fetch_transformers_tests.py
	touch $@

demo: .venv/.installed ## fine-tune on generated shapes, save, load again, draw a prediction
	$(BIN)/python -m training.finetune configuration/shapes_b0.toml

test: .venv/.installed ## run the tests
	$(BIN)/python -m pytest $(SPREAD)

.cache/node/.installed: tests/node/package.json tests/node/package-lock.json
	mkdir -p .cache/node
	cp tests/node/package.json tests/node/package-lock.json .cache/node
	cd .cache/node && ONNXRUNTIME_NODE_INSTALL=skip ONNXRUNTIME_NODE_INSTALL_CUDA=skip npm ci --no-fund --no-audit
	touch $@

.venv/.browser: .venv/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,export,geo,app,browser]'
	touch $@

chromium:
	@command -v chromedriver > /dev/null && { command -v chromium || command -v google-chrome; } > /dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && apt-get update --quiet \
	     && apt-get install --yes --quiet --no-install-recommends chromium chromium-driver; } \
	|| { echo "Chromium and its driver are wanted: sudo apt-get install chromium chromium-driver"; exit 1; }

test-browser: .venv/.browser .cache/node/.installed chromium ## run the tests that need Node or Chromium
	$(BIN)/python -m pytest -m browser

screenshot: .venv/.browser chromium ## draw docs/pictures/app.png anew, with the model of `make demo`
	PYTHONPATH=. $(BIN)/python tests/support/screenshot.py

lint: .venv/.installed ## check format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/.installed ## check the types
	$(BIN)/mypy

check: lint types test ## all that a change must pass: lint, types, tests

fuzz: .venv/.installed ## feed ten thousand damaged files to everything that reads files
	$(BIN)/python tests/support/fuzz_loaders.py --number 10000

.venv/.bench: .venv/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,export,geo,app,bench]'
	touch $@

bench: .venv/.bench ## measure speed and memory, rewrite benchmarks/results and docs/benchmarks.md (20 minutes)
	$(BIN)/python -m benchmarks

bench-large: .venv/.bench ## measure folders of pictures, and images up to 30,000 x 30,000 (20 minutes)
	$(BIN)/python -m benchmarks predict large_images

$(OLDEST)/.installed: pyproject.toml constraints.txt constraints-oldest.txt tests/support/fetch_transformers_tests.py
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt torch
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[dev]'
	$(OLDEST)/bin/python tests/support/fetch_transformers_tests.py
	touch $@

test-oldest: $(OLDEST)/.installed ## run the tests on the oldest Transformers that is supported
	$(OLDEST)/bin/python -m pytest $(SPREAD)

clean: ## remove the environments, caches and outputs
	rm -rf .venv .venv-oldest .cache build dist outputs *.egg-info
