"""One, two and four processes, with replicated or sharded models, give the same losses, samples and weights."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mpo.data.tokenizer import load_tokenizer
from mpo.model.checkpoint import save_model
from mpo.runtime import distributed
from mpo.runtime.errors import InputError
from tests.conftest import small_model
from tests.support.group import CASES, case_name
from tests.support.hooks import WAIT_FOR_SIGNAL, script_with_hook
from tests.support.scripts import ROOT, run_script

DPO = "train_dpo.py --data {run}/split/pairs.jsonl --model {run}/sft --batch 8 --microbatch 4 --steps 60"
SPLIT = "split_data.py --data {run}/data --rm {run}/rm --microbatch 9"
EVAL = (
    "eval.py --data {run}/data --rm {run}/rm --policies sft={run}/sft,dpo={run}/dpo --prompts 11 --batch 4 --max_new 12"
)


def command(text: str, run: Path, out: Path, *more: object) -> list[str]:
    return [*text.format(run=run).split(), "--out", str(out), "--threads", "1", *map(str, more)]


def run_processes(count: int, *flags: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    return run_script("-m", "mpo.runtime.launch", count, *flags, expect=expect)


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def group(hh_run, tmp_path_factory):
    """The folder with all cases of tests/support/group.py."""
    work = tmp_path_factory.mktemp("group")
    run_script("-m", "tests.support.group", hh_run, work)
    return work


def assert_same_run(one: Path, other: Path) -> None:
    """Check that the metrics and weights of two runs are equal up to rounding."""
    steps, other_steps = lines(one / "metrics.jsonl"), lines(other / "metrics.jsonl")
    assert len(steps) == len(other_steps)
    for a, b in zip(steps, other_steps, strict=True):
        if a["step"] == 0:
            a.pop("accuracy", None)  # all log-ratios are 0 up to rounding, so it depends on rounding alone
            b.pop("accuracy", None)
        assert a == pytest.approx(b, rel=1e-3, abs=2e-5)
    weights, other_weights = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == other_weights.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(other_weights[key], weight, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(("stage", "count", "sharded"), CASES)
def test_several_processes_train_the_same_model_as_one(group, stage, count, sharded):
    out = group / case_name(stage, count, sharded)
    assert_same_run(group / case_name(stage, 1, False), out)
    assert json.loads((out / "manifest.json").read_text())["processes"] == count


@pytest.mark.parametrize("shard", [False, True])
def test_the_split_and_the_evaluation_divide_rows_that_are_no_multiple_of_the_processes(hh_run, tmp_path, shard):
    for stage, text in (("split", SPLIT), ("eval", EVAL)):
        run_script(*command(text, hh_run, tmp_path / stage))
        run_processes(3, *command(text, hh_run, tmp_path / f"{stage}-3", "--shard", shard))
    one, three = lines(tmp_path / "split" / "scores.jsonl"), lines(tmp_path / "split-3" / "scores.jsonl")
    assert [(r["id"], r["part"]) for r in one] == [(r["id"], r["part"]) for r in three]
    for a, b in zip(one, three, strict=True):
        assert a["chosen"] == pytest.approx(b["chosen"], abs=2e-5)
    for policy in ("sft", "dpo"):
        one, three = (lines(tmp_path / e / f"responses-{policy}.jsonl") for e in ("eval", "eval-3"))
        assert [r["response"] for r in one] == [r["response"] for r in three]
        assert [r["kl"] for r in one] == pytest.approx([r["kl"] for r in three], abs=2e-5)


def test_a_run_stopped_with_two_processes_continues_with_four_and_with_one(hh_run, tmp_path):
    run_script(*command(DPO, hh_run, tmp_path / "uninterrupted"))
    out = tmp_path / "out"
    for count in (2, 4):
        steps = 10 * count
        _, *flags = command(DPO, hh_run, out, "--shard", "true", "--save_every", 1000)
        body = WAIT_FOR_SIGNAL.format(step=steps - 1, process="os.getppid()", number=int(signal.SIGTERM))
        hooked = script_with_hook(tmp_path, "train_dpo.py", body)
        stderr = run_processes(count, hooked, *flags, expect=128 + signal.SIGTERM).stderr
        assert stderr.count("stopping after this step, which will be saved") == 1, stderr
        assert stderr.count(f"interrupted after step {steps}, which is saved; the same command goes on") == 1, stderr
        assert len(lines(out / "metrics.jsonl")) == steps
        assert max(p.name for p in (out / "saves").iterdir()) == f"step-{steps:08d}"
    done = run_script(*command(DPO, hh_run, out))
    assert f"going on after step {steps}" in done.stdout
    assert_same_run(tmp_path / "uninterrupted", out)


def test_a_model_with_the_weights_of_other_families_is_sharded_stopped_and_continued(hh_run, tmp_path):
    """Gemma 3 with biases has every kind of weight: four norms, norms of heads, biases, a tied head."""
    tokenizer = load_tokenizer(hh_run / "sft")
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    gemma = {"model_type": "gemma3_text", "hidden_act": "gelu_pytorch_tanh", "attention_bias": True}
    layers = {
        "sliding_window": 20,
        "layer_types": ("sliding_attention", "full_attention"),
        "rope_local_base_freq": 99.0,
    }
    model = small_model(vocab_size=tokenizer.size, query_pre_attn_scalar=9, **ids, **gemma, **layers)
    save_model(tmp_path / "gemma", model, tokenizer)
    data = ("--data", hh_run / "split" / "pairs.jsonl", "--model", tmp_path / "gemma", "--threads", 1)
    flags = (*data, "--steps", 6, "--batch", 4, "--microbatch", 4, "--save_every", 1000)
    run_script("train_dpo.py", *flags, "--out", tmp_path / "one")
    body = WAIT_FOR_SIGNAL.format(step=2, process="os.getppid()", number=int(signal.SIGTERM))
    hooked, out = script_with_hook(tmp_path, "train_dpo.py", body), ("--out", tmp_path / "out")
    run_processes(2, hooked, *flags, *out, "--shard", "true", expect=128 + signal.SIGTERM)
    assert "going on after step 3" in run_script("train_dpo.py", *flags, *out).stdout
    assert_same_run(tmp_path / "one", tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("gemma", "out"))
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []  # all of them learn


def test_a_process_that_dies_ends_the_job_with_one_line_and_the_run_can_be_continued(hh_run, tmp_path):
    script, *flags = command(DPO, hh_run, tmp_path / "out", "--save_every", 0)
    body = "if step == 5 and not distributed.is_main(): os.kill(os.getpid(), signal.SIGKILL)"
    stderr = run_processes(2, script_with_hook(tmp_path, script, body), *flags, expect=1).stderr.splitlines()
    messages = [line for line in stderr if "it/s" not in line and line.strip()]  # without progress bars
    assert messages == [
        "launch.py: stopped: process 1 of 2 was killed (SIGKILL); the same command goes on from the last save, if any"
    ]
    assert "going on after step 5" in run_processes(2, script, *flags).stdout


BEGIN = f"""
import atexit, os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from mpo.runtime import distributed, signals
from mpo.runtime.errors import InputError
from mpo.runtime.entry import run_plain

def main(argv):
    distributed.start(False)
"""


def test_processes_exit_without_shutting_the_interpreter_down(tmp_path):
    """During a shutdown of the interpreter, a thread of gloo sometimes aborts the process."""
    script = tmp_path / "script.py"
    script.write_text(BEGIN + "    atexit.register(os.abort)\n    print('done')\nrun_plain(main)\n")
    printed = run_processes(2, str(script)).stdout.splitlines()
    assert [line for line in printed if not line.startswith("[Gloo]")] == ["done"]  # older versions print connections


KILLED = "launch.py: stopped: process 1 of 2 was killed (SIGABRT); the same command goes on from the last save, if any"
LOADING = "while True: time.sleep(0.01)"
TRAINING = """signals.defer(True)
        while not signals.received():
            time.sleep(0.01)
        os._exit(signals.SILENT)"""


JOINING = """
def refused(*args, **kwargs):
    raise RuntimeError("Gloo connectFullMesh failed with [...] Connection closed by peer [127.0.0.1]:27342")

def main(argv):
    if os.environ["RANK"] == "1":
        os.abort()
    distributed.dist.init_process_group = refused
    distributed.start(False)

run_plain(main)
"""


def test_a_process_that_dies_while_another_one_joins_is_named_in_one_line(tmp_path):
    """The message is gloo's, seen when a process died as soon as it had joined, on a busy machine."""
    script = tmp_path / "script.py"
    start, _ = BEGIN.split("def main")
    script.write_text(start + JOINING)
    assert run_processes(2, str(script), expect=1).stderr.splitlines() == [KILLED]


@pytest.mark.parametrize("survivor", [LOADING, TRAINING], ids=["loading", "training"])
@pytest.mark.parametrize(
    ("second", "status", "message"),
    [("os.abort()", 1, KILLED), ("raise InputError('a wrong row')", 2, "script.py: error: a wrong row")],
    ids=["killed", "refused"],
)
def test_a_process_that_is_ended_for_anothers_death_says_nothing(second, status, message, survivor, tmp_path):
    """The launcher ends the survivor with SIGTERM, the same signal that a user sends to stop a stage."""
    script = tmp_path / "script.py"
    script.write_text(BEGIN + f"    if distributed.is_main():\n        {survivor}\n    {second}\nrun_plain(main)\n")
    lines_of_error = run_processes(2, str(script), expect=status).stderr.splitlines()
    assert [line for line in lines_of_error if not line.startswith("[Gloo]")] == [message]


def test_wrong_input_is_reported_once_and_not_by_every_process(hh_run, tmp_path):
    flags = command(DPO, hh_run, tmp_path / "out", "--model", tmp_path / "nowhere")
    done = run_processes(2, *flags, expect=2)
    assert done.stderr.splitlines() == [
        f"train_dpo.py: error: --model {tmp_path / 'nowhere'}: no such file or folder; has the stage that writes it "
        "run?"
    ]
    done = run_processes(2, *command(DPO, hh_run, tmp_path / "out", "--bta", 1), expect=2)
    assert done.stderr.splitlines() == ["train_dpo.py: error: unknown flag --bta; did you mean --beta?"]
    done = run_processes(3, *command(DPO, hh_run, tmp_path / "out"), expect=2)
    assert "8 is not a multiple of the 3 processes" in done.stderr.splitlines()[-1]


def test_diverging_weights_stop_all_processes_with_one_line(hh_run, tmp_path):
    flags = command(DPO, hh_run, tmp_path / "out", "--lr", "1e30", "--warmup", 0, "--save_every", 0)
    for shard in (False, True):
        done = run_processes(2, *flags, "--shard", str(shard), expect=1)
        last = done.stderr.splitlines()[-1]
        assert last.startswith("train_dpo.py: stopped: ")
        assert "is not finite" in last
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two", "RANK": "0"}])
def test_a_part_of_what_torchrun_sets_is_refused_in_one_line(monkeypatch, environment):
    """Some batch systems set WORLD_SIZE by themselves."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"^WORLD_SIZE={environment['WORLD_SIZE']}: not set by torchrun"):
        distributed.start(False)
