PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
KERNELS := $(wildcard snnconv/engine/kernels/*.cpp snnconv/engine/kernels/*.h snnconv/engine/kernels/*.inl)
CPP := $(KERNELS) benchmarks/events.cpp
SANITIZED := build/sanitized/kernels.so
CXX ?= g++
DEMO := demo/digits_resnet.snn.safetensors

.DEFAULT_GOAL := help
.PHONY: help demo test check check-native format docs coverage clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

$(STAMP): setup.cfg pyproject.toml setup.py $(KERNELS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: snnconv needs Python 3.11 or newer; run make PYTHON=python3.11 (or newer)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(STAMP) ## set up .venv, convert the embedded digits network and evaluate it
	mkdir -p demo
	$(BIN)/snnconv convert zoo:digits --data zoo:digits --no-evaluate --output $(DEMO) --force
	$(BIN)/snnconv eval $(DEMO) --data zoo:digits

test: $(STAMP) ## run the default tests
	$(BIN)/python -m pytest -m "not slow and not gpu"

check: $(STAMP) ## check format, lint, types, generated docs, then test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/python docs/generate_cli.py --check
	$(BIN)/python docs/generate_results.py --check
	$(BIN)/python docs/generate_performance.py --check
	$(BIN)/python docs/generate_coverage.py --check
	$(BIN)/python docs/generate_schedules.py --check
	$(MAKE) test

$(SANITIZED): $(KERNELS)
	mkdir -p $(@D)
	$(CXX) -std=c++17 -O1 -g -fPIC -shared -pthread -fsanitize=address,undefined \
	  -fno-sanitize-recover=all $(filter %.cpp,$^) -o $@

check-native: $(STAMP) $(SANITIZED) ## run the native code under AddressSanitizer and UBSan
	SNNCONV_KERNELS=$(CURDIR)/$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  $(BIN)/python -m pytest -q tests/test_native.py

format: $(STAMP) ## format the code and mend what the linter can mend
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

docs: $(STAMP) ## write what is generated in docs, RESULTS.md and README anew
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python docs/generate_results.py
	$(BIN)/python docs/generate_performance.py
	$(BIN)/python docs/generate_coverage.py
	$(BIN)/python docs/generate_schedules.py

coverage: $(STAMP) ## examine all of timm and verify what converts (hours; goes on where it was)
	$(BIN)/python tests/coverage.py
	$(BIN)/python docs/generate_coverage.py runs/coverage.jsonl

clean: ## remove what the tools and the demo left behind (not .venv)
	rm -rf build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
