# Comparisons over seeds (docs/experiments.md), this project timed beside others (docs/benchmarks.md) and on a GPU.

goals += ablate claims bench gpu-check book

# Compare losses, advantage estimators, splits, ...: GRID names a grid of experiments/ablate.py, or VARY and VALUES
# name a make variable and its values. POLICY is the policy that is trained.
ablate_takes := TASK GRID VARY VALUES POLICY SEEDS ABLATE_FLAGS NPROC SHARD DEVICE
ablate: .venv/.figures
	@$(PY) -m experiments.ablate --task $(TASK) $(if $(GRID),--grid '$(GRID)') $(if $(VARY),--vary '$(VARY)') \
	    $(if $(VALUES),--values '$(VALUES)') $(if $(POLICY),--policy '$(POLICY)') $(if $(SEEDS),--seeds '$(SEEDS)') \
	    $(ABLATE_FLAGS)

claims_takes := REDUCED CLAIMS_FLAGS NPROC SHARD DEVICE
claims: .venv/.figures
	@$(PY) -m experiments.claims $(if $(REDUCED),--reduced true) $(CLAIMS_FLAGS)

bench_takes := BENCH_FLAGS
bench: .venv/.figures .peers/now/.done .peers/ppo/.done .peers/torchtune/.done .peers/llamafactory/.done
	@$(PY) -m benchmarks.run $(BENCH_FLAGS)
	@$(PY) -m benchmarks.scaling --again true
	@$(PY) -m benchmarks.real --again true
	@$(PY) -m benchmarks.others --again true

# The pages of docs/ and the notebooks that are computed from a finished run (notebooks/)
book_takes := RUN QUICK BOOK_FLAGS
book: .venv/.figures
	@RUN=$(RUN) $(PY) -m notebooks.build $(BOOK_FLAGS)

# All that has to be known of a GPU, in 8 minutes at most (docs/hardware.md); REHEARSE=1: the same on the CPU
gpu-check_takes := REHEARSE GPU_FLAGS
gpu-check: .venv/.gpu .venv/.ready
	@$(PY) -m benchmarks.gpu $(if $(REHEARSE),--rehearse true) $(GPU_FLAGS)

# The other projects, each version in an environment of its own
.peers/now/.done: make/experiments.mk
	$(PYTHON) -m venv .peers/now
	.peers/now/bin/pip --disable-pip-version-check install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0 \
	    peft==0.21.2 cut-cross-entropy==25.1.1
	@touch $@

.peers/ppo/.done: make/experiments.mk
	$(PYTHON) -m venv .peers/ppo
	.peers/ppo/bin/pip --disable-pip-version-check install --quiet torch==2.13.0 trl==0.23.1 transformers==4.57.1
	@touch $@

# torchao is what torchtune imports without asking for it; this is the version of torchtune's own time.
.peers/torchtune/.done: make/experiments.mk
	$(PYTHON) -m venv .peers/torchtune
	.peers/torchtune/bin/pip --disable-pip-version-check install --quiet torch==2.13.0 torchtune==0.6.1 torchao==0.9.0
	@touch $@

# LLaMA-Factory asks for torchaudio, whose builds need CUDA, and for torchvision, a web page and more that its training
# does not use. So it is installed without what it asks for, and what its training imports is named here.
.peers/llamafactory/.done: make/experiments.mk
	$(PYTHON) -m venv .peers/llamafactory
	.peers/llamafactory/bin/pip --disable-pip-version-check install --quiet torch==2.13.0 transformers==5.6.0 \
	    trl==0.24.0 peft==0.18.1 accelerate==1.11.0 datasets==4.0.0 torchdata==0.11.0 omegaconf matplotlib einops scipy \
	    sentencepiece tiktoken fire uvicorn fastapi sse-starlette 'tyro<0.9.0'
	.peers/llamafactory/bin/pip --disable-pip-version-check install --quiet --no-deps llamafactory==0.9.5
	@touch $@
