# Everything on a machine that has Python 3.11 or newer, and nothing else.
# The first of these that is new enough.
PYTHON ?= $(or $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done),python3)
VENV ?= .venv
# See tools/install_torch.sh: one requirement for torch, and more arguments for pip.
TORCH ?=
PIP_ARGS ?=
# A whole file goes to one process, so that what its tests share is built once. The tests start processes themselves.
PYTEST_ARGS ?= -n 2 --dist loadfile

BIN := $(VENV)/bin
DATA := runs/data/sample
RUN := runs/quickstart
export OMP_NUM_THREADS ?= 1
export TORCH PIP_ARGS

.DELETE_ON_ERROR:
.PHONY: help install quickstart compare test test-fast test-slow lint docs release-check clean

help:
	@echo "make quickstart   four sites train one Mixture-of-Experts model on real text"
	@echo "make compare      the same run with every file of configs/strategy, and a table (half an hour on 2 cores)"
	@echo "make test         run the tests (a quarter of an hour on 2 cores)"
	@echo "make test-fast    those of them that start no processes (three minutes)"
	@echo "make test-slow    run the others: faults, benchmarks, the documents' files, notebook and site"
	@echo "make lint         ruff and mypy"
	@echo "make docs         the documentation as a site, build/docs/index.html"
	@echo "make release-check  a wheel, installed afresh, trains the quickstart in an empty folder"
	@echo "make install      only the virtual environment $(VENV) with fomoe in it"
	@echo "make clean        remove $(VENV) and caches (results under runs/ stay)"

quickstart: $(VENV)/.stamp-install
	$(BIN)/fomoe prepare --source data/sample --output $(DATA)
	$(BIN)/fomoe fit -c configs/quickstart.yaml --overwrite
	$(BIN)/fomoe validate -c configs/quickstart.yaml --ckpt_path $(RUN)/checkpoints/last.ckpt
	$(BIN)/fomoe compare $(RUN)
	@echo
	@echo "Curves:  $(BIN)/tensorboard --logdir runs    then open http://localhost:6006"

compare: $(VENV)/.stamp-install
	$(BIN)/fomoe prepare --source data/sample --output $(DATA)
	for file in configs/strategy/*.yaml; do \
	  $(BIN)/fomoe fit -c configs/quickstart.yaml -c $$file --overwrite \
	    --trainer.logger.init_args.name compare/$$(basename $$file .yaml) || exit 1; \
	done
	$(BIN)/fomoe compare --markdown runs/compare/*

test: $(VENV)/.stamp-test
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow"

test-fast: $(VENV)/.stamp-test
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow and not processes"

test-slow: $(VENV)/.stamp-test $(VENV)/.stamp-docs
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m slow

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.stamp-docs
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs
	@echo "Site: build/docs/index.html"

release-check: $(VENV)/.stamp-venv
	$(BIN)/python tools/release/check.py

install: $(VENV)/.stamp-install

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing)." \
	       "Name another: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments." \
	       "On Debian and Ubuntu: sudo apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --upgrade pip
	@touch $@

$(VENV)/.stamp-torch: $(VENV)/.stamp-venv tools/install_torch.sh
	tools/install_torch.sh $(BIN)/pip
	@touch $@

$(VENV)/.stamp-install: $(VENV)/.stamp-torch pyproject.toml
	$(BIN)/pip install --quiet $(PIP_ARGS) --editable ".[plots]"
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-install
	$(BIN)/pip install --quiet $(PIP_ARGS) --editable ".[test,data,plots]"
# torch's CPU builds come without triton; its interpreter runs our kernels on a CPU.
	$(BIN)/python -c 'import triton' 2>/dev/null || [ "$$(uname -s)" != Linux ] || \
	  $(BIN)/pip install --quiet $(PIP_ARGS) --no-deps "triton>=3.9"
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-install
	$(BIN)/pip install --quiet $(PIP_ARGS) --editable ".[dev]"
	@touch $@

$(VENV)/.stamp-docs: $(VENV)/.stamp-install
	$(BIN)/pip install --quiet $(PIP_ARGS) --editable ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
