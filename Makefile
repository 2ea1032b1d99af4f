# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` do all the set-up they need: a virtual environment, torch, the build. Both are quick again.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
OUT ?= runs/demo

BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
# Named by the version, so that another TORCH installs it and builds again.
TORCH_STAMP := $(VENV)/$(subst >,,$(subst <,,$(subst =,-,$(TORCH)))).stamp
NATIVE := CMakeLists.txt setup.py pyproject.toml $(shell find csrc third_party -type f)
CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
# Two test processes of one thread each suit two cores better than one process of two threads.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

.PHONY: help build demo test lint format bench cuda-compile wheel clean

help:
	@echo "make demo          train, adapt and sample a small model on Python's own text; under 5 minutes on 2 cores"
	@echo "make test          build, then every test that needs no GPU"
	@echo "make lint          ruff, mypy, clang-format     make format   apply them"
	@echo "make bench         every op beside eager PyTorch on this machine"
	@echo "make cuda-compile  the CUDA library, warnings as errors (needs nvcc, no GPU)"
	@echo "make wheel         dist/*.whl"

$(TORCH_STAMP): constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade "pip>=24" "setuptools>=77" wheel
	$(PIP) "$(TORCH)"
	rm -f $(VENV)/torch-*.stamp
	touch $@

# nvidia-cutlass without its Python dependencies: only its headers are used.
$(VENV)/tools.stamp: $(TORCH_STAMP)
	$(PIP) -c constraints.txt pybind11 ninja cmake
	$(PIP) -c constraints.txt --no-deps nvidia-cutlass
	touch $@

# torch is there already and satisfies the package's range, so this installs the rest and compiles.
INSTALL = PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) -c constraints.txt --no-build-isolation -e ".[dev]"

$(VENV)/build.stamp: $(VENV)/tools.stamp $(NATIVE)
	$(INSTALL)
	touch $@

build: $(VENV)/build.stamp

demo: build
	$(BIN)/diffullama demo --out $(OUT)

test: build
	$(PYTEST) --require-ext --cov=diffullama_ext --cov-report=term --cov-fail-under=90

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy diffullama_ext

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: build
	$(PY) -m pytest benchmarks --benchmark-only

cuda-compile: $(VENV)/tools.stamp
	DIFFULLAMA_WITH_CUDA=1 DIFFULLAMA_WERROR=1 $(INSTALL)
	touch $(VENV)/build.stamp

wheel: $(VENV)/tools.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PY) -m pip wheel --no-build-isolation --no-deps -w dist .

clean:
	rm -rf .build build dist diffullama_ext/lib diffullama_ext/_C*.so *.egg-info $(VENV)/build.stamp
