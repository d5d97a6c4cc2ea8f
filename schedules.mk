# How the stages are chained: one line for each folder of a run, with what it starts from, its
# reference and its rows. A new schedule is a new line; `make hh POLICIES="sft mpo reversed"` runs it.

# $(1) folder, $(2) model, which is the reference too, $(3) pairs, $(4) flags
define dpo
$(strip $(1))_args = $$(any_dpo_args) $(4) $$($(strip $(1))_FLAGS)
$$(RUN)/$(strip $(1))/$$(DONE): $$(RUN)/.flags/$(strip $(1)) \
    $$(RUN)/$(firstword $(subst /, ,$(3)))/$$(DONE) $$(RUN)/$(strip $(2))/$$(DONE)
	@$$(call many,train_dpo.py) --data $$(RUN)/$(strip $(3)) --model $$(RUN)/$(strip $(2)) $$($(strip $(1))_args)
endef

# $(1) folder, $(2) model, $(3) reference, $(4) prompts, $(5) flags
define ppo
$(strip $(1))_args = $$(any_ppo_args) $(5) $$($(strip $(1))_FLAGS)
$$(RUN)/$(strip $(1))/$$(DONE): $$(RUN)/.flags/$(strip $(1)) \
    $$(RUN)/$(firstword $(subst /, ,$(4)))/$$(DONE) $$(RUN)/$(strip $(2))/$$(DONE) \
    $$(RUN)/$(strip $(3))/$$(DONE) $$(RUN)/rm/$$(DONE)
	@$$(call many,train_ppo.py) --prompts $$(RUN)/$(strip $(4)) --model $$(RUN)/$(strip $(2)) \
	    --ref $$(RUN)/$(strip $(3)) --rm $$(RUN)/rm $$($(strip $(1))_args)
endef

# MPO, the paper's method: DPO on easy pairs, then PPO on hard prompts with the DPO model as reference
#                 folder         model      reference   rows
$(eval $(call dpo, dpo,           sft,                   split/pairs.jsonl))
$(eval $(call ppo, mpo,           dpo,       dpo,        split/prompts.jsonl))

# A second round: the last model is the next reference
$(eval $(call dpo, dpo-2,         mpo,                   split/pairs.jsonl))
$(eval $(call ppo, mpo-2,         dpo-2,     dpo-2,      split/prompts.jsonl))

# One stage: DPO on other pairs, PPO from the SFT model
$(eval $(call dpo, dpo-all,       sft,                   data/train.jsonl))
$(eval $(call dpo, dpo-hard,      sft,                   split/hard.jsonl))
$(eval $(call dpo, dpo-random,    sft,                   split/random/pairs.jsonl))
$(eval $(call dpo, dpo-inverted,  sft,                   split/inverted/pairs.jsonl))
$(eval $(call ppo, ppo,           sft,       sft,        data/train.jsonl))
$(eval $(call ppo, ppo-hard,      sft,       sft,        split/prompts.jsonl))

# Two stages, one thing different from MPO
$(eval $(call ppo, mpo-sft-ref,   dpo,       sft,        split/prompts.jsonl))
$(eval $(call ppo, mpo-all,       dpo,       dpo,        data/train.jsonl))
$(eval $(call ppo, dpo-ppo,       dpo-all,   dpo-all,    data/train.jsonl))

# Other orders: the data reversed, the data mixed, the algorithms reversed
$(eval $(call ppo, reversed,      dpo-hard,  dpo-hard,   split/pairs.jsonl))
$(eval $(call ppo, mixed,         dpo-random, dpo-random, split/random/prompts.jsonl))
$(eval $(call dpo, ppo-dpo,       ppo-hard,              split/pairs.jsonl))

# The same edges once more, for comparisons of length and of prompt counts: their flags make the difference
$(eval $(call dpo, dpo-long,      sft,                   split/pairs.jsonl))
$(eval $(call dpo, dpo-all-long,  sft,                   data/train.jsonl))
$(eval $(call ppo, ppo-long,      sft,       sft,        data/train.jsonl))
$(eval $(call ppo, ppo-few,       sft,       sft,        data/train.jsonl))
$(eval $(call ppo, ppo-some,      sft,       sft,        data/train.jsonl))
