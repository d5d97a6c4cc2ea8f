# What one does with a run: make it, talk to its models, look at its report, check its files.

goals += hh tldr pipeline chat report score verify data/hh-rlhf

# `make hh TASK=tldr` asks for both tasks at once.
asked := $(filter hh tldr,$(MAKECMDGOALS))
ifneq ($(and $(findstring command line,$(origin TASK)),$(asked),$(filter-out $(asked),$(TASK))),)
$(error TASK=$(TASK): `make $(asked)` sets the task; run `make $(TASK)`)
endif

hh tldr: | $(from_hub)
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
policy-%: | $(from_hub)
	@$(MAKE) --no-print-directory check-$*
	@$(if $(FROM),$(share))
	@$(MAKE) --no-print-directory $(RUN)/$*/manifest.json

# MODEL=ORG/NAME, DATA=ORG/NAME. What make knows of a model, such as its size, it learns when it is started again after this.
models/%/hub.json: | .venv/.hub
	@$(PY) -m mpo.tools.hub model $*
data/%/hub.json: | .venv/.hub
	@$(PY) -m mpo.tools.hub dataset $*

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

# How often a reward model prefers the chosen response, by category. Without RM it is the run's; without DATA, the pairs
# are the run's test split. The result goes to a folder of its own, named after both.
score_takes := TASK RUN RM DATA OUT SEED BF16 NPROC SHARD DEVICE REDO SCORE_FLAGS
judge  = $(if $(filter default,$(origin RM)),$(RUN)/rm,$(RM))# make itself has a variable of this name
judged = $(if $(filter command,$(firstword $(origin DATA))),$(DATA),$(RUN)/data/test.jsonl)
OUT   ?= runs/scores/$(subst /,-,$(judge))/$(subst /,-,$(judged))
score: .venv/.ready $(call reader,$(judge))
	@$(strip $(python) $(if $(launch),$(launch) mpo/tools/score.py,-m mpo.tools.score) --out $(call as_word,$(OUT)) \
	    $(if $(REDO),--overwrite true) --seed $(SEED) --rm $(call as_word,$(judge)) --data $(call as_word,$(judged)) \
	    $(precision) $(place) $(SCORE_FLAGS))

verify: .venv/.runtime
	@$(PY) -m mpo.tools.verify $(RUN)

data/hh-rlhf_takes := MPO_HH_URL
data/hh-rlhf: .venv/.runtime FORCE
	@$(PY) -m mpo.tools.download $@
