# `make` and `make help`: what can be run. The variables are printed from the comment at the top of the Makefile.

goals += help
.DEFAULT_GOAL := help

define goals_help
Mixed Preference Optimization: SFT, reward model, split by reward gap, DPO on easy pairs, PPO on hard prompts.

  make hh, make tldr   run every stage on one of the paper's two tasks: 3 to 12 minutes on two cores
  make policy-NAME     train one policy without an evaluation; the names are in the table of the Makefile
  make chat, score     type to a model of the run (STAGE=mpo); a reward model's accuracy by category (RM DATA OUT)
  make report, verify  the report again, with figures in RUN/report.html; is any file damaged, out of date or unfinished?
  make data/hh-rlhf    download the official HH-RLHF files, which make hh then uses
  make ablate          compare losses, estimators, splits, ... (GRID VARY VALUES POLICY SEEDS; docs/experiments.md)
  make claims          put the paper's claims to the test: hours; REDUCED=1: minutes
  make bench, book     time this project beside others; compute the walk-through and the notebooks from a finished run
  make gpu-check       check and measure everything on a CUDA GPU, in 8 minutes (docs/hardware.md)
  make setup           install everything in .venv, as the other goals do; with PY=python3 they use that one as it is
  For those who change the code: make test, lint, parity, sanitize, triton, fuzz, soak, oldest, lock, site, clean

endef

help:
	@: $(info $(goals_help))
	@sed -n '/^# Variables/,/^$$/s/^# //p' Makefile
