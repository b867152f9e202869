# Everything a developer or user types. Each target sets up what it needs first.
.PHONY: setup demo test bench neon quality format clean

PYTHON := .venv/bin/python
VELOXQUANT := .venv/bin/veloxquant
BUILD := build/python
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell getconf _NPROCESSORS_ONLN)

configure = cmake -S . -B $(BUILD) -DVELOXQUANT_BUILD_$(1)=ON > build/configure.log || { cat build/configure.log; false; }

setup:
	@tools/setup.sh

demo: setup
	$(VELOXQUANT) demo

# The tests are built where the extension was, so that the core is compiled once.
test:
	@tools/setup.sh --test
	$(PYTHON) tools/check_layers.py
	$(call configure,TESTS)
	cmake --build $(BUILD)
	ctest --test-dir $(BUILD) --output-on-failure --parallel $(CMAKE_BUILD_PARALLEL_LEVEL)
	$(PYTHON) -m pytest

bench: setup
	$(call configure,BENCHMARKS)
	cmake --build $(BUILD) --target benchmarks
	for program in $(BUILD)/*_bench; do echo "== $$program" && $$program || exit 1; done
	$(VELOXQUANT) bench kernels

# The codecs and their tests for AArch64, run under qemu.
neon:
	@tools/neon.sh

quality: setup
	@tools/quality.sh

format:
	@tools/setup.sh --dev
	git ls-files '*.h' '*.cpp' '*.cu' | xargs .venv/bin/clang-format -i
	.venv/bin/ruff format python tools
	.venv/bin/ruff check --fix python tools

clean:
	rm -rf build .venv
