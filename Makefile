# Each verb is one command, the same here and in CI. The virtual environment is made by whichever verb needs it first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test check bench clean
demo: $(VENV)/.installed
	$(BIN)/lowbit demo -o demo-out

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/par_step.py

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[eval,report,dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-out bench-out
