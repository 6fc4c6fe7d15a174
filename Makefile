# Two commands: `make demo` and `make test`. Both set up what they need in .venv and reuse it the next time.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SETUP  := $(VENV)/.ready
NATIVE := setup.py $(wildcard csrc/*.* csrc/*/*.*)
CXX_SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh csrc/*/*.h tests/*.cu tests/*/*.cpp)

# Two workers are two cores; each keeps to one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long test-gpu test-abi test-triton fuzz sanitize check format wheel bench bench-gpu bench-gpu-full traffic report clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(SETUP) ## create .venv, install the pinned dependencies, compile and install the package

$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON); name one with PYTHON=... (3.11 or newer)"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"make: PYTHON is {v[0]}.{v[1]}, needs 3.11 or newer: make PYTHON=python3.12 ...")'
	@echo "== creating the virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.dependencies: requirements-dev.txt $(VENV)/.python
	@echo "== installing the pinned dependencies (torch is large: a minute or more the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(SETUP): $(VENV)/.dependencies pyproject.toml $(NATIVE)
	@echo "== compiling and installing simmim_fast"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(SETUP) ## pre-train a small Swin on real photographs; pictures in runs/demo
	@echo "== pre-training on photographs (under five minutes on two cores)"
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/demo.py

test: $(SETUP) ## the tests, on the CPU
	@echo "== running the tests"
	@$(PYTEST) -m "not slow and not gpu"

test-long: $(SETUP) ## the slow tests: inductor, every offline compilation, installs
	@echo "== running the slow tests"
	@$(PYTEST) -m "slow and not gpu"

test-gpu: $(SETUP) ## the kernels on an NVIDIA GPU
	@echo "== running the GPU tests"
	@$(BIN)/python -m pytest -m gpu

fuzz: $(SETUP) ## 500 random shapes an op, backend by backend
	@echo "== fuzzing the ops"
	@$(PYTEST) tests/ops -m "fuzz and not gpu" --hypothesis-profile=many
	@TRITON_INTERPRET=1 $(PYTEST) tests/ops -m "fuzz and interpreted" --hypothesis-profile=many

sanitize: $(SETUP) ## the kernels under compute-sanitizer, on an NVIDIA GPU
	@$(BIN)/python tests/sanitize.py

test-abi: $(SETUP) ## wheels across torch versions, in throw-away environments (downloads two torches)
	@echo "== building and loading wheels across torch versions"
	@$(BIN)/python -m tests.abi

test-triton: $(SETUP) ## the kernels under the oldest and newest triton, interpreted and compiled (downloads both)
	@echo "== running the kernels under other versions of triton"
	@$(BIN)/python -m tests.triton_versions

check: $(SETUP) ## style, without rewriting
	@echo "== checking style"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(SETUP) ## rewrite to style
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .
	@$(BIN)/clang-format -i $(CXX_SOURCES)

wheel: $(SETUP) ## build dist/*.whl with the compiled parts
	@echo "== building the wheel"
	@rm -rf build/lib* build/bdist*  # or modules that are gone would be packed again
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w dist .
	@ls -l dist

bench: $(SETUP) ## time the ops
	@$(BIN)/python -m pytest benchmarks/bench_*.py --benchmark-only

bench-gpu: $(SETUP) ## smoke tests, then steps, ops and parity on an NVIDIA GPU, in under nine minutes
	@$(BIN)/python -m benchmarks.gpu

bench-gpu-full: $(SETUP) ## all GPU tests, then everything, going on where it was cut off; OFFICIAL=PATH as for traffic
	@$(BIN)/python -m benchmarks.gpu --full $(if $(OFFICIAL),--official $(OFFICIAL))

traffic: $(SETUP) ## count again what a step moves; OFFICIAL=PATH, a checkout of microsoft/SimMIM, for its rows
	@$(BIN)/python -m benchmarks.traffic --all benchmarks/results/traffic.jsonl $(if $(OFFICIAL),--official $(OFFICIAL))
	@$(BIN)/python -m benchmarks.report

report: $(SETUP) ## tables and pictures of the stored measurements, in the documents
	@$(BIN)/python -m benchmarks.report

clean: ## remove what was built and what was run
	rm -rf build dist runs *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -rf simmim_fast/lib simmim_fast/_C.* $(SETUP)
