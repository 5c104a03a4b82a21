PYTHON ?= python3
VENV ?= .venv
TORCH ?= cpu# or cuda: Linux with an NVIDIA GPU
BIN := $(VENV)/bin
# Nothing comes in but what is listed with its hash: no build tool either.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
LOCKED := $(PIP) --require-hashes --no-deps --no-build-isolation --requirement requirements

.PHONY: demo check test lint docs lock reliability clean

# Train, sample and evaluate on scikit-learn's digits; ends by printing where the results are.
demo: $(VENV)/.installed
	$(BIN)/scoresde-train experiment=demo

# A worker for every core; one that has nothing left takes tests from another.
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal
test: $(VENV)/.installed
	$(PYTEST)

# For the inner loop, about a minute: lint, and the part of the tests that CONTRIBUTING.md describes.
CHECKED := test_architecture.py test_ode.py noise ops diffusion/test_denoiser.py diffusion/test_grids.py \
	diffusion/test_mixture.py diffusion/test_parameterization.py diffusion/test_prediction.py diffusion/test_sde.py \
	diffusion/test_table.py nn/test_nn.py losses/test_loss.py guidance/test_tilt.py likelihood/test_classify.py \
	likelihood/test_divergence.py likelihood/test_likelihood.py::test_the_error_follows_the_tolerance \
	inverse/test_observation.py data/test_data.py sampling/test_sampler.py sampling/test_steps.py sampling/test_edit.py \
	sampling/test_moments.py::test_images_land_on_the_moments runs/test_checkpoint.py runs/test_runs.py \
	runs/test_posthoc.py train/test_trainer.py train/test_tally.py train/test_ema.py train/test_scale.py \
	evaluate/test_figures.py sweep/test_page.py cli/test_train_command.py::test_the_best_checkpoints_stay \
	kernels/test_kernel_launcher.py kernels/test_kernel_switch.py
SLOW := nn/test_nn.py::test_the_mlp_leaves_the_best_linear_denoiser test_ode.py::test_solvers_keep_their_tolerance_both_ways \
	train/test_tally.py::test_processes_agree train/test_trainer.py::test_it_learns_the_optimal_denoiser
check: lint
	$(PYTEST) $(addprefix tests/,$(CHECKED)) $(addprefix --deselect=tests/,$(SLOW))

lint: $(VENV)/.linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site: pages, and a reference made of the docstrings. A broken link is an error. Opens at build/site/docs/index.html.
docs: $(VENV)/.linters
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d build/doctrees -c docs . build/site
	@echo "The site is build/site/docs/index.html"

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
