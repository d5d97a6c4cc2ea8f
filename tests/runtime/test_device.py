"""Every stage gives the same results on a second device, and mixes no tensors of two devices.

The second device is a pretended one (tests/support/pretend.py), or a GPU with MPO_TEST_DEVICE=cuda.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils import backend_registration

from mpo.config import DPOConfig
from mpo.runtime import device
from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json
from mpo.tools import memory
from tests.support.on_device import DEVICE, ON_GPU
from tests.support.scripts import ROOT

can_pretend = pytest.mark.skipif(
    not ON_GPU and not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this version of torch accepts no device written in Python",
)


@pytest.fixture(scope="module")
def work(hh_run, tmp_path_factory):
    """The folder of the stages that tests/support/pretend.py runs on both devices.

    Where one of them is pretended, both compute in plain torch. A GPU has its own kernels, and so has the CPU.
    """
    work = tmp_path_factory.mktemp("pretend")
    command = [sys.executable, "-m", "tests.support.pretend", hh_run, work, *([DEVICE] if ON_GPU else [])]
    environment = os.environ | ({"PYTORCH_NVML_BASED_CUDA_CHECK": "1"} if ON_GPU else {"MPO_KERNELS": "reference"})
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return work


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@can_pretend
@pytest.mark.parametrize("stage", ["sft", "rm", "dpo-lora", "ppo", "ppo-shared", "ppo-lora"])
def test_a_stage_trains_the_same_model_on_another_device(work, stage):
    here, there = work / f"{stage}-cpu", work / f"{stage}-other"
    for one, other in zip(lines(here / "metrics.jsonl"), lines(there / "metrics.jsonl"), strict=True):
        if one["step"] == 0:
            one.pop("accuracy", None)  # in DPO all log-ratios are 0 up to rounding, so it depends on rounding alone
            other.pop("accuracy", None)
        assert one == pytest.approx(other, rel=2e-3, abs=2e-5)
    one, other = load_file(here / "model.safetensors"), load_file(there / "model.safetensors")
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=3e-4)


@can_pretend
def test_scores_and_responses_are_the_same_on_another_device(work):
    for one, other in zip(*(lines(work / f"split-{d}" / "scores.jsonl") for d in ("cpu", "other")), strict=True):
        assert (one["id"], one["part"]) == (other["id"], other["part"])
        assert one["chosen"] == pytest.approx(other["chosen"], abs=1e-4)
    for name in ("sft", "mpo"):
        here, there = (lines(work / f"eval-{d}" / f"responses-{name}.jsonl") for d in ("cpu", "other"))
        assert [r["response"] for r in here] == [r["response"] for r in there]
    here, there = (read_json(work / f"eval-{d}" / "results.json")["policies"]["mpo"]["kl"] for d in ("cpu", "other"))
    assert here == pytest.approx(there, abs=1e-4)


@can_pretend
def test_a_stage_that_is_killed_on_another_device_goes_on_there_from_its_save(work):
    assert "going on after step 1" in (work / "ppo-killed.log").read_text()
    assert len(lines(work / "ppo-killed" / "metrics.jsonl")) == len(lines(work / "ppo-other" / "metrics.jsonl"))
    one, other = (load_file(work / name / "model.safetensors") for name in ("ppo-killed", "ppo-other"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=3e-4 if ON_GPU else 0)


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "meta:x"])
def test_a_device_that_this_machine_does_not_have_is_refused(name):
    with pytest.raises(InputError, match=f"--device {name}: not here"):
        device.start(name)
    assert device.current().type == "cpu"


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda:3"), (False, True, "mps"), (False, False, "cpu")]
)
def test_by_default_each_process_takes_its_own_gpu_if_there_is_one(monkeypatch, cuda, mps, expected):
    used = []
    monkeypatch.setattr(device, "_device", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch, "zeros", lambda n, device: used.append(device))
    monkeypatch.setenv("LOCAL_RANK", "3")
    device.start("auto")
    assert str(device.current()) == expected
    assert set(map(str, used)) == {expected}


@pytest.fixture
def one_gpu(monkeypatch):
    """Torch says that this machine has one GPU, cuda:0."""

    def zeros(n, device):
        if str(device) != "cuda:0":
            raise RuntimeError("CUDA error: invalid device ordinal")

    monkeypatch.setattr(device, "_device", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda chosen: SimpleNamespace(total_memory=2**40))
    monkeypatch.setattr(torch, "zeros", zeros)
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True


def test_more_processes_than_gpus_are_refused_with_both_numbers(one_gpu, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes need a GPU each, and the GPUs here are 1"):
        device.start("auto")
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(InputError, match="cuda:1: not here"):  # the user's own choice, in a single process
        device.start("cuda:1")


def test_a_gpu_multiplies_fp32_matrices_in_fp32_whatever_was_set_before(one_gpu):
    torch.set_float32_matmul_precision("medium")  # as an image's environment may do
    device.start("cuda")
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    device.start("cuda", rounded=True)  # operands of 8 bits lose nothing in TF32
    assert torch.backends.cuda.matmul.allow_tf32


def test_the_memory_plan_on_a_gpu_counts_what_torchs_own_layers_keep(one_gpu, monkeypatch, hh_run, capsys):
    config = DPOConfig(out="x", data="", model=str(hh_run / "sft"), microbatch=32)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (2**20, 2**40))
    memory.show(config)
    said = capsys.readouterr().out
    c = memory.model_of(config)
    total = sum(line.bytes for line in memory.lines(config, c, cpu=False))
    assert f"{total / 2**20:,.0f} MB" in said
    assert total > sum(line.bytes for line in memory.lines(config, c, cpu=True))
    assert "0.0 are free" in said  # of the GPU's memory, not of the machine's


def test_importing_every_stage_does_not_start_cuda():
    """A process that has started CUDA cannot use it after a fork, and the tests fork every stage."""
    code = "import sys, torch; torch.cuda.is_available = lambda: sys.exit('asked'); torch.cuda.init = sys.exit\n"
    code += "import torch._dynamo, train_sft, train_rm, split_data, train_dpo, train_ppo, eval, chat"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_flag_deterministic_switches_torchs_deterministic_algorithms_on_and_off():
    device.start("cpu", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    device.start("cpu")
    assert not torch.are_deterministic_algorithms_enabled()
