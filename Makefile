# make demo    the whole system on synthetic data, in minutes on a CPU
# make test    ruff and the test suite
# make lint    ruff alone
# make clean   remove caches and what the demo made; .venv stays

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.requirements

.PHONY: demo test lint clean

demo: $(INSTALLED)
	$(BIN)/python scripts/demo.py

test: lint
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis data/demo
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	if [ -f runs/demo/MADE_BY_DEMO ]; then rm -rf runs/demo; fi

# Installs again only when the pinned set changes.
$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "requirements.txt is pinned for Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@
