# How the variables of the Makefile become the flags of a stage.

# RUN is part of make's file names, which are separated by spaces.
ifneq ($(words $(subst =, = ,$(RUN))),1)
$(error RUN=$(RUN): must be one word without an equals sign)
endif

# A switch is on with 1 and off without a value.
switches := QUICK BF16 SHARD REDUCED
$(foreach name,$(switches),$(if $(filter-out 1,$($(name))),$(error $(name)=$($(name)): must be 1, or left out)))

# The two goals hh and tldr set the task.
ifneq ($(filter-out hh tldr,$(TASK)),)
$(error TASK=$(TASK): must be hh or tldr)
endif

# FROM names a run that has at least one finished stage.
ifneq ($(FROM),)
ifeq ($(wildcard $(FROM)/*/manifest.json),)
$(error FROM=$(FROM): no finished stage there)
endif
endif

ifdef KERNELS
export MPO_KERNELS := $(KERNELS)
endif

# Threads that wait for each other spin for a while, and then give up the core to whoever else wants it.
export GOMP_SPINCOUNT ?= 100000

# $(call preset,STAGE): the flags that make/tasks.mk has for this stage
presets := $(TASK)$(if $(filter builtin,$(DATA)),,_files) $(if $(QUICK),quick)
preset   = $(foreach name,$(presets),$($(name)_$(1)))

# SFT of a preset trains all weights even with LORA: an untrained model has nothing that adapters could adapt.
precision := $(if $(BF16),--precision bf16-mixed)
lora      := $(if $(LORA),--lora_rank $(LORA))
sft_lora  := $(if $(wildcard $(MODEL)/config.json),$(lora))

# $(call by_comma,a b c): a,b,c
by_comma = $(subst $(space),$(comma),$(strip $(1)))
comma   := ,
space   := $(subst x,,x x)

policies := $(call by_comma,$(foreach policy,$(POLICIES),$(policy)=$(RUN)/$(policy)))
ensemble := $(if $(filter-out rm,$(RMS)),--rm $(call by_comma,$(RMS:%=$(RUN)/%)))
more_rms := $(filter rm-%,$(RMS))
$(foreach rm,$(more_rms),$(eval $(rm)_args = $$(rm_args) $$($(rm)_FLAGS)))

# The files of DATA and MODEL that a stage reads: it is run again when one of them changes.
data_files  := $(wildcard $(filter-out builtin,$(DATA)) $(addprefix $(DATA)/,*/*.jsonl */*.gz comparisons/*.json))
model_files := $(wildcard $(addprefix $(MODEL)/,*.json *.safetensors tokenizer.model merges.txt *.jinja))

# $(call stage,script,flags): the command of a stage. With $(call model_stage,...) the stage may run in several
# processes. NPROC, SHARD and DEVICE change the result by no more than rounding, so they are not kept in .flags/ and a
# finished stage is not run again for them.
python      = $(if $(KERNELS),MPO_KERNELS=$(KERNELS)) $(PY)
stage       = $(strip $(python) $(1) --out $(@D) --overwrite true --seed $(SEED) $(2))
model_stage = $(call stage,$(launch) $(1),$(place) $(2))
launch      = $(if $(filter-out 1,$(NPROC)),-m mpo.runtime.launch $(NPROC))
place       = $(if $(SHARD),--shard true) $(if $(DEVICE),--device $(DEVICE))

# The flags of a stage are one of its inputs: this file changes only when they do.
$(RUN)/.flags/%: FORCE
	@mkdir -p $(@D)
	@echo '--seed $(SEED) $(strip $($*_args))' | cmp -s - $@ || echo '--seed $(SEED) $(strip $($*_args))' > $@

# A line of the table in the Makefile adds the rule of its folder. The spaces that align its columns are removed.
dpo = $(call line,dpo_rule,$(strip $(1)),$(strip $(2)),$(strip $(3)))
ppo = $(call line,ppo_rule,$(strip $(1)),$(strip $(2)),$(strip $(3)),$(strip $(4)))
line = $(eval folders += $(2))$(eval $(call $(1),$(2),$(3),$(4),$(5)))
