# Every target uses the virtual environment .venv, or the one named by `make VENV=DIR ...`.
VENV   ?= .venv
PYTHON ?= python3

BIN     := $(abspath $(VENV))/bin
COMPAT  := $(abspath $(VENV))-compat/bin
PY      := $(BIN)/python
export OMP_NUM_THREADS ?= 1
ON_CPU   = $(shell $(PY) -c "import torch; print('' if torch.cuda.is_available() else 1)" 2>/dev/null)

PIP     := $(PY) -m pip install --disable-pip-version-check -c constraints.txt
COMMA   := ,
step     = @echo; echo '--- $(1) ---'

.PHONY: help install quickstart test check matrix soak compat mutants bench schema clean

help:  ## what there is to make
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed  ## a virtual environment with Tessera, and what the quickstart needs compiled (minutes)

quickstart: $(VENV)/.installed  ## train a small Llama on the standard library's source, 2 processes, minutes
	$(if $(ON_CPU),DS_ACCELERATOR=cpu) $(BIN)/deepspeed --num_gpus $(if $(ON_CPU),2,1) \
		launch/train.py --config ds_configs/quickstart.json
	@echo; echo '--- what the model writes after "def " ---'
	@$(PY) launch/generate.py --run runs/quickstart --prompt 'def ' --tokens 60
	@echo '---'
	@echo 'Run directory: runs/quickstart (numbers in metrics.jsonl, model in final/, W&B offline run in wandb/)'
	@echo 'Next: $(VENV)/bin/python launch/generate.py --run runs/quickstart --prompt "import os"'
	@echo '      $(VENV)/bin/python launch/train.py --config ds_configs/quickstart-2x2x2.json --dry_run --world 8'
	@echo '      copy ds_configs/quickstart.json, point data.train at your own text, and train again'

test: $(VENV)/.installed-test  ## the whole test suite
	$(PY) -m pytest

check: $(VENV)/.installed-dev  ## lint, types, import rules, spelling, fast tests: before each commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell -D - -D tools/dialect.txt
	$(PY) -m pytest -m 'fast and not matrix'

matrix: $(VENV)/.installed-test  ## the long tests
	$(PY) -m pytest -m matrix

soak: $(VENV)/.installed-test  ## runs killed at random instants, over and over (about half an hour on 2 cores)
	$(PY) -m pytest -m soak

compat:  ## the fast proof on the newest allowed versions of all dependencies, in $(VENV)-compat (about 10 minutes on 2 cores)
	test -x $(COMPAT)/python || $(PYTHON) -m venv $(VENV)-compat
	$(COMPAT)/python -m pip install -q --disable-pip-version-check --upgrade --upgrade-strategy eager -e '.[test]'
	$(COMPAT)/python -m tools.extensions ShareMemCommBuilder FusedAdamBuilder
	$(COMPAT)/python -m tools.extensions CPUAdamBuilder
	$(COMPAT)/python -m pytest -m 'fast and not matrix'
	$(COMPAT)/python -m pytest tests/test_layouts.py tests/test_engine.py tests/test_pipeline_engine.py

mutants: $(VENV)/.installed-test  ## small faults in trainer/, which the fast tests must detect (under 40 minutes on 2 cores)
	$(PY) -m tools.mutants

bench: $(VENV)/.installed-dev  ## every figure of the README (about a quarter of an hour on 2 cores)
	$(PIP) -q -e '.[bench]'
	$(PY) -m tools.bench data
	$(PY) -m tools.bench states
	$(PY) -m tools.bench traffic
	$(PY) -m tools.bench pipeline
	$(PY) -m tools.bench checkpoint
	$(PY) -m tools.bench replicas
	$(PY) -m tools.bench guards
	$(PY) -m tools.bench overhead

schema: $(VENV)/.installed  ## write ds_configs/schema.json and docs/configuration.md
	$(PY) -m tools.schema

clean:  ## remove what the tools leave behind; runs/ and the virtual environment stay
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build *.egg-info

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed: make PYTHON=python3.12 ...")'
	@command -v g++ >/dev/null || { echo 'g++ is needed, to compile two extensions of DeepSpeed: apt install g++'; exit 1; }
	$(call step,1 of 4: a virtual environment in $(VENV). Seconds)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(call step,2 of 4: PyTorch$(COMMA) the largest download. Half a minute and more)
	$(PIP) torch
	$(call step,3 of 4: DeepSpeed$(COMMA) Transformers and what else Tessera imports. Half a minute)
	$(PIP) -e .
	$(call step,4 of 4: compiling what training on CPUs needs of DeepSpeed (with a GPU: nothing). A minute on 2 idle cores$(COMMA) several on busy ones)
	$(PY) -m tools.extensions ShareMemCommBuilder FusedAdamBuilder
	@touch $@
	@echo 'Installed in $(VENV). Next: make quickstart'

$(VENV)/.installed-test: $(VENV)/.installed
	$(call step,1 of 2: pytest and psutil. Seconds)
	$(PIP) -q -e '.[test]'
	$(call step,2 of 2: compiling the optimizer of offloaded runs$(COMMA) which some tests use. Half a minute on 2 idle cores)
	$(PY) -m tools.extensions CPUAdamBuilder
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(call step,1 of 1: ruff$(COMMA) mypy$(COMMA) import-linter and codespell. Seconds)
	$(PIP) -q -e '.[dev]'
	@touch $@
