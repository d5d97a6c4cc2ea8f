# What is checked before anything runs: the names on the command line, then the flags of every stage.

.PHONY: $(goals) FORCE

# Make removes a file that its command was writing when it is interrupted. A manifest appears whole, and stays.
.PRECIOUS: $(call done,data tokenizer sft rm $(more_rms) split eval $(folders))

# --- names -----------------------------------------------------------------------------------------
# Make itself accepts any variable, and it would notice a wrong name in POLICIES only after training.

stage_flags := $(addsuffix _FLAGS,DATA TOKENIZER SFT RM SPLIT DPO PPO EVAL $(folders) $(more_rms))
run_takes   := TASK RUN DATA TEST_DATA MODEL SEED LOSS POLICIES RMS FROM LORA BF16 NPROC SHARD DEVICE LOG REDO QUICK $(stage_flags)
any_takes   := KERNELS PY PYTHON PIP CXX GOMP_SPINCOUNT GLIBC_TUNABLES SHELL

# A goal takes the variables in GOAL_takes if there is such a line, and those of a run otherwise. A make that was started
# by another make or by an experiment also sees the variables of the one that started it.
started := $(or $(MAKECMDGOALS),help)
ifeq ($(MAKELEVEL),0)
takes := $(any_takes) $(foreach goal,$(started),$(or $($(goal)_takes),$(run_takes)))
else
takes := $(any_takes) $(run_takes) $(foreach goal,$(goals),$($(goal)_takes)) python launch
endif

given        := $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name)))
wrong_name   := $(firstword $(filter-out $(takes) rm-%_FLAGS,$(given)))
known_goals  := $(goals) $(addprefix policy-,data tokenizer sft rm $(more_rms) split eval $(folders))
wrong_goals  := $(filter-out $(known_goals) check-%,$(started))
wrong_goal   := $(firstword $(foreach goal,$(wrong_goals),$(if $(findstring /,$(goal)),,$(goal))))
finished     := $(notdir $(patsubst %/manifest.json,%,$(wildcard $(addsuffix /*/manifest.json,$(RUN) $(FROM)))))
wrong_policy := $(firstword $(filter-out sft $(folders) $(finished),$(POLICIES)))

# $(call refuse,message,name,known names): stop, and suggest the nearest of the known names
refuse  = $(error $(1); $(shell $(PYTHON) -c '$(suggest)' '$(2)' $(3))'make help' lists all)
suggest = import sys; from difflib import SequenceMatcher as Match; name, *known = sys.argv[1:]; \
          ratio = lambda a, b: Match(None, a, b).ratio(); \
          best = max(known, key=lambda k: (ratio(k.lower(), name.lower()), ratio(k, name))); \
          print(f"did you mean {best}? " if ratio(best.lower(), name.lower()) > 0.6 else "")

ifdef wrong_name
$(call refuse,$(wrong_name)=$($(wrong_name)): unknown variable of 'make $(started)',$(wrong_name),$(takes))
endif
ifdef wrong_goal
$(call refuse,$(wrong_goal): unknown goal,$(wrong_goal),$(known_goals))
endif
ifdef wrong_policy
$(call refuse,POLICIES=$(POLICIES): unknown policy $(wrong_policy),$(wrong_policy),sft $(folders))
endif
ifneq ($(filter-out rm rm-%,$(RMS)),)
$(error RMS=$(RMS): must be names such as rm, rm-2, rm-3)
endif

# --- flags -----------------------------------------------------------------------------------------

# A dry run prints the command of every stage that a folder needs. (Make runs a line with the word $(MAKE) even under
# `make -n`, so the word is in a variable.)
commands = $(MAKE) --dry-run --always-make --no-print-directory python=stage: launch= $(RUN)/$(1)/manifest.json

# make check-mpo: check the flags of everything that mpo needs, also against the flags of finished stages. The commands
# that passed are kept in .made-from/.checked. They are not checked again until mpo/config.py or a file in .made-from/
# changes, as it does when a stage begins.
check-%: .venv/.ready $(call reader,$(MODEL))
	@checked=$(RUN)/.made-from/.checked; \
	for file in mpo/config.py $(RUN)/.made-from/*; do [ $$checked -nt $$file ] || checked=/dev/null; done; \
	all=$$($(call commands,$*) 2>&1) || { printf '%s\n' "$$all" | tail -n 1 >&2; exit 2; }; \
	new=$$(printf '%s\n' "$$all" | sed -n 's/^stage: //p' | grep -vxFf $$checked) || exit 0; \
	printf '%s\n' "$$new" | $(PY) -m mpo.tools.check || exit 2; \
	mkdir -p $(RUN)/.made-from; { cat $$checked; printf '%s\n' "$$new"; } > $(RUN)/.made-from/.new; \
	mv $(RUN)/.made-from/.new $(RUN)/.made-from/.checked
