# Two commands do everything on a fresh machine: `make book` and `make test`.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
JOBS ?= 2
SITE := _build/html/index.html
NOTEBOOKS = $(wildcard book/*.ipynb)

# One thread per process: small matrices are faster so, and sums are added in one order.
export OMP_NUM_THREADS := 1
export PYTHONHASHSEED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# .venv is ours to make and to keep up to date; any other VENV (a conda environment) is yours.
ifeq ($(VENV),.venv)
READY := .venv/.installed
else
READY :=
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help book test lab lint format notebooks site wheel benchmark table constraints clean

help: ## List what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

book: $(READY) notebooks site ## Build the book: execute what is stale, write _build/html/index.html
	@echo "The book is ready: $(abspath $(SITE))"

test: $(READY) lint wheel ## Run every test: style, types, floors, doctests, tests, notebooks, site
	$(PY) book/_tools/make_notebooks.py --check
	@$(MAKE) --no-print-directory site
	$(PY) -m pytest -q -n $(JOBS) --dist loadfile --durations=5 blr tests $(NOTEBOOKS)

lab: $(READY) ## Open the chapters in Jupyter Lab
	@mkdir -p $(VENV)/share/jupyter/lab/settings
	@echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"},' \
		'"@jupyterlab/docmanager-extension:plugin": {"defaultViewers":' \
		'{"markdown": "Jupytext Notebook", "myst": "Jupytext Notebook"}}}' \
		> $(VENV)/share/jupyter/lab/settings/overrides.json
	$(BIN)/jupyter lab --notebook-dir=book $(ARGS)

lint: $(READY) ## Check style (ruff), types (pyright) and floors (import-linter)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(PY)
	$(BIN)/lint-imports

format: $(READY) ## Let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(READY) ## Execute the chapters that changed and write their notebooks
	$(PY) book/_tools/make_notebooks.py $(ARGS)

# A page with a warning is not built again, and so would not warn again: forget what was read.
site: $(READY)
	$(PY) book/_tools/make_notebooks.py --prime
	$(BIN)/jupyter-book build -W --keep-going -q . || { rm -rf _build/.doctrees; exit 1; }

# setuptools copies into build/ and would ship files that were deleted since.
wheel: $(READY) ## Build the wheel into _build/dist
	@rm -rf build _build/dist
	$(PY) -m build --wheel --no-isolation --outdir _build/dist . > /dev/null
	@rm -rf build && ls _build/dist/*.whl

table: $(READY) ## Write the table that ends Part II; ARGS=--measure runs the oracles first
	$(PY) book/_tools/make_table.py $(ARGS)

benchmark: $(READY) ## Measure speed and memory against the peers
	@for script in benchmarks/*.py; do $(PY) $$script || exit 1; done

constraints: $(READY) ## Pin what is installed in .venv
	@mkdir -p _build
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/pip freeze --all --exclude-editable \
		| sed -e '/^pip==/d' -e 's/+.*//'; } > _build/constraints.txt
	@mv _build/constraints.txt constraints.txt && touch .venv/.installed

clean: ## Remove what was built; .venv stays
	rm -rf _build build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 or newer is needed, and $(or $(PYTHON),nothing on the PATH) is not:" \
		"install one, or say where it is: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
		echo "$(PYTHON) cannot make environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing into .venv (once, and again when pyproject.toml or constraints.txt change)"
	@test -x .venv/bin/python && .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| $(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install -q -c constraints.txt setuptools wheel
	.venv/bin/python -m pip install -q -c constraints.txt --no-build-isolation \
		-e '.[book,test,notebook]'
	@touch $@
