# One door: everything a person or CI does is a target here.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE := 1

.PHONY: install demo test unit check lock
install: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3,11) <= sys.version_info < (3,13) else "Python 3.11 or 3.12 is needed; found %s. Run: make install PYTHON=/path/to/python3.11" % sys.version.split()[0])'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet uv==0.13.9 torch==2.13.0
	$(PY) -m uv pip install --quiet --python $(PY) --no-deps -r requirements.lock
	$(PY) -m uv pip install --quiet --python $(PY) --no-deps -e .
	touch $(STAMP)

demo: install
	$(VENV)/bin/tutelage demo

test: install check
	$(PY) -m pytest -q

unit: install
	$(PY) -m pytest -q tests/unit

check: install
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

lock:
	$(PY) -m uv pip compile pyproject.toml --extra dev --python-version 3.11 --no-header --no-annotate --no-emit-package torch -o requirements.lock
