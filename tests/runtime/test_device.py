"""Every stage gives the same results on a second, pretended device, and mixes no tensors of two devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.utils import backend_registration

from mpo.runtime import device
from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json
from tests.support.scripts import ROOT

can_pretend = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this version of torch accepts no device written in Python",
)


@pytest.fixture(scope="module")
def work(hh_run, tmp_path_factory):
    """The folder of the stages that tests/support/pretend.py runs on both devices."""
    work = tmp_path_factory.mktemp("pretend")
    command, environment = [sys.executable, "-m", "tests.support.pretend", hh_run, work], {"MPO_KERNELS": "reference"}
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return work


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@can_pretend
@pytest.mark.parametrize("stage", ["sft", "rm", "dpo-lora", "ppo", "ppo-shared", "ppo-lora"])
def test_a_stage_trains_the_same_model_on_another_device(work, stage):
    here, there = work / f"{stage}-cpu", work / f"{stage}-pretend"
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
    for one, other in zip(*(lines(work / f"split-{d}" / "scores.jsonl") for d in ("cpu", "pretend")), strict=True):
        assert (one["id"], one["part"]) == (other["id"], other["part"])
        assert one["chosen"] == pytest.approx(other["chosen"], abs=1e-4)
    for name in ("sft", "mpo"):
        here, there = (lines(work / f"eval-{d}" / f"responses-{name}.jsonl") for d in ("cpu", "pretend"))
        assert [r["response"] for r in here] == [r["response"] for r in there]
    here, there = (read_json(work / f"eval-{d}" / "results.json")["policies"]["mpo"]["kl"] for d in ("cpu", "pretend"))
    assert here == pytest.approx(there, abs=1e-4)


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
    monkeypatch.setattr(torch, "zeros", lambda n, device: used.append(device))
    monkeypatch.setenv("LOCAL_RANK", "3")
    device.start("auto")
    assert str(device.current()) == expected
    assert set(map(str, used)) == {expected}


def test_the_flag_deterministic_switches_torchs_deterministic_algorithms_on_and_off():
    device.start("cpu", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    device.start("cpu")
    assert not torch.are_deterministic_algorithms_enabled()
