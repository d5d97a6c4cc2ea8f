# The method as a graph: one target per stage, an edge per artefact.
#
#   make hh | make tldr     the whole pipeline on one of the paper's two tasks
#   make chat STAGE=mpo     type to any stage's model
#   make report             print the report of a run again
#   make verify             hash every file of a run again; which stages are damaged, stale, unfinished
#   make data/hh-rlhf       download the official HH-RLHF files
#   make ablate             compare losses, estimators, splits ... over seeds (GRID, VARY, VALUES, SEEDS)
#   make claims             the paper's claims put to the test: hours (docs/protocol.md); REDUCED=1: minutes
#   make bench                                 this project and its peers, timed side by side
#   make test | make parity | make sanitize | make triton | make lint | make setup | make clean
#   make fuzz | make soak   thousands of malformed inputs, hundreds of kills (CASES, KILLS)
#
# Variables:
#   DATA    builtin, a folder in the task's official layout, or a row file (.jsonl, .jsonl.gz)
#   RUN     the run folder                        MODEL  a preset or a folder in Hugging Face layout
#   SEED    of every random choice                LOSS   the preference loss: ipo, sigmoid+0.1*sft, ...
#   RMS     "rm rm-2 rm-3": an ensemble of reward models of other seeds, which the split uses
#   FROM    a finished run whose stages this one shares until a flag differs
#   KERNELS reference: plain torch everywhere; else the fastest implementation here (kernels/)
#   POLICIES  what to train and compare, by folder (schedules.mk); the first one is the baseline
#   BF16=1  matrix products in bf16, with fp32 weights and sums: faster where the processor has them
#   NPROC   processes for every stage that computes with a model; SHARD=1: none keeps all of it (FSDP2)
#   DEVICE  cpu, cuda, cuda:1, mps; without it a GPU where there is one
#   LORA=8 rank of low-rank adapters, which alone learn (from SFT on where MODEL is a folder, else from the reward model on)
#   QUICK=1 a smoke test: seconds a stage, and numbers that mean nothing
# More flags for one stage: SFT_FLAGS="--epochs 1", RM_FLAGS, SPLIT_FLAGS, DPO_FLAGS, PPO_FLAGS, ...,
# or for one folder: dpo-all_FLAGS="--beta 0.1"

TASK  ?= hh
RUN   ?= runs/$(TASK)
DATA  ?= $(if $(and $(filter hh,$(TASK)),$(wildcard data/hh-rlhf/*/train.jsonl.gz)),data/hh-rlhf,builtin)
MODEL ?= tiny
SEED  ?= 1
LOSS  ?= sigmoid
FROM  ?=
POLICIES ?= sft dpo mpo
RMS   ?= rm
STAGE ?= mpo
NPROC ?= 1
SHARD ?=
DEVICE ?=
LORA  ?=
QUICK ?=
BF16  ?=

$(if $(or $(findstring =,$(RUN)),$(filter-out 1,$(words $(RUN)))),$(error RUN=$(RUN): must be one word without an equals sign))

ifdef KERNELS
export MPO_KERNELS := $(KERNELS)
endif

# Threads that wait for each other spin a while, and then give up the core to whoever else wants it.
export GOMP_SPINCOUNT ?= 100000

PYTHON ?= python3
PIP    ?= .venv/bin/pip --disable-pip-version-check
PY     := .venv/bin/python
DONE   := manifest.json

.PHONY: hh tldr pipeline chat report verify ablate claims bench setup test parity sanitize triton fuzz soak oldest lock lint clean FORCE
.DELETE_ON_ERROR:

hh tldr:
	@$(MAKE) --no-print-directory TASK=$@ pipeline

pipeline: .venv/.ready
	@$(if $(FROM),$(share))
	@echo "$(TASK): data = $(if $(filter builtin,$(DATA)),the built-in world,$(DATA)), model = $(MODEL), run folder = $(RUN)$(if $(QUICK), (QUICK: the numbers mean nothing))"
	@$(MAKE) --no-print-directory TASK=$(TASK) $(RUN)/eval/$(DONE)
	@$(PY) -m mpo.reporting $(RUN)

# --- flags of each stage ----------------------------------------------------------------------

empty :=
comma := ,
builtin := $(filter builtin,$(DATA))
lora    := $(if $(LORA),--lora_rank $(LORA))
limits  := $(if $(builtin),,$(if $(filter tldr,$(TASK)),--max_prompt 640)) $(if $(BF16),--bf16 true)
rows    := $(if $(builtin),--train $(if $(filter hh,$(TASK)),28000,24000) --test 1600,--train 0 --test 0)

data_args      = --task $(TASK) --data $(DATA) $(rows)           $(if $(QUICK),--train 400 --test 40) $(DATA_FLAGS)
tokenizer_args = --model $(MODEL) --vocab $(if $(builtin),1536,4096) $(TOKENIZER_FLAGS)
sft_args       = --model $(MODEL) $(if $(builtin),$(if $(filter tldr,$(TASK)),--epochs 2)) $(limits) $(if $(wildcard $(MODEL)/config.json),$(lora)) $(if $(QUICK),--epochs 1) $(SFT_FLAGS)
rm_args        = $(if $(builtin),$(if $(filter tldr,$(TASK)),--epochs 3)) $(limits) $(lora) $(if $(QUICK),--epochs 1) $(RM_FLAGS)
ensemble       = $(subst $(empty) $(empty),$(comma),$(RMS:%=$(RUN)/%))
split_args     = $(if $(filter-out rm,$(RMS)),--rm $(ensemble)) $(limits) $(SPLIT_FLAGS)
any_dpo_args   = --loss $(LOSS) $(limits) $(lora)                $(DPO_FLAGS)
any_ppo_args   = $(limits) $(lora) $(if $(QUICK),--iterations 2 --batch 16 --minibatch 8 --microbatch 8 --max_new 24) $(PPO_FLAGS)
eval_args      = --policies $(subst $(empty) $(empty),$(comma),$(foreach p,$(POLICIES),$(p)=$(RUN)/$(p))) $(limits)                                       $(if $(QUICK),--prompts 16 --max_new 24) $(EVAL_FLAGS)

# A stage's flags are an input like any other: the file changes only when they do.
$(RUN)/.flags/%: FORCE
	@mkdir -p $(@D)
	@echo '--seed $(SEED) $(strip $($*_args))' | cmp -s - $@ || echo '--seed $(SEED) $(strip $($*_args))' > $@

# FROM: link the finished stages of another run, flags and all; one that is redone gets its own folder.
share = mkdir -p $(RUN)/.flags; for done in $(FROM)/*/$(DONE); do \
	    stage=$$(basename $$(dirname $$done)); [ -e $(RUN)/$$stage ] || [ $$stage = eval ] || { \
	    ln -s $$(realpath $(FROM)/$$stage) $(RUN)/$$stage; cp -p $(FROM)/.flags/$$stage $(RUN)/.flags/; }; done

# NPROC, SHARD and DEVICE are no flags of a stage: the result does not depend on them, but for rounding.
stage = $(PY) $(1) --out $(@D) --overwrite true --seed $(SEED)
many  = $(call stage,$(if $(filter-out 1,$(NPROC)),-m mpo.launch $(NPROC)) $(1)) $(if $(SHARD),--shard true) $(if $(DEVICE),--device $(DEVICE))

# --- the stages -------------------------------------------------------------------------------

sources    := $(if $(builtin),,$(wildcard $(DATA) $(DATA)/*/*.jsonl $(DATA)/*/*.gz $(DATA)/comparisons/*.json))
checkpoint := $(wildcard $(MODEL)/config.json $(MODEL)/*.safetensors $(MODEL)/tokenizer.model $(MODEL)/tokenizer.json)

$(RUN)/data/$(DONE): $(RUN)/.flags/data $(sources) | .venv/.ready
	@$(call stage,prepare_data.py) $(data_args)

$(RUN)/tokenizer/$(DONE): $(RUN)/.flags/tokenizer $(RUN)/data/$(DONE) $(checkpoint)
	@$(call stage,train_tokenizer.py) --data $(RUN)/data $(tokenizer_args)

$(RUN)/sft/$(DONE): $(RUN)/.flags/sft $(RUN)/data/$(DONE) $(RUN)/tokenizer/$(DONE) $(checkpoint)
	@$(call many,train_sft.py) --data $(RUN)/data --tokenizer $(RUN)/tokenizer $(sft_args)

$(RUN)/rm/$(DONE): $(RUN)/.flags/rm $(RUN)/data/$(DONE) $(RUN)/sft/$(DONE)
	@$(call many,train_rm.py) --data $(RUN)/data --model $(RUN)/sft $(rm_args)

# rm-2, rm-3, ...: the same with another seed
define reward_model
$(1)_args = $$(rm_args)
$$(RUN)/$(1)/$$(DONE): $$(RUN)/.flags/$(1) $$(RUN)/data/$$(DONE) $$(RUN)/sft/$$(DONE)
	@$$(call many,train_rm.py) --data $$(RUN)/data --model $$(RUN)/sft --seed $$(SEED)0$(1:rm-%=%) $$($(1)_args)
endef
$(foreach r,$(filter rm-%,$(RMS)),$(eval $(call reward_model,$(r))))

$(RUN)/split/$(DONE): $(RUN)/.flags/split $(RUN)/data/$(DONE) $(RMS:%=$(RUN)/%/$(DONE))
	@$(call many,split_data.py) --data $(RUN)/data --rm $(RUN)/rm $(split_args)

include schedules.mk

$(RUN)/eval/$(DONE): $(RUN)/.flags/eval $(foreach s,data rm split $(POLICIES),$(RUN)/$(s)/$(DONE))
	@$(call many,eval.py) --data $(RUN)/data --rm $(RUN)/rm --split $(RUN)/split $(eval_args)

# One policy without an evaluation: make policy-reversed
policy-%: .venv/.ready
	@$(if $(FROM),$(share))
	@$(MAKE) --no-print-directory $(RUN)/$*/$(DONE)

# --- around the pipeline ------------------------------------------------------------------------

chat: .venv/.ready
	@$(PY) chat.py --model $(RUN)/$(STAGE) --task $(TASK)

report: .venv/.runtime
	@$(PY) -m mpo.reporting $(RUN)

verify: .venv/.runtime
	@$(PY) -m mpo.verify $(RUN)

data/hh-rlhf: .venv/.runtime FORCE
	@$(PY) -m mpo.data.download $@

# --- experiments -------------------------------------------------------------------------------

ablate_args = --task $(TASK) $(foreach v,GRID VARY VALUES POLICY SEEDS,$(if $($(v)),--$(call lower,$(v)) '$($(v))')) $(ABLATE_FLAGS)
lower = $(shell echo $(1) | tr A-Z a-z)

ablate: .venv/.figures
	@$(PY) -m experiments.ablate $(ablate_args)

claims: .venv/.figures
	@$(PY) -m experiments.claims $(if $(REDUCED),--reduced true) $(CLAIMS_FLAGS)

# Peers, each in an environment of its own
.peers/now/.done:
	$(PYTHON) -m venv .peers/now
	.peers/now/bin/pip --disable-pip-version-check install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0 \
	    cut-cross-entropy==25.1.1
	@touch $@

.peers/ppo/.done:
	$(PYTHON) -m venv .peers/ppo
	.peers/ppo/bin/pip --disable-pip-version-check install --quiet torch==2.13.0 trl==0.23.1 transformers==4.57.1
	@touch $@

bench: .venv/.figures .peers/now/.done .peers/ppo/.done
	@$(PY) -m benchmarks.run $(BENCH_FLAGS)
	@$(PY) -m benchmarks.scaling --again true

# --- development ------------------------------------------------------------------------------

setup: .venv/.dev

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv

# Whatever is installed has a version and a hash.
locked = $(PY) requirements/pick.py $(1) > .venv/$(1).txt && $(PIP) install --quiet --require-hashes -r .venv/$(1).txt

.venv/.runtime: pyproject.toml $(wildcard requirements/*) | .venv/bin/python
	$(call locked,runtime)
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# The compiled kernels: everything works without, more slowly.
.venv/.ready: .venv/.runtime $(wildcard kernels/cpp/*) kernels/build.py
	@$(PY) kernels/build.py
	@touch $@

.venv/.figures: .venv/.ready
	$(call locked,figures)
	@touch $@

.venv/.dev: .venv/.ready
	$(call locked,dev)
	@touch $@

.venv/.parity: .venv/.dev
	$(call locked,parity)
	@touch $@

# One file at a time on every core.
test: .venv/.dev
	$(PY) -m pytest -n auto --dist loadfile

parity: .venv/.parity
	$(PY) -m pytest tests/test_trl.py tests/test_lora.py -k 'trl or peft'

# After a change of versions in requirements/direct.txt. The CPU build's hash is kept: it comes from elsewhere.
lock: .venv/bin/python
	$(PIP) install --quiet uv
	grep '^# cpu build' requirements/lock.txt > .venv/cpu
	.venv/bin/uv pip compile pyproject.toml --all-extras -c requirements/direct.txt --universal --generate-hashes \
	    --python-version 3.11 --quiet --custom-compile-command "make lock" -o requirements/lock.txt
	cat .venv/cpu >> requirements/lock.txt

.venv/.gpu: .venv/.dev
	$(call locked,gpu)
	@touch $@

# The tests with the oldest versions that pyproject.toml allows: for torch, gigabytes of GPU libraries.
.oldest/.done: pyproject.toml requirements/direct.txt
	$(PYTHON) -m venv .oldest
	.oldest/bin/python requirements/pick.py oldest > .oldest/oldest.txt
	.oldest/bin/pip --disable-pip-version-check install --quiet -r .oldest/oldest.txt
	@touch $@

oldest: .oldest/.done
	.oldest/bin/python kernels/build.py
	.oldest/bin/python -m pytest -n auto --dist loadfile

# The GPU kernels' tests in Triton's interpreter, which needs no GPU.
triton: .venv/.gpu
	TRITON_INTERPRET=1 $(PY) -m pytest tests/test_kernels.py tests/test_head_kernels.py tests/test_layer_kernels.py -k gpu

# The compiled kernels' tests with every access to memory checked.
sanitize: export MPO_KERNELS_FLAGS := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize: .venv/.dev
	@$(PY) kernels/build.py
	ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$($(or $(CXX),g++) -print-file-name=libasan.so) $$($(or $(CXX),g++) -print-file-name=libstdc++.so.6)" \
	    $(PY) -m pytest --capture=sys tests/test_kernels.py tests/test_head_kernels.py tests/test_layer_kernels.py

# The long versions of the tests: every stage killed again and again, thousands of malformed inputs.
KILLS ?= 40
CASES ?= 12000

fuzz: .venv/.dev
	$(PY) -m tests.fuzz $(CASES) $(SEED)

soak: .venv/.dev
	$(PY) -m tests.soak $(KILLS) $(CASES) docs/robustness.md

lint: .venv/.dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy mpo kernels experiments benchmarks requirements *.py

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build ./*.egg-info
	@echo "kept: runs/, data/ and .venv/ (remove them by hand)"
