# The only commands to remember: make demo | gallery | test | nightly | check | build | bench | full-size | cuda-check | gpu-check | gpu-check-rest
# Each sets up .venv first where it is missing, and is quick when nothing changed.
PYTHON ?= $(firstword $(shell command -v python3 python3.13 python3.12 python3.11 python3.10))
BIN := .venv/bin
STAMP := .venv/.installed
JOBS ?= $(shell nproc)
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PARALLEL = -n $(JOBS) --dist worksteal  # neighbours stay together, and what a file's tests share is made once
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Without a driver nothing here can run on a GPU: the one target that every kernel has proves that the module compiles and
# links; cuda-check compiles for the portable one, too. With a driver, or from pip, the build takes its full list.
ifeq ($(wildcard /dev/nvidiactl),)
export LENS_CUDA_ARCHS ?= 90a
# And nothing but these tools is needed to build. pip's isolated ones lie elsewhere each time, so that `make build` would
# compile again what was compiled with those.
TOOLS := 'setuptools>=77' 'pybind11>=2.13' 'cmake>=3.24' 'ninja>=1.10'
endif

.DEFAULT_GOAL := build
.PHONY: demo gallery test nightly check build bench full-size cuda-check gpu-check gpu-check-rest

# ---- environment: torch comes pinned from constraints.txt; changed metadata reinstalls
$(STAMP): pyproject.toml constraints.txt
	@echo 'Setting up .venv: PyTorch, the other dependencies, and the kernels (some minutes)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(if $(TOOLS),$(PIP) install -q -c constraints.txt $(TOOLS))
	$(PIP) install -q -c constraints.txt $(if $(TOOLS),--no-build-isolation) -e '.[dev]'
	@touch $@

# ---- build: lens/_C in place; only what changed in csrc/ is compiled
build: $(STAMP)
	$(BIN)/python setup.py --quiet build_ext --inplace

# Without a driver these draw on the CPU and need not wait for CUDA kernels.
ifeq ($(wildcard /dev/nvidiactl),)
demo gallery: export LENS_CUDA ?= OFF
endif
demo: build
	$(BIN)/lens generate --model mini-turbo --file lens/mini/demo_prompts.txt -o demo/ --sheet demo/sheet.png --seed 1
	@echo 'Look at demo/sheet.png'

gallery: build
	$(BIN)/python -m train gallery

# ---- tests: those that compare running times (tests/bench has them) go alone and first, the rest in parallel
test: build
	$(PYTEST) -q -m 'timing and not nightly' tests/bench
	$(PYTEST) -q $(PARALLEL) -m 'not timing and not nightly'

nightly: build
	$(PYTEST) -q $(PARALLEL) -m nightly

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy lens bench train

# ---- CUDA: what the compiler can say without a GPU; then what only a GPU can say
cuda-check: $(STAMP)
	$(BIN)/python tests/cuda_check.py

# No environment is made here: a machine with a GPU often has its own torch and no network. OUT: folder of the results.
OUT ?= gpu-check
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu-check:
	$(GPU_PYTHON) -m bench.gpu_check --out '$(OUT)'
# What the results in HAVE lack, into files of its own; again and again until nothing is missing.
HAVE ?= $(OUT)
gpu-check-rest:
	$(GPU_PYTHON) -m bench.gpu_check --rest --out '$(OUT)' --have '$(HAVE)'

bench: build
	$(BIN)/python -m bench run ops --case "ops/*/pair/*" --seconds 0.3

# Lens at its released size with random weights: 30 GB of files in FULL_SIZE and room to move, 24 GB of memory, an hour.
FULL_SIZE ?= full-size
full-size: build
	@echo 'Needs 45 GB of disk in $(FULL_SIZE) and 24 GB of memory; FULL_SIZE=folder says where'
	$(BIN)/python -m bench full_size make '$(FULL_SIZE)' --dtype fp32
	$(BIN)/python -m bench full_size run '$(FULL_SIZE)'
