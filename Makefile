# Every target sets up what it needs in .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
# What a machine with PyTorch usually lacks, all of plain Python.
WHEELS ?= diffusers hydra-core omegaconf antlr4-python3-runtime open_clip_torch ftfy wcwidth importlib_metadata
export WANDB_SILENT ?= true

.PHONY: help setup demo test test-all bench gpu-check gpu-wheels lint wheel train evaluate lora clean

help: ## list every target
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: .venv/ready ## make .venv with pinned versions of everything

demo: .venv/ready ## run the demonstration study on the model that ships with the project
	$(BIN)/lesion experiment=demo

# One process a core, one thread each: more threads would wait for each other. Who is done takes tests from the others.
test: .venv/ready ## lint, types and the test suite
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test-all: .venv/ready ## the test suite with the slow tests
	$(BIN)/python -m pytest -m ''

bench: .venv/ready ## measure speed as ratios within one run (docs/benchmarks.md)
	$(BIN)/python scripts/benchmark.py

# With the Python that has torch for the machine's GPU; the packages that it lacks travel in gpu-wheels/.
gpu-check: ## prove and measure on a GPU in ten minutes, with the Python that is there (docs/performance.md)
	$(PYTHON) scripts/gpu_check.py $(if $(wildcard gpu-wheels),--wheels gpu-wheels)

gpu-wheels: .venv/ready ## wheels of packages that a GPU machine lacks, for gpu-check there
	$(BIN)/python -m pip wheel --quiet --no-deps --constraint constraints.txt --wheel-dir gpu-wheels $(WHEELS)

lint: .venv/ready ## put the code in its canonical form
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

wheel: .venv/ready ## build dist/*.whl
	$(BIN)/python -m build --wheel

train: .venv/ready ## train the embedded model from nothing (hours on a CPU, resumable)
	$(BIN)/python scripts/train_embedded.py

evaluate: .venv/ready ## measure the embedded model on held-out captions
	$(BIN)/python scripts/evaluate_embedded.py

lora: .venv/ready ## teach the embedded model a colour by a LoRA, before and after (docs/lora.md)
	$(BIN)/python scripts/lora_demo.py

clean: ## remove what can be made again (.venv, build, dist)
	rm -rf .venv build dist
