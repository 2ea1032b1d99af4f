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

.PHONY: help build demo test test-transformers test-extras simulated test-simulated test-sanitized test-races lint format bench cuda-compile gpu-check wheel clean

help:
	@echo "make demo          train, adapt and sample a small model on Python's own text; under 5 minutes on 2 cores"
	@echo "make test          build, then every test that needs no GPU"
	@echo "make test-transformers TRANSFORMERS=5.6.2   the tests that touch transformers, over that version"
	@echo "make test-extras   quantised models, DeepSpeed and W&B, on the CPU"
	@echo "make test-simulated, test-sanitized, test-races   the op tests over the CUDA kernels, run on the CPU"
	@echo "make lint          ruff, mypy, clang-format     make format   apply them"
	@echo "make bench         every op beside eager PyTorch on this machine"
	@echo "make cuda-compile  the CUDA library, warnings as errors (needs nvcc, no GPU)"
	@echo "make gpu-check OUT=DIR   on a GPU: tests, sanitizers, benchmarks; STAGE=bench for one (docs/gpu.md)"
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

# --- packages beside those of the environment: in folders that come first on PYTHONPATH for these tests alone
TRANSFORMERS ?= 5.6.2
TRANSFORMERS_TESTS ?= python_tests/integrations python_tests/training python_tests/objective/test_objective_models.py \
  python_tests/sampling/test_caches.py python_tests/sampling/test_custom_generate.py python_tests/cli/test_adapt_command.py
# Not with their dependencies, which the environment has, torch among them; deepspeed's own are listed with it.
EXTRAS := bitsandbytes torchao deepspeed einops hjson msgpack
EXTRAS_TESTS ?= python_tests/integrations/test_quantised.py python_tests/training/test_deepspeed.py \
  python_tests/cli/test_adapt_recipes.py::test_loggers_get_the_losses
SIDE := .build/side

# Older versions need older tokenizers and huggingface_hub; all else is as CI pins it.
$(SIDE)/transformers-%.stamp: $(VENV)/build.stamp
	rm -rf $(SIDE)/transformers-$* && mkdir -p $(SIDE)
	grep -vE '^(transformers|tokenizers|huggingface_hub)==' constraints.txt > $(SIDE)/constraints-$*.txt
	$(PIP) -c $(SIDE)/constraints-$*.txt --target $(SIDE)/transformers-$* transformers==$*
	touch $@

test-transformers: $(SIDE)/transformers-$(TRANSFORMERS).stamp
	PYTHONPATH=$(CURDIR)/$(SIDE)/transformers-$(TRANSFORMERS) $(PYTEST) -q $(TRANSFORMERS_TESTS)

$(SIDE)/extras.stamp: $(VENV)/build.stamp
	rm -rf $(SIDE)/extras $(SIDE)/wandb && mkdir -p $(SIDE)
	PATH="$(CURDIR)/$(BIN):$$PATH" DS_ACCELERATOR=cpu $(PIP) -c constraints.txt --no-deps --no-build-isolation \
	  --target $(SIDE)/extras $(EXTRAS)
	$(PIP) -c constraints.txt --target $(SIDE)/wandb wandb
	touch $@

# DeepSpeed compiles its communication for the CPU once, with the environment's ninja.
test-extras: $(SIDE)/extras.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=$(CURDIR)/$(SIDE)/extras:$(CURDIR)/$(SIDE)/wandb DS_ACCELERATOR=cpu \
	  TORCH_EXTENSIONS_DIR=$(CURDIR)/$(SIDE)/torch-extensions $(PYTEST) -q $(EXTRAS_TESTS)

# --- the CUDA kernels on the CPU (docs/simulator.md): no GPU, no CUDA toolkit
SIM := .build/simulated
SIM_LIBRARY = DIFFULLAMA_CPU_LIBRARY=$(CURDIR)/$(SIM)/csrc/testing/lib
SIM_TARGETS = diffullama_simulated diffullama_simulated_sanitized diffullama_simulated_races
SIM_TESTS ?= python_tests/ops
preload = $$(gcc -print-file-name=$(1).so)

simulated: build
	root=$$($(PY) -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parent)"); PATH="$(CURDIR)/$(BIN):$$PATH" \
	  cmake -G Ninja -S . -B $(SIM) -DTORCH_INCLUDE_DIR=$$root/include -DTORCH_LIBRARY_DIR=$$root/lib \
	  -DDIFFULLAMA_WITH_CUDA=OFF -DDIFFULLAMA_WERROR=1 -DPython_EXECUTABLE=$(CURDIR)/$(PY) \
	  -Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir) > /dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(SIM) --target $(SIM_TARGETS)

# Every op test over the CUDA kernels; wrong results under shuffled thread order, divergence, deadlock.
test-simulated: SIM_TARGETS = diffullama_simulated
test-simulated: simulated
	$(SIM_LIBRARY)diffullama_simulated.so $(PYTEST) -q --require-ext $(SIM_TESTS)
	DIFFULLAMA_SIMULATED_ARCH=80 $(SIM_LIBRARY)diffullama_simulated.so $(PYTEST) -q --require-ext $(SIM_TESTS) -k token_stats_paths

# Out-of-bounds accesses and undefined behaviour, by AddressSanitizer and UBSan.
test-sanitized: SIM_TARGETS = diffullama_simulated_sanitized
test-sanitized: simulated
	LD_PRELOAD="$(call preload,libasan) $(call preload,libstdc++)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
	  $(SIM_LIBRARY)diffullama_simulated_sanitized.so $(PY) -m pytest -q --require-ext --capture=sys $(SIM_TESTS) \
	  -k "oracle or reference or paths"

# Accesses that no barrier orders, by ThreadSanitizer.
test-races: SIM_TARGETS = diffullama_simulated_races
test-races: simulated
	LD_PRELOAD="$(call preload,libtsan)" OMP_NUM_THREADS=1 $(SIM_LIBRARY)diffullama_simulated_races.so \
	  setarch -R $(PY) -m pytest -q --require-ext --capture=sys $(SIM_TESTS) -k "oracle or reference or paths"

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

# Under the python3 that has torch with CUDA, and with the libraries that are there: nothing is installed.
gpu-check: OUT = runs/gpu-check
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(OUT) $(if $(STAGE),--stage $(STAGE))

wheel: $(VENV)/tools.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PY) -m pip wheel --no-build-isolation --no-deps -w dist .

clean:
	rm -rf .build build dist diffullama_ext/lib diffullama_ext/_C*.so *.egg-info $(VENV)/build.stamp
