# What a task, the kind of its data and QUICK=1 change, compared to the defaults of mpo/config.py.
#
# A line is NAME_STAGE = flags, where the stage is data, tokenizer, sft, rm, split, dpo, ppo or eval; a stage without a
# line keeps the defaults. Of two flags of the same name the later one counts: QUICK comes after the task, and your own
# (SFT_FLAGS="--epochs 4") come last.

# MODEL=tiny or another preset: a model that begins with random weights. With Muon it needs half as many passes.
scratch_sft = --optimiser muon --lr 5e-3 --epochs 1.5
scratch_rm  = --lr 5e-4 --epochs 1.5

# make hh, in the built-in world
hh_data        = --train 28000 --test 1600
hh_tokenizer   = --vocab 1536

# make tldr, in the built-in world
tldr_data      = --train 24000 --test 1600
tldr_tokenizer = --vocab 1536
tldr_sft       = --epochs 1
tldr_rm        = --epochs 2

# make hh DATA=path
hh_files_data      = --train 0 --test 0
hh_files_tokenizer = --vocab 4096

# make tldr DATA=path: posts are longer than questions
tldr_files_data      = --train 0 --test 0
tldr_files_tokenizer = --vocab 4096
tldr_files_sft       = --max_prompt 640
tldr_files_rm        = --max_prompt 640
tldr_files_split     = --max_prompt 640
tldr_files_dpo       = --max_prompt 640
tldr_files_ppo       = --max_prompt 640
tldr_files_eval      = --max_prompt 640

# QUICK=1, a smoke test
quick_data = --train 400 --test 40
quick_sft  = --epochs 1
quick_rm   = --epochs 1
quick_ppo  = --iterations 2 --batch 16 --minibatch 8 --microbatch 8 --max_new 24 --critic_warmup 1
quick_eval = --prompts 16 --max_new 24
