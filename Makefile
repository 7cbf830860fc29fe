# Two commands for a newcomer: `make demo` and `make test`. Both make a fresh virtual environment
# in .venv when there is none; `make clean` removes it.

PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-output
# The pictures of the common ground, if they lie beside the project; else a synthetic set is drawn.
DATA ?= $(wildcard ../shared/data/neu-det.zip)
BUDGET ?= $(if $(DATA),shipped,small)
WORKERS ?= 2
BIN := $(VENV)/bin
INTERPRETED := $(addprefix tests/test_,stages.py stage_arguments.py spreadless_maps.py) \
  $(addprefix tests/test_triton_,network.py traffic.py sanitizer.py gated_fusion.py msff.py)
SOURCES := $(shell find csrc fused -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test lint check bench clean

help:
	@echo "make demo   DATA=PATH: classify your pictures with the package's weights, and report"
	@echo "            without pictures, or BUDGET=tiny|small|full: train first (on synthetic steel);"
	@echo "            OUT=FOLDER takes another folder than demo-output"
	@echo "make test   lint, types and all tests"
	@echo "make bench  the benchmarks, as a table"
	@echo "make clean  remove $(VENV) and build results"

# torch is installed once and used both to build and to run: building isolated from it would
# unpack a second copy of several GB. `pip install .` does build isolated.
$(VENV)/installed: pyproject.toml setup.py $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "torch>=2.10" torchvision "numpy>=1.24" "setuptools>=77" wheel ninja
	$(BIN)/python -m pip install --no-build-isolation -e ".[test]"
	$(BIN)/python -m fused.doctor
	touch $@

demo: $(VENV)/installed
	$(BIN)/mobilesteelnet demo --budget $(BUDGET) --out $(OUT) $(if $(DATA),--data $(DATA))

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread a worker: two workers with two threads each would fight for two cores. Whether Triton
# interprets its kernels or compiles them is settled when it is imported: the second run interprets.
check: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile
	FUSED_TRITON_INTERPRETER=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) $(INTERPRETED)

test: lint check

bench: $(VENV)/installed
	$(BIN)/python -m pip install -e ".[bench]" --no-build-isolation
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-json=benchmark.json
	$(BIN)/python -m benchmarks.table benchmark.json

clean:
	rm -rf $(VENV) build dist *.egg-info fused/*.so fused/build_plan.json
