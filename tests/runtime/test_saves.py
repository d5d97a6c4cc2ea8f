"""A stage that is killed and continued ends with the same bytes; a signal saves first; a damaged save is not used."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mpo.runtime.files import read_json, sha256
from tests.conftest import SMALL
from tests.support.crashes import PHASES, STAGES
from tests.support.hooks import WAIT_FOR_SIGNAL, script_with_hook
from tests.support.scripts import ROOT, run_script


def crashes(hh_run: Path, work: Path, stage: str) -> dict[str, dict[str, object]]:
    """What tests/support/crashes.py reports after killing a stage, or all of them: stage -> outcome."""
    command = [sys.executable, "-m", "tests.support.crashes", str(hh_run), str(work), stage, "0", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    return {outcome["stage"]: outcome for outcome in outcomes}


@pytest.fixture(scope="module")
def killed(hh_run, tmp_path_factory):
    """The outcome of killing every stage in each of its phases, and the folder with the logs."""
    work = tmp_path_factory.mktemp("killed")
    return crashes(hh_run, work, "all"), work


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_in_each_of_its_phases_ends_with_the_same_bytes(killed, stage):
    """Kills at random moments are in `make soak`."""
    outcomes, work = killed
    assert outcomes[stage]["same"], (work / f"{stage}-killed.log").read_text()[-2000:]
    assert outcomes[stage]["kills"] == len(PHASES)
    assert outcomes[stage]["resumed"] == 4  # each attempt after the first save, and the last one


def test_a_stage_killed_within_its_writes_ends_with_the_same_bytes(hh_run, tmp_path):
    outcome = crashes(hh_run, tmp_path, "dpo")["dpo"]
    assert outcome["same"], (tmp_path / "killed.log").read_text()[-2000:]
    assert outcome["kills"] >= 9


def hash_folder(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256(p) for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


DPO = ("--steps", 100, "--save_every", 1000, *SMALL)


def dpo_flags(hh_run: Path, out: Path) -> list[str]:
    rows = hh_run / "split" / "pairs.jsonl"
    return [str(x) for x in ("train_dpo.py", "--data", rows, "--model", hh_run / "sft", "--out", out, *DPO)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stage_that_gets_a_signal_saves_before_it_ends_and_can_be_continued(hh_run, tmp_path, number):
    out, step = tmp_path / "out", 7
    _, *flags = dpo_flags(hh_run, out)
    body = WAIT_FOR_SIGNAL.format(step=step - 1, process="os.getpid()", number=int(number))
    stderr = run_script(script_with_hook(tmp_path, "train_dpo.py", body), *flags, expect=128 + number).stderr
    assert stderr.splitlines()[-1] == (
        f"train_dpo.py: interrupted after step {step}, which is saved; the same command goes on from there"
    )
    assert "stopping after this step, which will be saved" in stderr
    assert len((out / "metrics.jsonl").read_text().splitlines()) == step
    assert [p.name for p in (out / "saves").iterdir()] == [f"step-{step:08d}"]
    assert "Traceback" not in stderr
    done = run_script(*dpo_flags(hh_run, out))
    assert f"going on after step {step}" in done.stdout
    assert not (out / "saves").exists()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 100


@pytest.fixture
def interrupted(hh_run, tmp_path):
    """The flags and the folder of a DPO stage that was killed after step 6, with two saves."""
    flags = [x if x != "1000" else "0" for x in dpo_flags(hh_run, tmp_path / "out")]
    flags[flags.index("100")] = "10"
    hooked = script_with_hook(tmp_path, "train_dpo.py", "if step == 6: os.kill(os.getpid(), signal.SIGKILL)")
    run_script(hooked, *flags[1:], expect=-signal.SIGKILL)
    names = sorted(p.name for p in (tmp_path / "out" / "saves").iterdir())
    assert names == ["step-00000005", "step-00000006"]
    return flags, tmp_path / "out"


def test_a_damaged_save_is_left_out_and_the_one_before_it_is_used(interrupted):
    flags, out = interrupted
    (newest,) = (out / "saves" / "step-00000006").glob("*.safetensors")
    content = bytearray(newest.read_bytes())
    content[-3] ^= 1
    newest.write_bytes(content)
    done = run_script(*flags)
    assert "damaged (another hash); it is not used, and kept as damaged-step-00000006-" in done.stderr
    assert "going on after step 5" in done.stdout


@pytest.mark.parametrize(("pattern", "size"), [("*.safetensors", 0), ("*.safetensors", 10_000), ("about.json", 100)])
def test_a_stage_whose_saves_are_all_truncated_starts_from_the_beginning(interrupted, pattern, size):
    flags, out = interrupted
    for path in (out / "saves").rglob(pattern):
        os.truncate(path, size)
    done = run_script(*flags)
    assert done.stderr.count("it is not used") == 2
    assert "going on" not in done.stdout
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 10


def test_a_stage_goes_on_with_flags_that_change_only_rounding(interrupted):
    flags, out = interrupted
    done = run_script(*flags, "--microbatch", "4", "--threads", "2", "--recompute", "true")
    assert "going on after step 6" in done.stdout
    assert read_json(out / "manifest.json")["config"]["microbatch"] == 4


def test_saves_made_with_other_flags_are_kept_and_the_flags_that_differ_are_named(interrupted):
    flags, out = interrupted
    before = hash_folder(out)
    done = run_script(*flags, "--beta", "0.1", expect=2)
    assert done.stderr == (
        f"train_dpo.py: error: --out {out}: holds the saves of an unfinished stage, but --beta was 0.5 and is now 0.1. "
        "Go on with the old flags and inputs, take another folder (RUN), or discard what is there with REDO=1 (without "
        "make: --overwrite true)\n"
    )
    assert hash_folder(out) == before
    assert "going on after step 6" in run_script(*flags).stdout


def test_saves_made_from_other_rows_are_kept(interrupted, tmp_path):
    flags, out = interrupted
    before = hash_folder(out)
    rows = tmp_path / "rows.jsonl"
    at = flags.index("--data") + 1
    rows.write_bytes(b"".join(Path(flags[at]).read_bytes().splitlines(keepends=True)[:-1]))
    done = run_script(*flags, "--data", rows, expect=2)
    assert "the content of its input data has changed (pairs.jsonl and 1 more files)" in done.stderr
    assert hash_folder(out) == before


def test_saves_are_given_up_on_a_word(interrupted):
    flags, out = interrupted
    done = run_script(*flags, "--beta", "0.1", "--overwrite", "true")
    assert "discards the saves of an unfinished stage" in done.stdout
    assert "--beta was 0.5 and is now 0.1" in done.stdout
    assert "going on" not in done.stdout
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()]
    assert steps == list(range(10))


def test_a_stage_that_is_interrupted_says_what_the_same_command_does(hh_run, tmp_path):
    """At once, since the second signal does not wait for a save."""
    out, twice = (
        tmp_path / "out",
        "if step == 2: os.kill(os.getpid(), signal.SIGTERM), os.kill(os.getpid(), signal.SIGTERM)",
    )
    hooked = script_with_hook(tmp_path, "train_dpo.py", twice)
    _, *flags = dpo_flags(hh_run, out)
    stopped = run_script(hooked, *flags, expect=128 + signal.SIGTERM)
    assert stopped.stderr.splitlines()[-1] == "train_dpo.py: interrupted; the same command begins this stage again"
    flags[flags.index("1000")] = "0"  # a save after every step
    stopped = run_script(hooked, *flags, expect=128 + signal.SIGTERM)
    assert stopped.stderr.splitlines()[-1] == "train_dpo.py: interrupted; the same command goes on after step 2"


STOPPED_WHILE_SCORING = """
import os, runpy, signal, sys
sys.path.insert(0, {root!r})
from mpo.model import scoring

each_batch = scoring.each_batch

def stop(*arguments):
    scoring.each_batch = each_batch  # a second signal would always be obeyed
    os.kill(os.getpid(), signal.SIGTERM)
    return each_batch(*arguments)

scoring.each_batch = stop
sys.argv[0] = "train_rm.py"
runpy.run_path({root!r} + "/train_rm.py", run_name="__main__")
"""


def test_a_signal_stops_the_scoring_after_training_at_once_also_in_a_resumed_stage(hh_run, tmp_path):
    """The second run has no step left to do."""
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED_WHILE_SCORING.format(root=str(ROOT)))
    flags = [
        "--data",
        hh_run / "data",
        "--model",
        hh_run / "sft",
        "--out",
        tmp_path / "rm",
        "--batch",
        8,
        "--epochs",
        1,
    ]
    for _ in range(2):
        stopped = run_script(script, *flags, expect=128 + signal.SIGTERM)
        assert "interrupted; the same command goes on after step" in stopped.stderr.splitlines()[-1]
