# A fresh machine needs Python 3.11 or newer, make and a C++ compiler. Every target makes what it needs.
BIN     := .venv/bin
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*.h csrc/*.cpp)
RUN     ?=
# 0: go on without the native kernel, on torch's own convolution
NATIVE  ?= 1
# the package installs without a compiler; here that would hide a broken build
EXPECTED = import sys; from replknet.kernels.native_core import library_path; \
           sys.exit(library_path() is None and "the native kernel was not built: \
           `$(BIN)/python -m pip install -v .` shows why, NATIVE=0 goes on without it")
# for `make gpu`: the machine's own, whose torch fits its driver
PYTHON  ?= python3

.PHONY: help demo test test-all check soak coverage sanitize aarch64 bench gpu docs format clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

demo: .venv/installed-demo  ## the main job: train, merge, evaluate and picture a RepLKNet on CIFAR-10
	$(BIN)/replknet demo $(RUN)

# a file stays in one process, which makes its fixtures once
test: check  ## `make check`, then one case of each contract (four minutes on two cores)
	$(BIN)/python -m pytest -q -n2 --dist loadfile $(RUN)

test-all: check  ## `make check`, then the full matrix with the random campaigns; CI adds the sanitizers
	$(BIN)/python -m pytest -q --full --hypothesis-profile=repeatable -n2 --dist loadfile --durations=20 $(RUN)

check: .venv/installed-test  ## format, lint, types and layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

soak: .venv/installed-test  ## 500 random calls against float64, and 500 damaged inputs of each format, or MINUTES=n of other ones
	PYTHONPATH=tests $(BIN)/python -m soak $(if $(MINUTES),--minutes $(MINUTES)) $(RUN)

# the tests' processes, and theirs, each write a file; the C++ core is what its own test runs
coverage: .venv/installed-test  ## the share of lines that `make test` runs, in Python and in the C++ core
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q -n2 --dist loadfile $(RUN)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report
	$(MAKE) -C csrc/test coverage

sanitize:  ## the C++ core under ASan, UBSan and TSan, against sums in double (two minutes)
	$(MAKE) -C csrc/test -j$$(nproc) sanitize

aarch64:  ## the C++ core cross-compiled for AArch64, and its tests under qemu
	$(MAKE) -C csrc/test -j$$(nproc) aarch64

bench: .venv/installed-demo  ## time the operator against torch; records go to benchmarks/results
	$(BIN)/replknet bench ops --backward --output benchmarks/results/ops.jsonl $(RUN)

# about eight minutes: 90 seconds for the tests, then the two limits
gpu:  ## correctness and times on a CUDA device; needs torch, timm, numpy and pytest alone, installs nothing
	@$(PYTHON) -c 'import torch, timm, numpy, pytest' 2>/dev/null || { \
		echo 'no CUDA device was looked for: $(PYTHON) has no torch, timm, numpy or pytest; PYTHON=... names another' >&2; exit 1; }
	PYTHONPATH=src $(PYTHON) -m pytest -q -W default -m gpu tests/kernels/test_triton.py tests/kernels/test_triton_plane.py \
		tests/deploy/test_inference.py
	PYTHONPATH=src $(PYTHON) -m replknet.bench.gpu --limit 330 $(RUN)
	PYTHONPATH=src $(PYTHON) -m replknet.bench.gpu_inference --limit 60

docs: .venv/installed-docs  ## the documentation, into docs/_build/html
	$(BIN)/sphinx-build -q -W -b html docs docs/_build/html
	@echo docs/_build/html/index.html

format: .venv/installed-test  ## rewrite the sources in our format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## forget the environment and everything built
	rm -rf .venv build dist docs/_build .mypy_cache .ruff_cache .pytest_cache

# the first of these that is new enough and really starts (a shim for a missing version does not)
.venv/bin/python:
	@for python in python3.11 python3.12 python3.13 python3; do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "creating .venv with $$python"; exec $$python -m venv .venv; \
		fi; \
	done; \
	echo 'replknet needs Python 3.11 or newer; none of python3.11, python3.12, python3.13, python3 is' >&2; exit 1

.venv/installed-%: $(SOURCES) | .venv/bin/python
	@echo "installing replknet[$*] into .venv (a few minutes the first time)"
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$*]'
	$(if $(filter 0,$(NATIVE)),,@$(BIN)/python -c '$(EXPECTED)')
	@touch $@
