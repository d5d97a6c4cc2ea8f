# For those who change the code: tests, checkers, locked versions.

goals += test parity sanitize triton fuzz soak oldest lint lock site clean

# One file at a time on every core
test: .venv/.dev
	@echo 'About 1,900 tests, on every core: some minutes. The last line says how many passed, and in how many seconds.'
	$(PY) -m pytest -n auto --dist loadfile

# The losses against TRL's trainers, LoRA against peft
parity: .venv/.parity
	$(PY) -m pytest tests/preference/test_trl.py tests/model/test_lora.py -k 'trl or peft'

# The compiled kernels' tests with every access to memory checked
sanitize: export MPO_KERNELS_FLAGS := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize: .venv/.dev
	@$(PY) kernels/build.py
	ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$($(or $(CXX),g++) -print-file-name=libasan.so) $$($(or $(CXX),g++) -print-file-name=libstdc++.so.6)" \
	    $(PY) -m pytest --capture=sys tests/kernels

# The GPU kernels' tests in Triton's interpreter, which needs no GPU
triton: .venv/.gpu
	TRITON_INTERPRET=1 $(PY) -m pytest tests/kernels -k gpu

# The long versions of two tests: thousands of malformed inputs (CASES), every stage killed again and again (KILLS)
KILLS ?= 40
CASES ?= 12000

fuzz_takes := CASES SEED
fuzz: .venv/.dev
	$(PY) -m tests.support.fuzz $(CASES) $(SEED)

soak_takes := CASES KILLS
soak: .venv/.dev
	$(PY) -m tests.support.soak $(KILLS) $(CASES) docs/robustness.md

# The tests with the oldest versions that pyproject.toml allows. Their torch brings gigabytes of GPU libraries.
.oldest/.done: pyproject.toml requirements/direct.txt
	$(PYTHON) -m venv .oldest
	.oldest/bin/python requirements/pick.py oldest > .oldest/oldest.txt
	.oldest/bin/pip --disable-pip-version-check install --quiet -r .oldest/oldest.txt
	@touch $@

oldest: .oldest/.done
	.oldest/bin/python kernels/build.py
	.oldest/bin/python -m pytest -n auto --dist loadfile

lint: .venv/.dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy mpo experiments benchmarks requirements docs/site notebooks/build.py notebooks/show.py *.py

# After a change of versions in requirements/direct.txt. The hash of the CPU build is kept: it comes from another index.
# Trackers are not locked: make installs none of them.
locked_extras := figures tokenizers jinja2 parquet hub site gpu dev parity
lock: .venv/bin/python
	$(PIP) install --quiet uv
	grep '^# cpu build' requirements/lock.txt > .venv/cpu
	.venv/bin/uv pip compile pyproject.toml $(locked_extras:%=--extra %) -c requirements/direct.txt --universal --generate-hashes \
	    --python-version 3.11 --quiet --custom-compile-command "make lock" -o requirements/lock.txt
	cat .venv/cpu >> requirements/lock.txt

# The README and docs/ as a site, in build/site. A warning, such as a link that leads nowhere, is an error. The first program
# knows the Markdown, the second one the finished pages.
site: .venv/.site
	rm -rf build/site
	@$(PY) -m sphinx --builder html --conf-dir docs/site --fail-on-warning --keep-going --quiet --fresh-env \
	    --doctree-dir build/doctrees . build/site
	@$(PY) docs/site/links.py build/site
	@echo 'Open build/site/index.html in a browser.'

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build ./*.egg-info
	@echo "kept: runs/, data/ and .venv/ (remove them by hand)"
