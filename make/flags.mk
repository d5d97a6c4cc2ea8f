# How the variables of the Makefile become the flags of a stage.

# $(call quote,text): one word of the shell, whatever the text contains
quote = '$(subst ','\'',$(1))'

# The same, left as it is where it needs no quotes
as_word = $(if $(shell printf %s $(call quote,$(1)) | LC_ALL=C tr -d 'A-Za-z0-9_./-'),$(call quote,$(1)),$(1))

# $(call check,names,pattern,what they must be): stop where the user has given one of these variables a value that does
# not match the pattern, a regular expression.
given_by_user = $(foreach name,$(1),$(if $(filter command environment,$(firstword $(origin $(name)))),$(name)))
not_matching  = $(shell printf '%s\n' $(foreach name,$(1),$(call quote,$(name)=$(value $(name)))) | LC_ALL=C grep -vE $(2))
check         = $(if $(call given_by_user,$(1)),$(call stop,$(call not_matching,$(call given_by_user,$(1)),$(2)),$(3)))
stop          = $(if $(1),$(error $(1): must be $(2)))

# RUN and FROM become part of make's file names, and STAGE part of a path in a shell command. DATA, TEST_DATA and MODEL
# are quoted, but make expands a dollar sign and joins several spaces.
comma      := ,
hash       := \#
plain_name := a name without spaces and other signs that mean something to make or the shell
syntax     := [:space:]:;&|<>()$$*?"`$(hash)%=~!{}\['"'"'
$(call check,RUN STAGE,'^[A-Z]+=[^]$(syntax)-][^]$(syntax)]*$$',$(plain_name))
$(call check,FROM,'^[A-Z]+=[^]$(syntax)]*$$',$(plain_name))
$(call check,DATA TEST_DATA MODEL RM OUT,'^[A-Z_]+=[^[:space:]$$]+( [^[:space:]$$]+)*$$|^TEST_DATA=$$',a name without a dollar sign or two spaces in a row)
$(call check,SEED,'^[A-Z]+=[0-9]+$$',a number)
$(call check,NPROC,'^[A-Z]+=[1-9][0-9]*$$',a number of processes)
$(call check,LORA,'^[A-Z]+=[0-9]*$$',a number)
$(call check,DEVICE KERNELS,'^[A-Z]+=[a-z0-9:]*$$',a word)
$(call check,LOG,'^LOG=(tensorboard|trackio|wandb)?$$',tensorboard$(comma) trackio or wandb)
$(call check,LOSS,'^[A-Z]+=[A-Za-z0-9_:=.+*$(comma)-]+$$',a loss such as sigmoid+0.1*sft)
$(call check,POLICIES RMS,'^[A-Z]+=[A-Za-z0-9 _.-]*$$',names with spaces between them)
$(call check,$(filter %_FLAGS,$(.VARIABLES)),'^[A-Za-z0-9_-]+=[^;&|<>`$$]*$$',flags without signs that mean something to the shell)

# A switch is on with 1 and off without a value.
switches := QUICK BF16 SHARD REDUCED REDO REHEARSE
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

# Threads that wait for each other keep their cores busy for a while, and then leave them to other programs.
export GOMP_SPINCOUNT ?= 100000

# Older versions of glibc lose memory between tensors with a cache that this switches off (mpo/runtime/allocator.py).
export GLIBC_TUNABLES ?= glibc.malloc.tcache_count=0

space := $(subst x,,x x)

# MODEL=ORG/NAME or DATA=ORG/NAME (with @REVISION, if one is wanted), where there is no such folder: downloaded from the hub into
# models/ORG/NAME or data/ORG/NAME (make/runs.mk). From here on, the variable is that folder.
on_hub = $(if $(wildcard $(subst $(space),\ ,$(1))),,$(shell printf '%s\n' $(call quote,$(1)) | \
         LC_ALL=C grep -vE '^(data|models|runs)/|\.(jsonl|json|csv|parquet|gz)$$' | LC_ALL=C grep -xE '[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+(@[A-Za-z0-9_.-]+)?'))
model_on_hub := $(call on_hub,$(MODEL))
data_on_hub  := $(call on_hub,$(DATA))
ifneq ($(model_on_hub),)
override MODEL := models/$(model_on_hub)
endif
ifneq ($(data_on_hub),)
override DATA := data/$(data_on_hub)
endif
from_hub := $(model_on_hub:%=models/%/hub.json) $(data_on_hub:%=data/%/hub.json)

# $(call preset,STAGE): the flags that make/tasks.mk has for this stage
from_scratch := $(filter tiny mini small base 1b 7b,$(subst $(space),/,$(MODEL)))
size_of      := $(if $(from_scratch),,$(shell $(or $(PYTHON),python3) make/size.py $(call quote,$(MODEL)) 2>/dev/null))
toy          := $(filter toy,$(size_of))
size         := $(filter small medium large,$(size_of))
parameters   := $(wordlist 2,3,$(size_of))
files        := $(if $(subst builtin,,$(DATA)),files)
trained      := $(if $(size),pretrained $(if $(LORA),lora,full)_$(size))
presets := $(if $(from_scratch),scratch) $(trained) \
           $(TASK)$(files:%=_%) $(toy:%=%_$(files)) $(if $(QUICK),quick $(if $(size),quick_pretrained))
lines    = $(strip $(foreach name,$(1),$($(name)_$(2))))
preset   = $(call lines,$(presets),$(1))

# SFT of a preset trains all weights even with LORA: an untrained model has nothing that adapters could adapt.
precision := $(if $(BF16),--precision bf16-mixed)
lora      := $(if $(LORA),--lora_rank $(LORA))
sft_lora  := $(if $(from_scratch),,$(lora))

test_data = $(if $(TEST_DATA),$(call as_word,$(TEST_DATA)))

# $(call by_comma,a b c): a,b,c
by_comma = $(subst $(space),$(comma),$(strip $(1)))

policies := $(call by_comma,$(foreach policy,$(POLICIES),$(policy)=$(RUN)/$(policy)))
ensemble := $(if $(filter-out rm,$(RMS)),--rm $(call by_comma,$(RMS:%=$(RUN)/%)))
more_rms := $(filter rm-%,$(RMS))
$(foreach rm,$(more_rms),$(eval $(rm)_args = $$(rm_args) $$($(rm)_FLAGS)))

# $(call stage,script,flags): the command of a stage. With $(call model_stage,...) the stage may run in several
# processes, and with $(call training_stage,...) its metrics may also go to a tracker. NPROC, SHARD, DEVICE and LOG change
# the result by no more than rounding, so they are not kept in .made-from/ and a finished stage is not run again for them.
python         = $(if $(KERNELS),MPO_KERNELS=$(KERNELS)) $(PY)
stage          = $(strip $(python) $(1) --out $(@D) $(if $(REDO),--overwrite true) --seed $(SEED) $(2))
model_stage    = $(call stage,$(launch) $(1),$(place) $(2))
training_stage = $(call model_stage,$(1),$(if $(LOG),--log $(LOG)) $(2))
launch         = $(if $(filter-out 1,$(NPROC)),-m mpo.runtime.launch $(NPROC))
place          = $(if $(SHARD),--shard true) $(if $(DEVICE),--device $(DEVICE))

# $(call reader,folder): the package that reads the folder's tokenizer.json, where there is no tokenizer.model, or only one
# of tiktoken, which does not begin with a line feed as sentencepiece's do.
reader = $(shell cd -- $(call quote,$(1)) 2>/dev/null && [ -f tokenizer.json ] && \
         { [ ! -f tokenizer.model ] || [ -n "$$(head -c 1 tokenizer.model)" ]; } && echo .venv/.tokenizers)

# What a stage is made from: its flags, the manifests of the stages before it, and the sizes and times of DATA, TEST_DATA
# or MODEL. This file changes only when one of them does. Then the stage's script runs. It compares its flags and the
# hashes of its inputs with those in its manifest, and does nothing if they are equal.
files_of_data      = $(call quote,$(DATA)) $(test_data)
files_of_tokenizer = $(call quote,$(MODEL))
files_of_sft       = $(call quote,$(MODEL))
$(RUN)/.made-from/%: FORCE | .venv/bin/python
	@mkdir -p $(@D)
	@{ printf '%s\n' $(call quote,--seed $(SEED) $(strip $($*_args))); \
	   $(foreach manifest,$(filter %/manifest.json,$^),cksum < $(manifest);) \
	   $(if $(files_of_$*),$(PY) make/stamps.py $(files_of_$*);) } > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

# A line of the table in the Makefile adds the rule of its folder. The spaces that align its columns are removed.
dpo = $(call line,dpo_rule,$(strip $(1)),$(strip $(2)),$(strip $(3)))
ppo = $(call line,ppo_rule,$(strip $(1)),$(strip $(2)),$(strip $(3)),$(strip $(4)))
line = $(eval folders += $(2))$(eval $(call $(1),$(2),$(3),$(4),$(5)))
