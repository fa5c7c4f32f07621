# Everything a contributor runs. `make` alone lists the targets.
# Needs: python3 with venv, a C++20 compiler, make. The rest goes into .venv.

PYTHON ?= python3
# One fixed torch: an open range would follow every release. Any torch >= 2.9 works.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
GPU := $(wildcard /dev/nvidia0)
# AUTO: the C++ tests compile the kernels where nvcc is, and without a GPU that is all that can be
# done with them: the package has them where a GPU is, or where CUDA=ON asks for them.
CUDA ?= AUTO
PACKAGE_CUDA := $(if $(GPU)$(filter-out AUTO,$(CUDA)),$(CUDA),OFF)
# For this machine's GPU, else for one that stands for all: `make cuda-all` compiles every one.
test-cpp bench develop $(VENV)/.develop: export CUDAARCHS ?= $(if $(GPU),native,90a-real)
NVCC := $(shell command -v "$${CUDACXX:-nvcc}")
BENCHMARKS := $(if $(wildcard /usr/include/benchmark/benchmark.h /usr/local/include/benchmark/benchmark.h),ON,OFF)
JOBS ?= $(shell nproc)
NATIVE := CMakeLists.txt pyproject.toml setup.py $(shell find csrc cmake -type f)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export SKBUILD_CMAKE_DEFINE := L3EXT_CUDA=$(PACKAGE_CUDA)
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)

.PHONY: help develop test test-cpp test-aarch64 test-python cuda-all demo lint sanitize sanitize-thread bench clean

help:
	@echo "make develop          set up .venv with this package, editable, and all it needs"
	@echo "make demo             the whole main job on real text: make demo TEXT=file for your own"
	@echo "make test             C++ and Python tests; compiles and checks the kernels where nvcc is"
	@echo "make test-aarch64     the attention's C++ tests cross-compiled, under QEMU"
	@echo "make cuda-all         compile the kernels for every architecture, check them (needs nvcc, no GPU)"
	@echo "make lint             formatting, linters and type checks"
	@echo "make sanitize         C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make sanitize-thread  the runtime's, the allocator's and the C ABI's tests under ThreadSanitizer"
	@echo "make bench            C++ micro-benchmarks (needs libbenchmark-dev)"
	@echo "make clean            remove everything that make made"

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)"
	@touch $@

# Into the source tree: Python changes need no reinstall, native changes rebuild here.
$(VENV)/.develop: $(VENV)/.torch $(NATIVE)
	$(BIN)/pip install -q -e ".[test]"
	@touch $@

develop: $(VENV)/.develop

$(VENV)/.cmake: $(VENV)/.torch
	$(BIN)/pip install -q "cmake>=3.25" ninja
	@touch $@

# $(1): build folder, $(2): further CMake options
define configure
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(1) -G Ninja -DL3EXT_CUDA=$(CUDA) $(2) >/dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(1)
endef

# What reads machine code: of the CUDA toolkit, else two small wheels.
$(VENV)/.cuda-tools: $(VENV)/.torch
	command -v cuobjdump nvdisasm || \
	  $(BIN)/pip install -q "nvidia-cuda-cuobjdump==13.*" "nvidia-cuda-nvdisasm==13.*"
	@touch $@

# $(1): build folder
define check_sass
	@if $(MAKE) -s $(VENV)/.cuda-tools; then $(BIN)/python scripts/check_sass.py $(1)/libl3ext.a; \
	else echo "no cuobjdump and nvdisasm to be had: the machine code was not checked"; fi
endef

test-cpp: $(VENV)/.cmake
	$(call configure,build/cpp,-DL3EXT_TESTS=ON -DL3EXT_BENCHMARKS=$(BENCHMARKS))
	$(BIN)/ctest --test-dir build/cpp --output-on-failure
ifeq ($(NVCC),)
	@echo "no nvcc here: the kernels were not compiled"
else ifneq ($(CUDA),OFF)
	$(call check_sass,build/cpp)
endif

# Attention by NEON, where the tools are: on Debian the packages g++-aarch64-linux-gnu and qemu-user.
AARCH64_TESTS := attention_test attention_dtypes_test core_test quantized_rows_test row_kernels_test
AARCH64_MISSING := $(foreach tool,aarch64-linux-gnu-g++ qemu-aarch64,$(if $(shell command -v $(tool)),,$(tool)))

test-aarch64: $(VENV)/.cmake
ifneq ($(strip $(AARCH64_MISSING)),)
	@echo "no $(strip $(AARCH64_MISSING)) here: nothing was tested for aarch64"
else
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/aarch64 -G Ninja -DL3EXT_CUDA=OFF \
	  -DL3EXT_TESTS=ON --toolchain cmake/aarch64-linux-gnu.cmake >/dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/aarch64 --target $(AARCH64_TESTS)
	$(BIN)/ctest --test-dir build/aarch64 --output-on-failure -R "^($(subst $(space),|,$(AARCH64_TESTS)))$$"
endif

cuda-all: $(VENV)/.cmake
	$(call configure,build/cuda-all,-DL3EXT_CUDA=ON)
	$(call check_sass,build/cuda-all)

test-python: $(VENV)/.develop
	$(BIN)/python -m pytest

test: test-cpp test-python

demo: $(VENV)/.develop
	$(BIN)/python scripts/demo $(if $(TEXT),--text "$(TEXT)")

$(VENV)/.lint: $(VENV)/.develop $(VENV)/.cmake
	$(BIN)/pip install -q pre-commit==4.7.0 mypy==2.4.1 "pybind11>=3.0"
	@touch $@

lint: $(VENV)/.lint
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/lint -G Ninja -DL3EXT_CUDA=OFF -DL3EXT_TESTS=ON \
	  -DSKBUILD=ON -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" \
	  -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -DCMAKE_EXPORT_COMPILE_COMMANDS=ON >/dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" pre-commit run --all-files

sanitize: $(VENV)/.cmake
	$(call configure,build/sanitize,-DL3EXT_CUDA=OFF -DL3EXT_TESTS=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DCMAKE_CXX_FLAGS="-fsanitize=address$(comma)undefined -fno-sanitize-recover=all")
	UBSAN_OPTIONS=print_stacktrace=1 $(BIN)/ctest --test-dir build/sanitize --output-on-failure

# OpenMP's barriers are invisible to ThreadSanitizer: the attention tests are left out.
sanitize-thread: $(VENV)/.cmake
	$(call configure,build/sanitize-thread,-DL3EXT_CUDA=OFF -DL3EXT_TESTS=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DCMAKE_CXX_FLAGS="-fsanitize=thread")
	$(BIN)/ctest --test-dir build/sanitize-thread --output-on-failure -R "caching|runtime|placement|prefetch|streams|async|faulty|lzw|file_table|mapped|capi"

bench: $(VENV)/.cmake
	$(call configure,build/cpp,-DL3EXT_BENCHMARKS=ON)
	for program in build/cpp/benchmarks/bench_*; do $$program || exit 1; done

clean:
	rm -rf build $(VENV) demo-out l3ext/_C.*.so *.egg-info

comma := ,
space := $(subst ,, )
