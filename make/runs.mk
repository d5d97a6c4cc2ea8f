# What one does with a run: make it, talk to its models, look at its report, check its files.

goals += hh tldr pipeline chat report verify data/hh-rlhf

# `make hh TASK=tldr` asks for both tasks at once.
asked := $(filter hh tldr,$(MAKECMDGOALS))
ifneq ($(and $(findstring command line,$(origin TASK)),$(asked),$(filter-out $(asked),$(TASK))),)
$(error TASK=$(TASK): `make $(asked)` sets the task; run `make $(TASK)`)
endif

hh tldr:
	@$(MAKE) --no-print-directory TASK=$@ pipeline

what_runs = $(TASK): data = $(DATA), model = $(MODEL), run folder = $(RUN)$(if $(QUICK), (QUICK: the numbers mean nothing))
what_flags = flags for $(if $(LORA),adapters on )a pretrained model of $(parameters) parameters (make/tasks.mk): \
             $(foreach stage,sft rm dpo ppo eval,$(stage) $(call lines,$(trained),$(stage));)
pipeline: check-eval
	@$(if $(FROM),$(share))
	@printf '%s\n' $(call quote,$(what_runs)) $(if $(size),$(call quote,$(what_flags)))
	@$(MAKE) --no-print-directory $(RUN)/eval/manifest.json
	@$(PY) -m mpo.tools.page $(RUN)

# One policy and what it needs, without an evaluation: make policy-reversed
policy-%: check-%
	@$(if $(FROM),$(share))
	@$(MAKE) --no-print-directory $(RUN)/$*/manifest.json

# FROM: link the finished stages of another run and copy their flags. A stage that is run again gets its own folder.
share = mkdir -p $(RUN)/.made-from; for manifest in $(FROM)/*/manifest.json; do \
	    stage=$$(basename $$(dirname $$manifest)); [ -e $(RUN)/$$stage ] || [ $$stage = eval ] || { \
	    ln -s "$$(realpath $(FROM)/$$stage)" $(RUN)/$$stage; cp -p $(FROM)/.made-from/$$stage $(RUN)/.made-from/; }; done

chat_takes := TASK RUN STAGE
STAGE      ?= mpo
chat: .venv/.ready $(call reader,$(RUN)/$(STAGE))
	@$(PY) chat.py --model $(RUN)/$(STAGE) $(addprefix --data ,$(patsubst %/manifest.json,%,$(wildcard $(RUN)/data/manifest.json)))

report: .venv/.runtime
	@$(figures_if_possible)
	@$(PY) -m mpo.tools.page $(RUN)

verify: .venv/.runtime
	@$(PY) -m mpo.tools.verify $(RUN)

data/hh-rlhf_takes := MPO_HH_URL
data/hh-rlhf: .venv/.runtime FORCE
	@$(PY) -m mpo.tools.download $@
