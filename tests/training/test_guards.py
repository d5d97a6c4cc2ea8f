"""What stops a stage before its weights are ruined, what is kept to find the cause, and what PPO warns of."""

from __future__ import annotations

import json
import math
import resource
import shutil
import subprocess
import sys

import pytest
import torch

from mpo.config import DPOConfig
from mpo.data.batches import encode, training_batches
from mpo.ppo.monitor import collapses
from mpo.runtime.errors import RunError
from mpo.runtime.files import read_json
from mpo.runtime.stage import Stage
from mpo.training.guards import NotFinite, agree_finite, not_finite
from mpo.training.loop import train
from mpo.world.build import build
from tests.conftest import SMALL, small_model
from tests.support.scripts import ROOT, run_script


def train_with_a_bad_row(tokenizer, out, microbatch):
    """Train for up to five steps with a loss that is NaN for one row of the fourth batch."""
    config = DPOConfig(out=str(out), data="", model="", batch=4, microbatch=microbatch, save_every=1000)
    model = small_model(vocab_size=tokenizer.size)
    pairs, _ = encode(build("hh", 1, 40, 4)["train"], tokenizer, 300, 300)
    batches = training_batches(pairs, 4, 1.0, 1, 5)
    bad = batches[3][2].row.id

    def losses_of(part):
        total = model.lm_head.weight.square().mean()
        return torch.stack([total * (math.nan if p.row.id == bad else 1.0) for p in part]), {}

    with pytest.raises(RunError) as stopped:
        train(model, batches, losses_of, lambda p: 1.0, config, Stage(config, {}, config.out, False))
    return model, bad, str(stopped.value)


@pytest.mark.parametrize("microbatch", [1, 4])
def test_a_loss_of_nan_stops_the_stage_names_the_row_and_can_be_reproduced(tokenizer, tmp_path, microbatch):
    out = tmp_path / "dpo"
    model, bad, message = train_with_a_bad_row(tokenizer, out, microbatch)
    assert message.startswith(f"dpo: step 3: the loss is not finite (rows {bad}); no step was taken.")
    assert all(torch.isfinite(p).all() for p in model.parameters())
    failure = read_json(out / "failure.json")
    assert failure["rows_to_blame"] == [bad]
    assert (failure["step"], len(failure["batch"])) == (3, 4)
    assert [r["id"] for r in failure["batch"]].index(bad) == 2
    assert failure["save"] == str(out / "saves" / "step-00000003")
    again, _, message = train_with_a_bad_row(tokenizer, out, microbatch)  # the same command fails at the same step
    assert "step 3: the loss is not finite" in message
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_diverging_weights_stop_the_stage(hh_run, tmp_path):
    out = tmp_path / "dpo"
    flags = ("--data", hh_run / "split" / "pairs.jsonl", "--model", hh_run / "sft", "--out", out, "--lr", "1e30")
    done = run_script("train_dpo.py", *flags, "--warmup", 0, "--steps", 9, "--save_every", 0, *SMALL, expect=1)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("train_dpo.py: stopped: ")
    assert "is not finite" in last
    assert "Lower --lr" in last
    assert "Traceback" not in done.stderr
    assert not (out / "manifest.json").exists()


def test_every_row_with_nan_or_infinity_is_named():
    assert not_finite(torch.zeros(3, 2), range(3)) == []
    bad = not_finite(torch.tensor([[0.0, math.inf], [0.0, 1.0], [math.nan, 0.0]]), [10, 20, 30])
    assert bad == [10, 30]
    agree_finite("x", [])
    with pytest.raises(NotFinite) as raised:
        agree_finite("x", bad)
    assert raised.value.rows == [10, 30]


HEALTHY = {"kl_exact": 2.0, "eos_rate": 0.9, "length": 20.0, "entropy": 1.5}


def test_there_is_no_warning_if_few_responses_ended_from_the_start():
    assert collapses(HEALTHY | {"eos_rate": 0.0}, HEALTHY | {"eos_rate": 0.06}) == {}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, None),
        ({"kl_exact": 13.0}, "kl"),
        ({"eos_rate": 0.4}, "eos_rate"),
        ({"length": 61.0}, "length"),
        ({"length": 6.0}, "length"),
        ({"entropy": 0.1}, "entropy"),
    ],
)
def test_a_collapse_is_reported_with_its_usual_cause(change, name):
    warnings = collapses(HEALTHY | change, HEALTHY)
    assert list(warnings) == ([name] if name else [])
    assert not name or ";" in warnings[name]  # the text before ";" says what happened, the text after it what to do


def test_ppo_warns_once_of_each_collapse_and_the_manifest_keeps_the_warning(hh_run, tmp_path):
    models = ("--model", hh_run / "dpo", "--ref", hh_run / "sft", "--rm", hh_run / "rm")
    sizes = ("--iterations", 12, "--batch", 8, "--minibatch", 8, "--microbatch", 8, "--max_new", 30, "--threads", 1)
    harmful = ("--lr", 0.03, "--kl_coef", 0, "--critic_warmup", 0, "--grad_clip", 100, "--missing_eos_penalty", 0)
    prompts = ("--prompts", hh_run / "split" / "prompts.jsonl", "--out", tmp_path / "ppo")
    done = run_script("train_ppo.py", *prompts, *models, *sizes, *harmful)
    in_manifest = read_json(tmp_path / "ppo" / "manifest.json")["results"]["warnings"]
    assert "kl" in in_manifest
    printed = [line for line in done.stderr.splitlines() if line.startswith("ppo: warning")]
    assert len(printed) == len(in_manifest)


@pytest.mark.parametrize("share", [0.5, 1.5])  # times the size of a model: too little for the model, and for a save
def test_a_full_disk_is_reported_in_one_line_and_overwrites_nothing(hh_run, tmp_path, share):
    """A limit on the size of files stands in for a full disk."""
    out, size = tmp_path / "dpo", int(share * (hh_run / "sft" / "model.safetensors").stat().st_size)
    flags = ("--data", hh_run / "split" / "pairs.jsonl", "--model", hh_run / "sft", "--out", out, "--steps", 4, *SMALL)
    command = [sys.executable, "train_dpo.py", *map(str, flags), "--save_every", "0"]

    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=limit_file_size)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("train_dpo.py: stopped: ")
    assert "cannot be written (" in last
    assert last.endswith("nothing was overwritten")
    assert "Traceback" not in done.stderr
    assert not list(out.rglob("*.partial"))
    run_script(*command[1:])  # the same command succeeds once there is room


@pytest.mark.parametrize("where", ["file/out", "/proc/nowhere/out"])
def test_a_folder_that_cannot_be_written_is_reported_in_one_line(hh_run, tmp_path, where):
    (tmp_path / "file").write_text("x")
    done = run_script("train_tokenizer.py", "--data", hh_run / "data", "--out", tmp_path / where, expect=1)
    assert "cannot be written (" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_an_input_that_differs_from_its_manifest_is_refused(hh_run, tmp_path):
    sft = tmp_path / "sft"
    shutil.copytree(hh_run / "sft", sft)
    content = bytearray((sft / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (sft / "model.safetensors").write_bytes(content)
    flags = ("--data", hh_run / "split" / "pairs.jsonl", "--model", sft, "--out", tmp_path / "dpo")
    done = run_script("train_dpo.py", *flags, expect=2)
    assert f"{sft}: model.safetensors has a different hash: it was changed after its stage had finished" in done.stderr
    (sft / "model.safetensors").unlink()
    done = run_script("train_dpo.py", *flags, expect=2)
    assert f"{sft}: model.safetensors is missing: it was changed after its stage had finished" in done.stderr


def test_a_metric_of_nan_is_logged_as_null(tmp_path):
    stage = Stage(DPOConfig(out=str(tmp_path / "x"), data="", model=""), {}, str(tmp_path / "x"), False)
    stage.log(0, {"a": math.nan, "b": 1.0})
    assert json.loads((tmp_path / "x" / "metrics.jsonl").read_text()) == {"step": 0, "a": None, "b": 1.0}
