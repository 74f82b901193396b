# make demo      the main job, end to end, on real data (3 minutes)
# make test      the quick tests, of everything (minutes on two cores)
# make test-all  all tests
# make help      the rest
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ENV := $(VENV)/.installed
NATIVE := $(shell find cpp -name '*.cc' -o -name '*.h') CMakeLists.txt pyproject.toml
TORCH := 2.13.0

.PHONY: help demo test test-all sweep lint format types stubs sanitize docs bench clean dev

help:
	@echo "make demo      train, convert, fine-tune, export and run a small network (3 minutes)"
	@echo "make test      the quick tests, of everything (minutes on two cores)"
	@echo "make test-all  all tests, the slow ones too; ARGS='-k tree' for either chooses some"
	@echo "make sweep     the long sweeps that test-all leaves out (half an hour)"
	@echo "make dev       only the environment ($(VENV)) with everything in it"
	@echo "make lint      ruff, clang-format, mypy; 'make format' mends the first two"
	@echo "make wheel     a wheel for $(PYTHON) and the source archive, in dist; tried in an empty environment"
	@echo "make wheels    wheels for all platforms, in dist; ARGS='--target win_amd64' for one"
	@echo "make release   all of a release but publishing it: VERSION=0.2.0"
	@echo "make sanitize  kernel tests under the address and undefined-behaviour sanitizers"
	@echo "make c-api     the C library and its example, in build/c-api"
	@echo "make fuzz      changed files for the C library, under the sanitizers (ten minutes; SECONDS=60)"
	@echo "make kernels-arm  kernel tests for AArch64, under qemu-aarch64"
	@echo "make test-arm  tests of the engine and the zoo with an arm64 Python, under qemu-aarch64"
	@echo "make wasm      the WebAssembly modules in js, with emscripten"
	@echo "make kernels-wasm  kernel tests for WebAssembly, in Node"
	@echo "make web       the page of examples/web in build/web; 'make web-test' tries it in Chromium"
	@echo "make stubs     src/lutra/_engine.pyi from the built extension"
	@echo "make docs      the documentation as a site, in build/site"
	@echo "make bench     benchmarks; results go to benchmarks/results"
	@echo "make clean     remove what was built"

$(BIN)/python:
	@echo "== creating the environment $(VENV)"
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'lutra needs Python 3.10 or newer')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.torch: | $(BIN)/python
	@echo "== installing PyTorch $(TORCH) (the largest download)"
	$(BIN)/python -m pip install torch==$(TORCH)
	@touch $@

$(ENV): $(VENV)/.torch $(NATIVE)
	@echo "== building lutra and installing its tools (one to three minutes)"
	$(BIN)/python -m pip install --quiet scikit-build-core nanobind cmake ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[dev]"
	@touch $@

dev: $(ENV)

demo: $(ENV)
	$(BIN)/python examples/digits.py --output build/digits.lutra --report build/report.html

# One worker for each core, with one thread each.
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal

test: $(ENV)
	$(PYTEST) -m "not slow and not sweep" tests $(ARGS)

test-all: $(ENV)
	$(PYTEST) -m "not sweep" tests $(ARGS)

sweep: $(ENV)
	$(PYTEST) -m sweep tests $(ARGS)

lint: $(ENV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find cpp tests include examples -name '*.cc' -o -name '*.h' -o -name '*.c')
	$(BIN)/mypy

format: $(ENV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find cpp tests include examples -name '*.cc' -o -name '*.h' -o -name '*.c')

stubs: $(ENV)
	$(BIN)/python cpp/make_stub.py

# The wheel is built from the source archive, so both are tried. From Python 3.12 on it is for the
# stable ABI: one wheel for all newer versions.
.PHONY: wheel
wheel: $(BIN)/python
	@echo "== building the source archive and the wheel (two minutes)"
	rm -rf dist
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build --outdir dist
	$(BIN)/python tests/wheel_smoke.py dist/*.whl zoo/dscnn_speech_commands.lutra

$(VENV)/.wheels: $(ENV)
	@echo "== installing Zig and what checks wheels"
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[wheels]"
	@touch $@

# Wheels for all platforms, by Zig's clang; what cannot be built here is named, and is an error.
.PHONY: wheels release
wheels: $(VENV)/.wheels
	rm -rf dist
	$(BIN)/python wheels/build_wheels.py --output dist $(ARGS)
	$(BIN)/python wheels/check_wheels.py dist/*.whl
	$(BIN)/python wheels/instructions.py build/wheels/*/cmake
	$(BIN)/python wheels/run_wheels.py dist/*.whl

release: $(VENV)/.wheels
	$(BIN)/python wheels/release.py $(VERSION)

sanitize: $(ENV)
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DCMAKE_BUILD_TYPE=Release -DLUTRA_PYTHON=OFF -DLUTRA_KERNEL_TESTS=ON -DLUTRA_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize
	build/sanitize/kernels_test

.PHONY: c-api fuzz
c-api: $(ENV)
	$(BIN)/cmake -S . -B build/c-api -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DLUTRA_PYTHON=OFF -DLUTRA_C=ON -DLUTRA_C_EXAMPLE=ON
	$(BIN)/cmake --build build/c-api

# libFuzzer with clang, a plain program without. Kernels of instruction sets have tests of their own,
# and take long to build with sanitizers, so that the scalar ones run here.
SECONDS ?= 600
FUZZ_CMAKE = $(BIN)/cmake -S . -B build/fuzz -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
  -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS=-O1 -DLUTRA_PYTHON=OFF -DLUTRA_FUZZ=ON \
  -DLUTRA_SANITIZE=ON -DLUTRA_CAN_AVX2=OFF -DLUTRA_CAN_AVX512=OFF
fuzz: $(ENV)
	$(FUZZ_CMAKE) $$(command -v clang++ > /dev/null && echo -DCMAKE_CXX_COMPILER=clang++)
	$(BIN)/cmake --build build/fuzz
	cd tests && $(abspath $(BIN))/python fuzz_corpus.py ../build/fuzz/corpus
	cd tests && $(abspath $(BIN))/python fuzz_corpus.py ../build/fuzz/wrong 5000
	build/fuzz/fuzz_mutations build/fuzz/wrong 0
	build/fuzz/fuzz_mutations build/fuzz/corpus $$(($(SECONDS) / 2))
	mkdir -p build/fuzz/found
	! test -e build/fuzz/fuzz_compiled || build/fuzz/fuzz_compiled -max_total_time=$$(($(SECONDS) / 2)) \
	  -max_len=65536 -timeout=60 -malloc_limit_mb=512 -print_final_stats=1 build/fuzz/found build/fuzz/corpus

# Needs Debian's g++-aarch64-linux-gnu and qemu-user. One core has the dot products, one has not.
ARM := aarch64-linux-gnu
ARM_CORES := cortex-a53 max
ARM_CMAKE = $(BIN)/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(ARM)-g++ \
  -DCMAKE_BUILD_TYPE=Release
.PHONY: kernels-arm test-arm
kernels-arm: $(ENV)
	$(ARM_CMAKE) -B build/aarch64 -DLUTRA_PYTHON=OFF -DLUTRA_KERNEL_TESTS=ON -DLUTRA_WERROR=ON
	$(BIN)/cmake --build build/aarch64 --target kernels_test
	for core in $(ARM_CORES); do echo "== $$core"; \
	  qemu-aarch64 -cpu $$core -L /usr/$(ARM) build/aarch64/kernels_test || exit 1; done

# Need Debian's emscripten and Node 20.
EMSCRIPTEN ?= $(dir $(realpath $(shell command -v emcc)))
WASM_CMAKE = $(BIN)/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
  -DCMAKE_TOOLCHAIN_FILE=$(EMSCRIPTEN)cmake/Modules/Platform/Emscripten.cmake \
  -DCMAKE_BUILD_TYPE=Release -DLUTRA_PYTHON=OFF
# Node 20 has relaxed SIMD behind a flag, which newer ones do not know.
RELAXED_SIMD = $(shell node --v8-options | grep -o -- --experimental-wasm-relaxed-simd | head -1)
.PHONY: wasm kernels-wasm
wasm: $(ENV)
	$(WASM_CMAKE) -B build/wasm -DLUTRA_WASM=ON
	$(BIN)/cmake --build build/wasm --target lutra_wasm lutra_dot_wasm
	for name in lutra lutra_dot; do cmp -s build/wasm/$$name.wasm js/$$name.wasm || \
	  cp build/wasm/$$name.wasm js/$$name.wasm || exit 1; done

kernels-wasm: $(ENV)
	$(WASM_CMAKE) -B build/wasm-kernels -DLUTRA_KERNEL_TESTS=ON -DLUTRA_WERROR=ON
	$(BIN)/cmake --build build/wasm-kernels --target kernels_test
	node --no-warnings $(RELAXED_SIMD) tests/run_wasi.mjs build/wasm-kernels/kernels_test.wasm

.PHONY: web web-test bench-web
build/digits.lutra: | $(ENV)
	$(BIN)/python examples/digits.py --output $@

web: wasm build/digits.lutra
	$(BIN)/python examples/web/build.py build/digits.lutra build/web

# Needs Chromium too: CHROMIUM=/usr/bin/chromium
examples/web/node_modules: examples/web/package.json
	cd examples/web && npm install --ignore-scripts --no-audit --no-fund --no-package-lock && touch node_modules
web-test: web examples/web/node_modules
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_web_page.py $(ARGS)

benchmarks/web/node_modules: benchmarks/web/package.json
	cd benchmarks/web && npm install --ignore-scripts --no-audit --no-fund --no-package-lock && touch node_modules
bench-web: wasm $(VENV)/.bench benchmarks/web/node_modules
	$(BIN)/python -m benchmarks.web.make_models build/web-bench
	node benchmarks/web/node.mjs build/web-bench --json benchmarks/results/web_node.json
	node benchmarks/web/browser.mjs build/web-bench --json benchmarks/results/web_chromium.json

build/arm/python: tests/arm_python.sh | $(ENV)
	tests/arm_python.sh build/arm $(BIN)/python

# The files of the zoo run on both cores, the tests on the newer one with all its instruction sets.
# One is left out: the memory that it limits would be the emulator's.
ARM_TESTS := tests/test_dispatch.py tests/test_session.py tests/test_int8.py tests/test_depthwise.py \
  tests/test_tree.py tests/test_code_groups.py tests/test_lookup_engine.py tests/test_fused.py \
  tests/test_function_kernels.py tests/test_softmax.py
test-arm: $(ENV) build/arm/python
	$(ARM_CMAKE) -B build/aarch64-python -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -DPython_INCLUDE_DIR=$$(echo $(abspath build/arm)/root/usr/include/python3.*) \
	  -DCMAKE_CXX_FLAGS="-isystem $(abspath build/arm)/root/usr/include" \
	  -DNB_SUFFIX=.so -Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir)
	$(BIN)/cmake --build build/aarch64-python --target _engine
	rm -rf build/arm/package && mkdir -p build/arm/package
	cp -r src/lutra build/aarch64-python/_engine.so build/arm/package/
	rm -f build/arm/package/lutra/_engine.*.so && mv build/arm/package/_engine.so build/arm/package/lutra/
	for core in $(ARM_CORES); do echo "== $$core"; for file in zoo/*.lutra; do \
	  QEMU_CPU=$$core build/arm/python -m lutra verify $$file --samples 0 || exit 1; done; done
	build/arm/python -m pytest -q -p no:cacheprovider -m "not slow and not sweep" $(ARM_TESTS) \
	  --deselect tests/test_dispatch.py::test_threads_that_do_not_start_are_an_error $(ARGS)

$(VENV)/.docs: $(ENV)
	@echo "== installing the tools of the documentation"
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[dev,docs]"
	@touch $@

# The pages and what they link to keep their places, so that relative links work on the site too.
docs: $(VENV)/.docs
	rm -rf build/pages && mkdir -p build/pages
	cp --parents *.md LICENSE docs/*.md docs/api/*.md zoo/*.md benchmarks/*.md examples/*.py \
	  examples/c/*.c include/*.h build/pages/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.bench: $(ENV)
	@echo "== installing the runtimes to compare with"
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[dev,bench]"
	@touch $@

bench: $(VENV)/.bench
	mkdir -p benchmarks/results
	$(BIN)/python -m benchmarks.train_step --json benchmarks/results/train_step.json
	$(BIN)/python -m benchmarks.engine --json benchmarks/results/engine.json
	$(BIN)/python -m benchmarks.functions --json benchmarks/results/functions.json
	$(BIN)/python -m benchmarks.functions --isa avx2 --json benchmarks/results/functions_avx2.json
	$(BIN)/python -m benchmarks.lowbit --json benchmarks/results/lowbit.json
	$(BIN)/python -m benchmarks.lowbit --isa avx2 --json benchmarks/results/lowbit_avx2.json
	$(BIN)/python -m benchmarks.layers --json benchmarks/results/layers.json
	$(BIN)/python -m benchmarks.layers --isa avx2 --json benchmarks/results/layers_avx2.json
	$(BIN)/python -m benchmarks.models --memory --json benchmarks/results/models.json
	$(BIN)/python -m benchmarks.models --isa avx2 --json benchmarks/results/models_avx2.json
	$(BIN)/python -m benchmarks.sentences --memory --json benchmarks/results/sentences.json
	$(BIN)/python -m benchmarks.sentences --isa avx2 --json benchmarks/results/sentences_avx2.json

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache $(VENV)
