# Comparisons over seeds (docs/experiments.md), this project timed beside others (docs/benchmarks.md) and on a GPU.

goals += ablate claims bench gpu-check

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
bench: .venv/.figures .peers/now/.done .peers/ppo/.done
	@$(PY) -m benchmarks.run $(BENCH_FLAGS)
	@$(PY) -m benchmarks.scaling --again true
	@$(PY) -m benchmarks.real --again true

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
