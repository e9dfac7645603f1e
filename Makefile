# Everything runs inside .venv; `make help` lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP  := $(VENV)/.installed
BUILT  := $(VENV)/.built
CSRC   := $(shell find csrc -type f)
CXX_FILES := $(filter %.h %.cpp %.cu %.cuh,$(CSRC) $(wildcard tests/cuda/* tests/cuda/emulator/*))

.DEFAULT_GOAL := help
.PHONY: help train install test test-gpu test-slow rehearse sanitize mutants inspect-table bench bench-gpu docs lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

train: install  ## train a character-level GPT on tiny Shakespeare and sample from it
	$(BIN)/fastgpt train char-cpu --fallback-corpus pydocs $(ARGS)

install: $(BUILT)  ## create .venv with fastgpt (editable), its native kernels and its development tools

$(STAMP): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fastgpt needs Python >= 3.10, and '$(PYTHON)' is older: make PYTHON=/path/to/python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "'$(PYTHON) -m venv' failed: on Debian or Ubuntu, apt install python3-venv"; exit 1; }
	@# First what builds: the native kernels must be built against the PyTorch that is installed here.
	@$(PIP) 'setuptools>=77' torch ninja
	@FASTGPT_BUILD=none $(PIP) --no-build-isolation --editable '.[dev]'
	@touch $(STAMP)

$(BUILT): $(STAMP) $(CSRC)
	@mkdir -p build && echo "building the native kernels (build/native.log)"
	@$(BIN)/python setup.py build_ext --inplace > build/native.log 2>&1 || { tail -n 60 build/native.log; exit 1; }
	@touch $(BUILT)

test: install  ## run the test suite
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-slow: install  ## run the tests that take minutes (some need FASTGPT_SHAKESPEARE=path/to/input.txt)
	$(BIN)/python -m pytest -m slow $(ARGS)

rehearse: install  ## reproduce GPT-2 in small, minutes on a CPU: data, torchrun, a kill, resume, evaluation, export
	@rm -rf build/rehearse
	$(BIN)/python tests/train/rehearse.py build/rehearse

test-gpu: install  ## run the tests of the kernels on this machine's GPU instead of the interpreter
	@$(BIN)/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || \
	  { echo "no usable CUDA GPU here: 'make test' runs the same tests in Triton's interpreter"; exit 1; }
	$(BIN)/python -m pytest tests/ops tests/kernels tests/test_optim.py tests/test_model_implementations.py $(ARGS)

sanitize: install  ## run the CUDA kernels, emulated, under the address, undefined behaviour and thread sanitizers
	$(BIN)/python tests/cuda_emulator.py address $(ARGS)
	$(BIN)/python tests/cuda_emulator.py thread $(ARGS)

mutants: install  ## break the code in known ways, one at a time, and see that a test notices (hours)
	$(BIN)/python tests/mutants.py -j 2 $(ARGS)

inspect-table: install  ## record what the Triton kernels compile to, which tests compare with (an hour)
	$(BIN)/python -m fastgpt.inspect.table --families 80 90 100 120 --write $(ARGS)

# Named by the day, so that the same command goes on with what was interrupted.
RUN       := $(or $(RUN),$(shell date -u +%Y%m%d))
BENCH_DIR ?= runs/bench-$(RUN)
BENCH     := $(BIN)/fastgpt bench
EVERY_CASE = --shapes quick --directions both forward --every-case --case-seconds 0.5
THIS_RUN   = --out $(BENCH_DIR) --run $(RUN) --resume

bench: install  ## time operations, training and generation on this machine, under 10 minutes; writes a report
	@mkdir -p $(BENCH_DIR) && echo "timing, at most 9 minutes: tail -f $(BENCH_DIR)/log.txt"
	@$(BENCH) ops $(EVERY_CASE) --budget 400 $(THIS_RUN) >> $(BENCH_DIR)/log.txt || tail $(BENCH_DIR)/log.txt
	@$(BENCH) train --budget 150 $(THIS_RUN) >> $(BENCH_DIR)/log.txt || tail $(BENCH_DIR)/log.txt
	@$(BENCH) generate --budget 60 $(THIS_RUN) >> $(BENCH_DIR)/log.txt || tail $(BENCH_DIR)/log.txt
	@$(BENCH) summary $(BENCH_DIR)
	@$(BENCH) report $(BENCH_DIR) --out $(BENCH_DIR)/report

bench-gpu: install  ## everything on this machine's GPU, most important first, under 10 minutes, resumable
	-$(BENCH) train --device cuda --preset gpt2 --budget 150 $(THIS_RUN)
	-$(BENCH) ops --device cuda --shapes gpt2 --budget 200 $(THIS_RUN)
	-$(BENCH) ladder --device cuda --budget 90 $(THIS_RUN)
	-$(BENCH) generate --device cuda --budget 40 $(THIS_RUN)
	@$(BENCH) report $(BENCH_DIR) --out $(BENCH_DIR)/report
	@$(BENCH) summary $(BENCH_DIR)
	-$(BENCH) ops --device cuda --contenders compile-max-autotune --budget 60 --out $(BENCH_DIR) --run $(RUN)-autotune --resume

docs: install  ## build the documentation as a site in build/site; broken links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: install  ## ruff, clang-format and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

format: install  ## let ruff and clang-format put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:  ## remove .venv and build leftovers (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info fastgpt/_C.*.so
