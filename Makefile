# make demo       the whole system on synthetic data, in minutes on a CPU
# make test       linters and the test suite
# make test-fast  the test suite without the tests marked slow
# make test-lowest  the same on the lowest supported versions, in .venv-lowest; 5 GB, or TORCH=2.13.0 with another torch
# make lint       ruff and mypy alone
# make clean      remove caches and what the demo made; .venv stays

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.requirements

# A process for each core, with one thread each, where pytest-xdist is installed.
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest \
	$$($(BIN)/python -c 'import xdist' 2>/dev/null && echo "-n auto --dist loadfile")

.PHONY: demo test test-fast test-lowest lint clean

demo: $(INSTALLED)
	$(BIN)/python scripts/demo.py

test: $(INSTALLED)  # side by side; what the linters say comes last
	@said=$$(mktemp); $(MAKE) --no-print-directory lint >$$said 2>&1 & linters=$$!; $(PYTEST); tests=$$?; \
		wait $$linters; code=$$?; cat $$said; rm -f $$said; exit $$((code ? code : tests))

test-fast: $(INSTALLED)
	$(PYTEST) -m "not slow"

test-lowest:
	.ci/lowest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info data/demo data/demo_short
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	if [ -f runs/demo/MADE_BY_DEMO ]; then rm -rf runs/demo; fi

# Installs again only when the pinned set or the package's metadata change.
$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "requirements.txt is pinned for Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -e .
	touch $@
