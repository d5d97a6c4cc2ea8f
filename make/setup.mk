# The virtual environment .venv, step by step. A goal sets up what it needs; `make setup` sets up everything at once.

goals += setup

PYTHON ?= python3
PIP    ?= .venv/bin/pip --disable-pip-version-check
PY     := .venv/bin/python

setup: .venv/.dev

# PY=python3 names an interpreter that has all packages, as images for GPUs do. Nothing is installed then.
ifneq ($(PY),.venv/bin/python)
.venv/bin/python .venv/.runtime .venv/.figures .venv/.site .venv/.hub .venv/.dev .venv/.parity .venv/.gpu:
	@:
.venv/.ready:
	@$(PY) kernels/build.py
figures_if_possible := :
else

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 setup"; exit 2; }
	$(PYTHON) -m venv .venv

# Everything that is installed has a version and a hash in requirements/lock.txt.
locked = $(PY) requirements/pick.py $(1) > .venv/$(1).txt && $(PIP) install --quiet --require-hashes -r .venv/$(1).txt

.venv/.runtime: pyproject.toml $(wildcard requirements/*.*) | .venv/bin/python
	@echo 'Installing torch and what else is needed into .venv (with the CUDA build of torch about 5 GB).'
	$(call locked,runtime)
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# The compiled kernels. Without a compiler everything works, more slowly.
.venv/.ready: .venv/.runtime $(wildcard kernels/cpp/*) kernels/build.py
	@echo 'Compiling the kernels.'
	@$(PY) kernels/build.py
	@touch $@

.venv/.figures: .venv/.ready
	$(call locked,figures)
	@touch $@

# $(call optional,PACKAGE,PURPOSE,what it does): install a package, unless it is there already. Offline, the last line says what
# to run where there is a network.
optional = $(PY) -c 'import $(1)' 2>/dev/null || { \
	    echo 'Installing the $(1) package into .venv, which $(3).'; \
	    $(call locked,$(2)) >.venv/$(2).log 2>&1 || { \
	    echo "$(1): could not be installed (see .venv/$(2).log); once there is a network, run: make .venv/.$(2)" >&2; exit 2; }; }

# What downloads models and data sets (MODEL=ORG/NAME)
.venv/.hub: .venv/.runtime
	@$(call optional,huggingface_hub,hub,downloads from the hub)
	@touch $@

# The same for `make report`, which does without figures where matplotlib is not there and cannot be installed
figures_if_possible = $(PY) -c 'import matplotlib' 2>/dev/null || { echo 'Installing matplotlib into .venv, for figures.'; \
                      { $(call locked,figures); } >.venv/figures.log 2>&1 || true; }

# What reads tokenizer.json, for a model without a tokenizer.model (make/flags.mk).
.venv/.tokenizers: .venv/.ready
	@$(call optional,tokenizers,tokenizers,reads tokenizer.json)
	@touch $@

# What builds the site of the documentation
.venv/.site: .venv/.runtime
	$(call locked,site)
	@touch $@

.venv/.dev: .venv/.ready
	$(call locked,dev)
	@touch $@

.venv/.parity: .venv/.dev
	$(call locked,parity)
	@touch $@

.venv/.gpu: .venv/.dev
	$(call locked,gpu)
	@touch $@

endif
