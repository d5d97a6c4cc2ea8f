"""Fixtures and helpers that many tests share: a small model, a tokenizer, and a finished run of the pipeline."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The tests are those of the CPU, whatever the machine has; `make gpu-check` runs some of them on a GPU (on_device.py).
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0") * ("MPO_TEST_DEVICE" in os.environ)

import pytest
import torch

from mpo.data.tokenizer import Tokenizer, train_tokenizer
from mpo.model.llama import Llama, LlamaConfig, initialise
from mpo.runtime.cores import cores
from mpo.runtime.seeding import generator
from mpo.world.build import build
from tests.support.scripts import ROOT, run_script

SHARED = ROOT.parent / "shared"
STORIES = SHARED / "models" / "stories260K"

WORKER = "PYTEST_XDIST_WORKER" in os.environ  # True in a worker process of pytest-xdist
if WORKER:  # each worker uses one core, and so does every process that it starts
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist there is no such hook
def pytest_xdist_auto_num_workers() -> int:
    """The number of workers for `-n auto`."""
    return cores()


@pytest.fixture(autouse=True)
def _numbers_as_usual():
    """A stage sets denormal numbers to zero in its process; a test that runs one here must not do so to the others."""
    yield
    torch.set_flush_denormal(False)


needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="the real small model is not on this machine")
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not on this machine")


def small_config(**changes: object) -> LlamaConfig:
    """The config of a small model. Its sizes are unusual, so that code that mixes up two dimensions fails."""
    sizes = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
    }
    return LlamaConfig(**{**sizes, **changes})  # type: ignore[arg-type]


def small_model(seed: int = 0, **changes: object) -> Llama:
    """A random model with weights large enough that its predictions are far from uniform."""
    model = Llama(small_config(**changes))
    initialise(model, generator(seed, "test"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A tokenizer trained on a small sample of the hh world."""
    rows = build("hh", seed=3, train=200, test=4)["train"]
    return train_tokenizer((t for r in rows for t in (r.prompt, r.chosen, r.rejected)), 700, seed=1)


SMALL = ("--batch", 8, "--microbatch", 8, "--threads", 1)


def run_pipeline(run: Path, task: str, seed: int = 1) -> None:
    """Run the stages of `make hh`, at the smallest size that still takes every path."""

    def stage(script: str, name: str, *args: object) -> None:
        run_script(script, "--out", run / name, "--seed", seed, *args)

    stage("prepare_data.py", "data", "--task", task, "--train", 120, "--test", 24)
    stage("train_tokenizer.py", "tokenizer", "--data", run / "data", "--vocab", 500)
    data = ("--data", run / "data")
    stage("train_sft.py", "sft", *data, "--tokenizer", run / "tokenizer", "--epochs", 0.5, *SMALL)
    stage("train_rm.py", "rm", *data, "--model", run / "sft", "--epochs", 0.5, *SMALL)
    stage("split_data.py", "split", *data, "--rm", run / "rm", "--threads", 1)
    pairs, prompts = run / "split" / "pairs.jsonl", run / "split" / "prompts.jsonl"
    stage("train_dpo.py", "dpo", "--data", pairs, "--model", run / "sft", *SMALL)
    models = ("--model", run / "dpo", "--ref", run / "dpo", "--rm", run / "rm")
    sizes = ("--iterations", 2, "--batch", 8, "--minibatch", 4, "--microbatch", 2, "--max_new", 10, "--threads", 1)
    sizes += ("--critic_warmup", 1)
    stage("train_ppo.py", "mpo", "--prompts", prompts, *models, *sizes)
    policies = ",".join(f"{p}={run / p}" for p in ("sft", "dpo", "mpo"))
    sampling = ("--prompts", 8, "--max_new", 12, "--threads", 1)
    split = ("--split", run / "split")
    stage("eval.py", "eval", *data, "--rm", run / "rm", *split, "--policies", policies, *sampling)


@contextmanager
def without_gpus() -> Iterator[None]:
    """Programs that are started within this context see no GPU."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        os.environ |= {} if before is None else {"CUDA_VISIBLE_DEVICES": before}


@pytest.fixture(scope="session")
def hh_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the hh world. All workers share it, so no test may change it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if WORKER else base
    run = base / "hh"
    with (base / "hh.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
        if not (run / "eval" / "manifest.json").exists():
            with without_gpus():
                run_pipeline(run, "hh")
    return run
