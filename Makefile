# make serve   a cluster on this machine: http://HOST:PORT, until Ctrl-C
# make test    everything the tests need, then the tests; TESTS=tests/unit/test_link.py: only these
# make test-clients   client libraries of others against a cluster
# make check   ruff and mypy
# make schemas hundreds of JSON schemas, regexes and grammars with the embedded model, minutes
# make clean   removes the virtual environment and caches

PYTHON ?= $(shell command -v python3.11 || command -v python3)
HOST   ?= 127.0.0.1
PORT   ?= 8000
CONFIG ?= deploy/config.yaml
TESTS  ?=
VENV   := .venv
PYTEST := $(VENV)/bin/python -m pytest
HERE   := not gpu and not clients

# Two files at a time of what has a thread or two of its own, the long ones first; then, alone, what starts whole clusters.
IN_PAIRS      := -n 2 --dist loadfile --no-loadscope-reorder
SMALL_TESTS   := OMP_NUM_THREADS=1 $(PYTEST) $(IN_PAIRS) -m "$(HERE) and not ray" tests/integration tests/unit
CLUSTER_TESTS := $(PYTEST) -m "$(HERE) and ray" tests/integration tests/chaos

.PHONY: serve python install install-dev test test-clients check clean schemas

serve: install
	@exec $(VENV)/bin/python -m cluster.launch --config $(CONFIG) --host $(HOST) --port $(PORT)

python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v < (3, 11) and sys.exit("Python 3.11 or newer is needed: make PYTHON=...")'

install: python
	@$(PYTHON) deploy/install.py --venv $(VENV)

install-dev: python
	@$(PYTHON) deploy/install.py --venv $(VENV) --extras dev

test: install-dev
	@$(VENV)/bin/python -m engine.model.embedded
	@$(if $(TESTS),$(PYTEST) -m "$(HERE)" $(TESTS),$(SMALL_TESTS) && $(CLUSTER_TESTS))

test-clients: python
	@$(PYTHON) deploy/install.py --venv $(VENV) --extras dev,clients
	@$(VENV)/bin/python -m engine.model.embedded
	@$(VENV)/bin/python -m pytest -m clients tests/clients

schemas: install-dev
	@$(VENV)/bin/python -m tests.schemas.run

check: install-dev
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .hypothesis build *.egg-info
