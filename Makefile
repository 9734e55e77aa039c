# TASL Lab. `make demo` and `make test` are all a newcomer needs; `make` alone lists the rest.
PYTHON ?= python3
BIN    := .venv/bin
STAMP  := .venv/.installed
OUT    ?= runs/demo

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-full lab docs export clean

help:          ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | while IFS="$$(printf '\t')" read -r t h; do printf '  make %-10s %s\n' "$$t" "$$h"; done

install: $(STAMP)  ## make .venv and install everything (quick when nothing changed)

demo: install  ## the main job on brain MRI and phantoms; writes runs/demo/report.html
	$(BIN)/tasl demo --out $(OUT)
	@echo "report: $(CURDIR)/$(OUT)/report.html"

test: install  ## the fast tier: in step, ruff, notebooks, pytest, smoke demo
	$(BIN)/python tests/tiers.py fast

test-slow: install  ## the slow tier: lessons, experiments, docs, slow tests and browser
	$(BIN)/python tests/tiers.py slow

test-full: install  ## everything: both tiers, then the tests that take hours
	$(BIN)/python tests/tiers.py fast slow full

lab: install   ## JupyterLab on the guided notebooks
	$(BIN)/jupyter lab --notebook-dir=nbs --LabApp.default_url=/lab/tree/$(if $(wildcard nbs/lessons),lessons,index.ipynb)

docs: install  ## the documentation in _docs (Quarto where it is on PATH, a plain builder otherwise)
	$(BIN)/python .ci/docs.py build

export: install  ## library, sidebar and clean notebooks from the notebooks
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python .ci/docs.py sidebar

clean:         ## remove what runs, docs and builds left behind (not .venv)
	rm -rf runs _docs _proc build dist .pytest_cache .ruff_cache *.egg-info
	find . -path ./.venv -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -print | xargs rm -rf

# Debian's python3 without its venv package cannot put pip into a new environment: then the pip at hand does it.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "TASL Lab needs Python 3.10 or newer; name one with: make PYTHON=python3.11 ..."; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || \
	  { $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]"
	@touch $@
