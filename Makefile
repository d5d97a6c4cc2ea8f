# The method as a graph: one rule for each stage, and a table with one line for each policy that can be trained.
# `make help` lists what can be run. The flags that belong to a task are in make/tasks.mk. The other files of make/
# hold what surrounds the graph: how variables become flags, checks, set-up, experiments, development.

# Variables, set as in `make hh SEED=2`:
#   TASK      hh or tldr, the paper's two tasks (make hh and make tldr set it)
#   RUN       the run folder; runs/hh or runs/tldr if not set
#   DATA      builtin, a folder in the task's official layout, or a file of pairs (.jsonl, .json, .csv, .parquet; docs/data.md)
#   TEST_DATA a file of test pairs of your own
#   MODEL     a preset (tiny, mini, small, base, 1b, 7b) or a folder in the Hugging Face layout
#   SEED      the seed of every random choice
#   LOSS      the preference loss of DPO: sigmoid, ipo, sigmoid+0.1*sft, ... (docs/losses.md)
#   POLICIES  what to train and compare, as in "sft dpo ppo mpo"; the first one is the baseline
#   RMS       the reward models that split the pairs: "rm rm-2 rm-3" trains two more with other seeds
#   FROM      a finished run, whose stages this run shares until a flag differs
#   LORA      train only low-rank adapters of this rank (in SFT only if MODEL is a folder)
#   BF16      1: matrix products in bf16 where the processor has them; weights and sums stay in fp32
#   KERNELS   reference: plain torch everywhere, in place of the fastest implementation
#   NPROC     processes of each stage that computes with a model; SHARD=1: split every weight among them (FSDP2)
#   LOG       tensorboard, trackio or wandb: show the metrics there, too, while a stage trains (docs/report.md)
#   DEVICE    cpu, cuda, cuda:1 or mps; if not set, a GPU where there is one
#   REDO      1: discard finished stages and saves that were made with other flags or inputs
#   QUICK     1: a smoke test of a few seconds for each stage; its numbers mean nothing
#   SFT_FLAGS="--epochs 4": more flags of a stage; so do DATA_FLAGS, TOKENIZER_FLAGS, RM_FLAGS, SPLIT_FLAGS, DPO_FLAGS,
#   PPO_FLAGS and EVAL_FLAGS, and for one folder alone its name: dpo-all_FLAGS="--beta 0.1"

TASK     ?= hh
RUN      ?= runs/$(TASK)
DATA     ?= $(if $(and $(filter hh,$(TASK)),$(wildcard data/hh-rlhf/*/train.jsonl.gz)),data/hh-rlhf,builtin)
MODEL    ?= tiny
SEED     ?= 1
LOSS     ?= sigmoid
POLICIES ?= sft dpo mpo
RMS      ?= rm
NPROC    ?= 1

include make/tasks.mk make/flags.mk make/runs.mk make/setup.mk make/experiments.mk make/develop.mk make/help.mk

# --- the stages ------------------------------------------------------------------------------------
# Each has its flags, what it needs, and its command. A stage writes manifest.json last: that file stands for the stage.
# What it needs is gathered in one small file, .made-from/STAGE, which changes when a flag or an input does (make/flags.mk).

done      = $(foreach folder,$(1),$(RUN)/$(folder)/manifest.json)
made_from = $(RUN)/.made-from/$(1)

data_args = --task $(TASK) --data $(call as_word,$(DATA)) $(if $(TEST_DATA),--test_data $(test_data)) $(call preset,data) $(DATA_FLAGS)
$(call done,data): $(call made_from,data) | .venv/.ready
	$(call stage,prepare_data.py,$(data_args))

tokenizer_args = --model $(call as_word,$(MODEL)) $(call preset,tokenizer) $(TOKENIZER_FLAGS)
$(call made_from,tokenizer): $(call done,data)
$(call done,tokenizer): $(call made_from,tokenizer)
	$(call stage,train_tokenizer.py,--data $(RUN)/data $(tokenizer_args))

sft_args = --model $(call as_word,$(MODEL)) $(call preset,sft) $(precision) $(sft_lora) $(SFT_FLAGS)
$(call made_from,sft): $(call done,data tokenizer)
$(call done,sft): $(call made_from,sft)
	$(call training_stage,train_sft.py,--data $(RUN)/data --tokenizer $(RUN)/tokenizer $(sft_args))

rm_args = $(call preset,rm) $(precision) $(lora) $(RM_FLAGS)
$(call made_from,rm): $(call done,data sft)
$(call done,rm): $(call made_from,rm)
	$(call training_stage,train_rm.py,--data $(RUN)/data --model $(RUN)/sft $(rm_args))

# rm-2, rm-3, ...: the same with another seed
$(more_rms:%=$(call made_from,%)): $(call done,data sft)
$(call done,$(more_rms)): $(RUN)/%/manifest.json: $(call made_from,%)
	$(call training_stage,train_rm.py,--data $(RUN)/data --model $(RUN)/sft --seed $(SEED)0$(*:rm-%=%) $($*_args))

split_args = $(ensemble) $(call preset,split) $(precision) $(SPLIT_FLAGS)
$(call made_from,split): $(call done,data $(RMS))
$(call done,split): $(call made_from,split)
	$(call model_stage,split_data.py,--data $(RUN)/data --rm $(RUN)/rm $(split_args))

# A line of the table below adds one of the next two rules. Here $(1) is the folder, $(2) the model, which is the reference
# too, and $(3) the pairs.
define dpo_rule
$(1)_args = --loss $$(LOSS) $$(call preset,dpo) $$(precision) $$(lora) $$(DPO_FLAGS) $$($(1)_FLAGS)
$(call made_from,$(1)): $(call done,$(firstword $(subst /, ,$(3))) $(2))
$(call done,$(1)): $(call made_from,$(1))
	$$(call training_stage,train_dpo.py,--data $(RUN)/$(3) --model $(RUN)/$(2) $$($(1)_args))
endef

# $(1) is the folder, $(2) the model, $(3) the reference, $(4) the prompts.
define ppo_rule
$(1)_args = $$(call preset,ppo) $$(precision) $$(lora) $$(PPO_FLAGS) $$($(1)_FLAGS)
$(call made_from,$(1)): $(call done,$(firstword $(subst /, ,$(4))) $(2) $(3) rm)
$(call done,$(1)): $(call made_from,$(1))
	$$(call training_stage,train_ppo.py,--prompts $(RUN)/$(4) --model $(RUN)/$(2) --ref $(RUN)/$(3) --rm $(RUN)/rm $$($(1)_args))
endef

eval_args = --policies $(policies) $(call preset,eval) $(precision) $(EVAL_FLAGS)
$(call made_from,eval): $(call done,data rm split $(POLICIES))
$(call done,eval): $(call made_from,eval)
	$(call model_stage,eval.py,$(if $(REDO),,--overwrite true) --data $(RUN)/data --rm $(RUN)/rm --split $(RUN)/split $(eval_args))

# --- the schedules ---------------------------------------------------------------------------------
# One line for each folder that a policy can be trained in. A new schedule is a new line here;
# `make hh POLICIES="sft mpo reversed"` trains and compares it with others.

# MPO, the paper's method: DPO on easy pairs, then PPO on hard prompts with the DPO model as reference
#          folder        model       reference   rows
$(call dpo, dpo,          sft,                    split/pairs.jsonl)
$(call ppo, mpo,          dpo,        dpo,        split/prompts.jsonl)

# A second round: the last model is the next reference
$(call dpo, dpo-2,        mpo,                    split/pairs.jsonl)
$(call ppo, mpo-2,        dpo-2,      dpo-2,      split/prompts.jsonl)

# One stage: DPO on other pairs, PPO from the SFT model
$(call dpo, dpo-all,      sft,                    data/train.jsonl)
$(call dpo, dpo-hard,     sft,                    split/hard.jsonl)
$(call dpo, dpo-random,   sft,                    split/random/pairs.jsonl)
$(call dpo, dpo-inverted, sft,                    split/inverted/pairs.jsonl)
$(call ppo, ppo,          sft,        sft,        data/train.jsonl)
$(call ppo, ppo-hard,     sft,        sft,        split/prompts.jsonl)

# Two stages, one thing different from MPO
$(call ppo, mpo-sft-ref,  dpo,        sft,        split/prompts.jsonl)
$(call ppo, mpo-all,      dpo,        dpo,        data/train.jsonl)
$(call ppo, dpo-ppo,      dpo-all,    dpo-all,    data/train.jsonl)

# Other orders: the data reversed, the data mixed, the algorithms reversed
$(call ppo, reversed,     dpo-hard,   dpo-hard,   split/pairs.jsonl)
$(call ppo, mixed,        dpo-random, dpo-random, split/random/prompts.jsonl)
$(call dpo, ppo-dpo,      ppo-hard,               split/pairs.jsonl)

# The same lines under other names, for experiments that give them other flags (ppo-long_FLAGS="--iterations 100")
$(call dpo, dpo-long,     sft,                    split/pairs.jsonl)
$(call dpo, dpo-all-long, sft,                    data/train.jsonl)
$(call ppo, ppo-long,     sft,        sft,        data/train.jsonl)
$(call ppo, ppo-few,      sft,        sft,        data/train.jsonl)
$(call ppo, ppo-some,     sft,        sft,        data/train.jsonl)

include make/check.mk
