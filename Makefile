# Needs Python 3.11 or later and make; everything else is installed into .venv.

PYTHON ?= python3
BIN := .venv/bin
# Written when an installation is complete. A .venv without it that we began is started over.
DONE := .venv/.recpress-installed
BEGUN := .venv/.recpress-begun

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-all faults up-local lint types clean

help:     ## Show this list.
	@sed -n 's/^\([.a-z-]*\): .*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

.venv: $(DONE) ## Create .venv and install the pinned packages (again only if pyproject.toml or constraints.txt changed).
.PHONY: .venv

# torch first, by pip, which takes the build of the index it is given (CPU or CUDA); uv then
# installs the rest and must leave that build alone. recbole carries the demo's data; none of its
# code is run, so it comes without its dependencies.
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
	@[ "$$($(TORCH))" = "$$(cat $(BEGUN))" ] || { echo "uv replaced torch $$(cat $(BEGUN)) by $$($(TORCH)): report this" >&2; exit 1; }
	@rm $(BEGUN) && touch $@

demo: $(DONE) ## Train, compress, build, judge and register a click model on MovieLens 100K.
	$(BIN)/recpress demo

# One thread each: the processes fill the cores already. Bytecode is kept even where the environment
# says not to: tests start many processes, and each would compile 4,600 modules again.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist loadgroup --no-loadscope-reorder
test: $(DONE) ## Run the tests of the default tier; ARGS are passed on to pytest.
	$(PYTEST) $(ARGS)

test-all: $(DONE) ## Run the tests of every tier but gpu, with 200 examples a property, for hours.
	$(PYTEST) -m 'not gpu' --hypothesis-profile nightly $(ARGS)

# Tests are spread over two processes; each has a Prefect server and an S3 server of its own.
faults: $(DONE) ## Kill, flip, cut off, race and fuzz for about two hours; results in build/faults.json.
	OMP_NUM_THREADS=1 RECPRESS_FAULTS_JSON=build/faults.json $(BIN)/pytest -m nightly tests/faults -n 2 --dist load $(ARGS)

up-local: $(DONE) ## Run Prefect, MLflow, Postgres, an S3 store and a worker here until Ctrl-C, without Docker.
	@$(BIN)/python -m infra.services.local_services $(ARGS)

lint: $(DONE) ## Check style and formatting.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DONE) ## Check types.
	$(BIN)/mypy
	$(BIN)/mypy examples

clean:    ## Remove .venv, caches and build outputs; results under RECPRESS_HOME stay.
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
