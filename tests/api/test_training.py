"""mpo.train: a stage's own folder from rows in memory, with its checks; and a program that goes on after it."""

from __future__ import annotations

import json
import math
import os
import signal
import threading

import pytest
import torch

import mpo
import train_dpo
from mpo.config import DPOConfig
from mpo.data.rows import read_rows, write_rows
from mpo.runtime.errors import Interrupted
from mpo.runtime.files import read_json, sha256
from mpo.runtime.flags import parse
from mpo.world.build import build
from tests.api.test_models import settings
from tests.support import templates
from tests.support.layouts import LAYOUTS

SIZES = {"batch": 4, "microbatch": 4, "threads": 1, "device": "cpu"}
PAIRS = sorted(build("hh", seed=3, train=40, test=4)["train"], key=lambda r: len(r.chosen + r.rejected))[:12]  # all fit
ROWS = [{"id": r.id, "prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in PAIRS]


@pytest.fixture(scope="module")
def sft(hh_run):
    return mpo.load(hh_run / "sft", device="cpu")


@pytest.fixture
def losses(monkeypatch):
    """The table of losses, which is put back after the test."""
    before = dict(mpo.losses.PREFERENCE_LOSSES)
    yield mpo.losses.PREFERENCE_LOSSES
    mpo.losses.PREFERENCE_LOSSES.clear()
    mpo.losses.PREFERENCE_LOSSES.update(before)


def test_dpo_writes_the_bytes_of_the_script_and_gives_everything_back(hh_run, sft, tmp_path):
    before, handler = settings(), signal.getsignal(signal.SIGINT)
    trained = mpo.train("dpo", ROWS, model=sft, out=tmp_path / "ours", lr=1e-3, **SIZES)
    assert (settings(), signal.getsignal(signal.SIGINT)) == (before, handler)
    write_rows(tmp_path / "rows.jsonl", PAIRS)
    flags = {"data": tmp_path / "rows.jsonl", "model": hh_run / "sft", "out": tmp_path / "script", "lr": 1e-3}
    train_dpo.main(parse(DPOConfig, [f"--{name}={value}" for name, value in (flags | SIZES).items()]))
    same = [sha256(tmp_path / name / "model.safetensors") for name in ("ours", "script")]
    assert same[0] == same[1] != sha256(hh_run / "sft" / "model.safetensors")
    assert read_json(tmp_path / "ours" / "manifest.json")["stage"] == "train_dpo"
    assert isinstance(trained, mpo.Policy)
    assert trained.results["steps"] == 3
    assert trained.logp("Hi", "Yes") != pytest.approx(sft.logp("Hi", "Yes"), abs=1e-4)


def test_a_loss_of_ones_own_is_trained_with(sft, tmp_path, losses):
    losses["mine"] = lambda pairs, beta, shift=2.0: mpo.losses.sigmoid(pairs, beta) + shift
    trained = mpo.train("dpo", ROWS, model=sft, out=tmp_path / "mine", loss="mine", **SIZES)
    assert trained.results["first_loss"] == pytest.approx(math.log(2) + 2, abs=1e-5)
    trained = mpo.train("dpo", ROWS, model=sft, out=tmp_path / "5", loss="mine:shift=5", **SIZES)
    assert trained.results["first_loss"] == pytest.approx(math.log(2) + 5, abs=1e-5)


def test_a_finished_call_loads_and_another_one_is_refused(sft, tmp_path, capsys):
    out = tmp_path / "dpo"
    first = mpo.train("dpo", ROWS, model=sft, out=out, **SIZES)
    written = (out / "manifest.json").stat().st_ino
    capsys.readouterr()
    again = mpo.train("dpo", ROWS, model=sft, out=out, **SIZES)
    assert f"{out}: is finished, with these flags and inputs" in capsys.readouterr().out
    assert (out / "manifest.json").stat().st_ino == written
    assert again.logp("Hi", "Yes") == first.logp("Hi", "Yes")
    with pytest.raises(mpo.InputError, match=r"holds a finished stage, but --beta was 0\.5 and is now 0\.1"):
        mpo.train("dpo", ROWS, model=sft, out=out, beta=0.1, **SIZES)
    with pytest.raises(mpo.InputError, match="the content of its input data has changed"):
        mpo.train("dpo", ROWS[:8], model=sft, out=out, **SIZES)
    assert mpo.train("dpo", ROWS[:8], model=sft, out=out, overwrite=True, **SIZES).results["steps"] == 2
    assert len(list(tmp_path.glob("dpo-rows-*"))) == 2  # no rows are replaced, so what they made can be traced


def test_sft_from_nothing_gets_a_tokenizer_and_test_rows(tmp_path):
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"It is not {i}."} for i in range(48)]
    policy = mpo.train("sft", rows, model="tiny", out=tmp_path / "sft", epochs=0.2, held_out=0.25, **SIZES)
    assert policy.results["rows"]["test"]["kept"] == 12
    assert (tmp_path / "sft-tokenizer" / "manifest.json").exists()
    (folder,) = tmp_path.glob("sft-rows-*")
    train, test = (read_rows(folder / f"{split}.jsonl") for split in ("train", "test"))
    assert (len(train), len(test)) == (36, 12)
    assert {row.prompt for row in train + test} == {f"\n\nHuman: What is {i}?\n\nAssistant:" for i in range(48)}
    again = mpo.train("sft", rows, model="tiny", out=tmp_path / "sft", epochs=0.2, held_out=0.25, **SIZES)
    assert again.results == policy.results


def test_a_reward_model_and_ppo_on_prompts_alone(sft, tmp_path):
    rm = mpo.train("rm", ROWS, model=sft, out=tmp_path / "rm", epochs=1, held_out=0.2, **SIZES)
    assert isinstance(rm, mpo.RewardModel)
    assert rm.results["held_out"]["accuracy"][0] >= 0
    questions = ["Hi?", "\n\nHuman: Ho?\n\nAssistant:", "Why?", "Who?"]
    sizes = {**SIZES, "minibatch": 4, "microbatch": 2, "iterations": 2, "critic_warmup": 1, "max_new": 6}
    ppo = mpo.train("ppo", questions, model=sft, ref=None, rm=rm, out=tmp_path / "ppo", **sizes)
    assert ppo.results["prompts"] == {"kept": 4}
    assert ppo.results["iterations"] == 2
    (file,) = tmp_path.glob("ppo-rows-*/train.jsonl")
    assert [row.prompt for row in read_rows(file)][:2] == ["\n\nHuman: Hi?\n\nAssistant:", questions[1]]
    assert json.loads((tmp_path / "ppo" / "stage.json").read_text())["ref"] == str(sft.folder)
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions))
    from_file = mpo.train("ppo", lines, model=sft, rm=rm, out=tmp_path / "file", **sizes)
    assert sha256(from_file.folder / "model.safetensors") == sha256(ppo.folder / "model.safetensors")


def test_paths_are_read_as_they_are_where_a_stage_can_read_them(hh_run, sft, tmp_path):
    sizes = {**SIZES, "steps": 1}
    for i, path in enumerate((hh_run / "data", hh_run / "split" / "pairs.jsonl")):
        mpo.train("dpo", path, model=sft, out=tmp_path / f"{i}", **sizes)
        read = json.loads((tmp_path / f"{i}" / "stage.json").read_text())["data"]
        assert read == str(path / "train.jsonl" if path.is_dir() else path)
    assert not list(tmp_path.glob("*-rows-*"))
    other = tmp_path / "pairs.json"
    other.write_text(json.dumps([{k: v for k, v in row.items() if k != "id"} for row in ROWS]))
    mpo.train("dpo", str(other), model=sft, out=tmp_path / "other", **sizes)
    (converted,) = tmp_path.glob("other-rows-*/train.jsonl")
    assert [row.prompt for row in read_rows(converted)] == [row.prompt for row in PAIRS]


def test_ctrl_c_saves_and_the_same_call_goes_on(sft, tmp_path, losses, capfd):
    calls = []

    def interrupting(pairs, beta):
        calls.append(len(pairs.chosen))
        if len(calls) == 2:  # in the second of three steps
            os.kill(os.getpid(), signal.SIGINT)
        return mpo.losses.sigmoid(pairs, beta)

    losses["interrupting"] = interrupting
    flags = {"model": sft, "loss": "interrupting", "keep": 0, **SIZES}
    with pytest.raises(Interrupted, match="after step 2, which is saved"):
        mpo.train("dpo", ROWS, out=tmp_path / "out", **flags)
    assert not (tmp_path / "out" / ".lock").exists()
    capfd.readouterr()
    resumed = mpo.train("dpo", ROWS, out=tmp_path / "out", **flags)
    assert "going on after step 2" in capfd.readouterr().out
    whole = mpo.train("dpo", ROWS, out=tmp_path / "whole", **flags)
    assert sha256(resumed.folder / "model.safetensors") == sha256(whole.folder / "model.safetensors")


def test_after_a_failure_the_folder_is_free_again(sft, tmp_path):
    with pytest.raises(mpo.InputError, match="12 rows do not fill one batch of 64"):
        mpo.train("dpo", ROWS, model=sft, out=tmp_path / "out", batch=64, device="cpu", threads=1)
    assert not (tmp_path / "out" / ".lock").exists()
    assert torch.get_num_threads() == settings()[3]
    assert mpo.train("dpo", ROWS, model=sft, out=tmp_path / "out", **SIZES).results["steps"] == 3


def test_a_loss_that_is_not_finite_is_a_run_error(sft, tmp_path, losses):
    losses["bad"] = lambda pairs, beta: pairs.chosen * math.nan
    with pytest.raises(mpo.RunError, match="the loss is not finite"):
        mpo.train("dpo", ROWS, model=sft, out=tmp_path / "out", loss="bad", **SIZES)


@pytest.mark.parametrize(
    ("stage", "rows", "flags", "message"),
    [
        ("dp", ROWS, {}, "'dp': not a stage that trains; did you mean dpo?"),
        ("eval", ROWS, {}, "'eval': not a stage that trains"),
        ("dpo", ROWS, {"model": None}, "mpo.train('dpo', ...): needs model="),
        ("dpo", ROWS, {"lrr": 1}, "unknown flag --lrr; did you mean --lr?"),
        ("dpo", ROWS, {"data": "x"}, "data=: the rows are the second argument"),
        ("dpo", ROWS, {"seed": "one"}, "--seed one: not a whole number in digits"),
        ("dpo", ROWS, {"overwrite": "yes"}, "expected true or false, found 'yes'"),
        ("dpo", ROWS, {"lr": -1}, "--lr -1: must be above 0"),
        ("dpo", ROWS, {"loss": "sigmoit"}, "did you mean sigmoid?"),
        ("dpo", ROWS, {"batch": 6, "microbatch": 4}, "--batch 6 must be a multiple of --microbatch 4"),
        ("dpo", ROWS, {"plan": True}, "only the command prints a plan: mpo dpo --plan true"),
        ("dpo", [], {}, "rows: contains no rows"),
        ("dpo", ["Hi"], {}, "rows[0]: expected a JSON object, found str"),
        ("dpo", [{"prompt": "Hi"}], {}, "rows[0]: unknown format"),
        ("dpo", "nowhere.jsonl", {}, "nowhere.jsonl"),
        ("rm", ROWS, {"held_out": 1.5}, "held_out=1.5: must be above 0 and below 1"),
        ("rm", ROWS[:1], {}, "with a single prompt cannot be divided"),
        ("ppo", ["Hi"], {}, "required: --rm"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(sft, tmp_path, stage, rows, flags, message):
    with pytest.raises(mpo.InputError) as refusal:
        mpo.train(stage, rows, out=tmp_path / "out", **({"model": sft} | flags))
    assert message in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_several_processes_are_for_the_command(sft, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(mpo.InputError, match="runs in one process; for several: mpo launch 2 dpo"):
        mpo.train("dpo", ROWS, model=sft, out=tmp_path / "out")


def test_rows_that_were_changed_by_hand_are_not_replaced(sft, tmp_path):
    mpo.train("dpo", ROWS, model=sft, out=tmp_path / "out", **SIZES)
    (file,) = tmp_path.glob("out-rows-*/train.jsonl")
    file.write_text(file.read_text().replace("Human", "Person"))
    changed = file.read_bytes()
    with pytest.raises(mpo.InputError, match=r"train.jsonl: was changed after it had been written; move .* away"):
        mpo.train("dpo", ROWS, model=sft, out=tmp_path / "out", **SIZES)
    assert file.read_bytes() == changed


def test_a_thread_other_than_the_main_one_can_train(sft, tmp_path):
    """It cannot handle signals, and does not try to. The server of a notebook may run cells in such a thread."""
    results = []

    def work():
        results.append(mpo.train("dpo", ROWS, model=sft, out=tmp_path / "out", **SIZES).results["steps"])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [3]


def test_prompts_alone_with_a_chat_template(tmp_path):
    pytest.importorskip("jinja2")
    LAYOUTS["qwen3"](tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(templates.QWEN)
    rm = mpo.train("rm", ROWS, model=tmp_path / "model", out=tmp_path / "rm", epochs=0.2, held_out=0.2, **SIZES)
    sizes = {**SIZES, "minibatch": 4, "iterations": 2, "critic_warmup": 1, "max_new": 4}
    ppo = mpo.train("ppo", ["Hi", "Ho"], model=tmp_path / "model", rm=rm, out=tmp_path / "ppo", **sizes)
    assert ppo.results["prompts"] == {"kept": 2}
