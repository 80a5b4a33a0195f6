# Requires Python 3.11 or later and make; everything else is installed into .venv.

PYTHON ?= python3
BIN := .venv/bin
# BEGUN exists during an installation, DONE after it. An installation that finds BEGUN starts over.
DONE := .venv/.recpress-installed
BEGUN := .venv/.recpress-begun

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-all faults up-local lint types clean

help:     ## Show this list.
	@sed -n 's/^\([.a-z-]*\): .*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

.venv: $(DONE) ## Create .venv and install the pinned packages (again only if pyproject.toml or constraints.txt changed).
.PHONY: .venv

# pip installs torch first, as the build of the configured index (CPU or CUDA). uv then installs the
# rest and must not change that build. recbole contains the demo's data; only tests run its code, so
# most of its dependencies are not installed. The libraries whose models are tested, and packages that
# recbole imports, are in a separate folder, because one of them installs a package called tests.
TORCH := $(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))'
$(DONE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "recpress needs Python 3.11 or later; $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@if [ -e $(BEGUN) ]; then echo 'starting over: the last installation did not finish'; rm -rf .venv; fi
	@mkdir -p .venv && rm -f $(DONE) && touch $(BEGUN)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch uv
	@$(TORCH) > $(BEGUN)
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -b constraints.txt -e '.[dev,services,tensorrt-rtx]'
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt --no-deps recbole
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt --no-deps --target .venv/libraries torch-rechub deepctr-torch absl-py colorlog tensorboard texttable
	@[ "$$($(TORCH))" = "$$(cat $(BEGUN))" ] || { echo "uv replaced torch $$(cat $(BEGUN)) by $$($(TORCH)): report this" >&2; exit 1; }
	@rm $(BEGUN) && touch $@

demo: $(DONE) ## Train, compress, build, evaluate and register a click model on MovieLens 100K.
	$(BIN)/recpress demo

# One thread per process, because the processes already use all cores. Bytecode is written even if
# the environment disables it: tests start many processes, and each would compile 4,600 modules.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist loadgroup --no-loadscope-reorder
test: $(DONE) ## Run the tests of the default tier; ARGS are passed to pytest.
	$(PYTEST) $(ARGS)

test-all: $(DONE) ## Run the tests of all tiers except gpu, with 200 examples per property; takes hours.
	$(PYTEST) -m 'not gpu' --hypothesis-profile nightly $(ARGS)

# The tests run in two processes, each with a separate Prefect server and S3 server.
faults: $(DONE) ## Run the fault tests (kills, bit flips, outages, races, fuzzing) for about two hours; results in build/faults.json.
	OMP_NUM_THREADS=1 RECPRESS_FAULTS_JSON=build/faults.json $(BIN)/pytest -m nightly tests/faults -n 2 --dist load $(ARGS)

up-local: $(DONE) ## Run Prefect, MLflow, Postgres, an S3 store and a worker here until Ctrl-C, without Docker.
	@$(BIN)/python -m infra.services.local_services $(ARGS)

lint: $(DONE) ## Check style and formatting.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DONE) ## Check types.
	$(BIN)/mypy
	$(BIN)/mypy examples

clean:    ## Remove .venv, caches and build outputs; results in RECPRESS_HOME stay.
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
