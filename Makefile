PYTHON ?= python3
VENV ?= .venv
TORCH ?= cpu# or cuda: Linux with an NVIDIA GPU
BIN := $(VENV)/bin
# Nothing comes in but what is listed with its hash: no build tool either.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
LOCKED := $(PIP) --require-hashes --no-deps --no-build-isolation --requirement requirements

.PHONY: demo test lint lock reliability clean

# Train, sample and evaluate on scikit-learn's digits; ends by printing where the results are.
demo: $(VENV)/.installed
	$(BIN)/scoresde-train experiment=demo

# A worker a core; one that has nothing left takes tests from another.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/.linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Faults injected into training, at full counts: 40 minutes on two cores. Writes benchmarks/RELIABILITY.md.
reliability: $(VENV)/.installed
	$(BIN)/python benchmarks/reliability

clean:
	rm -rf $(VENV)

# The first index with the wheel of torch will do; pytorch.org is asked only where the configured ones have none.
$(VENV)/.installed: pyproject.toml $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "scoresde needs Python 3.11 to 3.13; got $$($(PYTHON) --version). Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing torch and what else is needed into $(VENV), once; this takes some minutes."
	$(LOCKED)/build.txt
	$(LOCKED)/torch-$(TORCH).txt 2> /dev/null || \
		$(LOCKED)/torch-$(TORCH).txt --extra-index-url https://download.pytorch.org/whl/cpu
	$(LOCKED)/test.txt
	$(PIP) --no-deps --no-build-isolation --no-index --editable .
	$(BIN)/python -m pip check
	@touch $@

$(VENV)/.linters: $(VENV)/.installed
	$(LOCKED)/dev.txt
	@touch $@

# Resolves the locks anew, by uv (`pip install uv`), from pyproject.toml and requirements/*.in. Nothing younger than two
# weeks is taken: a release by someone who stole an account is usually found sooner.
COMPILE := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --exclude-newer "14 days" \
	--custom-compile-command "make lock"
lock:
	$(COMPILE) --upgrade pyproject.toml --extra dev requirements/lock.in --config-file requirements/uv.toml \
		--no-emit-package torch --output-file requirements/dev.txt
	$(COMPILE) pyproject.toml --extra test --constraint requirements/dev.txt requirements/lock.in \
		--config-file requirements/uv.toml --no-emit-package torch --output-file requirements/test.txt
	$(COMPILE) requirements/build.in --constraint requirements/dev.txt --output-file requirements/build.txt
	grep ^torch== requirements/lock.in | $(COMPILE) - --constraint requirements/dev.txt --output-file requirements/torch-cuda.txt
