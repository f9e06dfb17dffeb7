# The only commands to remember. All of them set up .venv first where it is missing.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: build
.DEFAULT_GOAL := build

# ---- environment: torch comes pinned from constraints.txt; a change of the metadata reinstalls
$(STAMP): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

# ---- build: incremental; only what changed in csrc/ is compiled
build: $(STAMP)
	$(BIN)/python setup.py --quiet build_ext --inplace
