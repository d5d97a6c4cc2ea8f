# What a task, the kind of its data and QUICK=1 change, compared to the defaults of mpo/config.py.
#
# A line is NAME_STAGE = flags, where the stage is data, tokenizer, sft, rm, split, dpo, ppo or eval; a stage without a
# line keeps the defaults. Of two flags of the same name the later one counts: QUICK comes after the task, and your own
# (SFT_FLAGS="--epochs 4") come last.

# MODEL=tiny or another preset: a model that begins with random weights. With Muon it needs half as many passes.
scratch_sft = --optimiser muon --lr 5e-3 --epochs 1.5
scratch_rm  = --lr 5e-4 --epochs 1.5

# MODEL=folder: a model that has been trained already, by the number of its parameters (small: below 0.7 billion, medium:
# below 5 billion, large) and by what is trained: all weights, or adapters (LORA=16). Sources: docs/models.md
pretrained_sft  = --epochs 1
pretrained_rm   = --epochs 1
pretrained_ppo  = --batch 64 --minibatch 32 --max_new 128
pretrained_eval = --max_new 128

full_small_sft  = --lr 5e-5
full_small_rm   = --lr 2e-5
full_small_dpo  = --lr 2e-6 --beta 0.1
full_small_ppo  = --lr 3e-6 --critic_lr 1e-5

lora_small_sft  = --lr 5e-4
lora_small_rm   = --lr 2e-4
lora_small_dpo  = --lr 2e-5 --beta 0.1
lora_small_ppo  = --lr 3e-5 --critic_lr 1e-4

full_medium_sft = --lr 2e-5
full_medium_rm  = --lr 1e-5
full_medium_dpo = --lr 1e-6 --beta 0.1
full_medium_ppo = --lr 2e-6 --critic_lr 5e-6

lora_medium_sft = --lr 2e-4
lora_medium_rm  = --lr 1e-4
lora_medium_dpo = --lr 1e-5 --beta 0.1
lora_medium_ppo = --lr 2e-5 --critic_lr 5e-5

full_large_sft  = --lr 1e-5
full_large_rm   = --lr 3e-6
full_large_dpo  = --lr 5e-7 --beta 0.1
full_large_ppo  = --lr 1e-6 --critic_lr 3e-6

lora_large_sft  = --lr 1e-4
lora_large_rm   = --lr 3e-5
lora_large_dpo  = --lr 5e-6 --beta 0.1
lora_large_ppo  = --lr 1e-5 --critic_lr 3e-5

# make hh, in the built-in world
hh_data        = --train 28000 --test 1600
hh_tokenizer   = --vocab 1536

# make tldr, in the built-in world
tldr_data      = --train 24000 --test 1600
tldr_tokenizer = --vocab 1536
tldr_sft       = --epochs 1
tldr_rm        = --epochs 2

# make hh DATA=path: by the counts that SFT prints, these lengths keep 96 % of HH's rows with the vocabulary of 4,096, and
# 97 % with SmolLM2's
hh_files_data      = --train 0 --test 0
hh_files_tokenizer = --vocab 4096
hh_files_sft       = --max_prompt 448 --max_response 224
hh_files_rm        = --max_prompt 448 --max_response 224
hh_files_split     = --max_prompt 448 --max_response 224
hh_files_dpo       = --max_prompt 448 --max_response 224
hh_files_ppo       = --max_prompt 448 --max_response 224
hh_files_eval      = --max_prompt 448 --max_response 224

# make tldr DATA=path: posts are longer than questions
tldr_files_data      = --train 0 --test 0
tldr_files_tokenizer = --vocab 4096
tldr_files_sft       = --max_prompt 640
tldr_files_rm        = --max_prompt 640
tldr_files_split     = --max_prompt 640
tldr_files_dpo       = --max_prompt 640
tldr_files_ppo       = --max_prompt 640
tldr_files_eval      = --max_prompt 640

# MODEL=folder, a model of less than 30 million parameters, which may have been made for 512 tokens
toy_files_sft   = --max_prompt 384 --max_response 128
toy_files_rm    = --max_prompt 384 --max_response 128
toy_files_split = --max_prompt 384 --max_response 128
toy_files_dpo   = --max_prompt 384 --max_response 128
toy_files_ppo   = --max_prompt 384 --max_response 128
toy_files_eval  = --max_prompt 384 --max_response 128

# QUICK=1, a smoke test
quick_data = --train 400 --test 40
quick_sft  = --epochs 1
quick_rm   = --epochs 1
quick_ppo  = --iterations 2 --batch 16 --minibatch 8 --max_new 24 --critic_warmup 1
quick_eval = --prompts 16 --max_new 24

# QUICK=1 with a model that has been trained already: fewer and shorter rows, for 2 minutes with 135 million parameters
quick_pretrained_data  = --train 64 --test 16
quick_pretrained_sft   = --batch 4 --max_prompt 128 --max_response 48
quick_pretrained_rm    = --batch 4 --max_prompt 128 --max_response 48
quick_pretrained_split = --max_prompt 128 --max_response 48
quick_pretrained_dpo   = --batch 4 --max_prompt 128 --max_response 48
quick_pretrained_ppo   = --batch 4 --minibatch 4 --max_new 16 --max_prompt 128 --max_response 48
quick_pretrained_eval  = --prompts 4 --max_new 16 --max_prompt 128 --max_response 48
