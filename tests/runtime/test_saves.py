"""A stage that is killed and continued ends with the same bytes; a signal saves first; a damaged save is not used."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import SMALL
from tests.support.crashes import PHASES, STAGES
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


DPO = ("--steps", 100, "--save_every", 1000, *SMALL)


def dpo_flags(hh_run: Path, out: Path) -> list[str]:
    rows = hh_run / "split" / "pairs.jsonl"
    return [str(x) for x in ("train_dpo.py", "--data", rows, "--model", hh_run / "sft", "--out", out, *DPO)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stage_that_gets_a_signal_saves_before_it_ends_and_can_be_continued(hh_run, tmp_path, number):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, *dpo_flags(hh_run, out)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number
    step = len((out / "metrics.jsonl").read_text().splitlines())
    assert stderr.splitlines()[-1] == (
        f"train_dpo.py: interrupted after step {step}, which is saved; the same command goes on from there"
    )
    assert [p.name for p in (out / "saves").iterdir()] == [f"step-{step:08d}"]
    assert "Traceback" not in stderr
    done = run_script(*dpo_flags(hh_run, out))
    assert f"going on after step {step}" in done.stdout
    assert not (out / "saves").exists()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 100


@pytest.fixture
def interrupted(hh_run, tmp_path):
    """The flags and the folder of a DPO stage that was killed after step 6, with two saves."""
    code = (
        "import sys, runpy, os, signal\n"
        "from mpo.runtime import stage\n"
        "log = stage.Stage.log\n"
        "def stop(self, step, metrics):\n"
        "    log(self, step, metrics)\n"
        "    if step == 6: os.kill(os.getpid(), signal.SIGKILL)\n"
        "stage.Stage.log = stop\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path.insert(0, '.')\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    flags = [x if x != "1000" else "0" for x in dpo_flags(hh_run, tmp_path / "out")]
    flags[flags.index("100")] = "10"
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
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
    assert "damaged (another hash); it is left out" in done.stderr
    assert "going on after step 5" in done.stdout


@pytest.mark.parametrize(("pattern", "size"), [("*.safetensors", 0), ("*.safetensors", 10_000), ("about.json", 100)])
def test_a_stage_whose_saves_are_all_truncated_starts_from_the_beginning(interrupted, pattern, size):
    flags, out = interrupted
    for path in (out / "saves").rglob(pattern):
        os.truncate(path, size)
    done = run_script(*flags)
    assert done.stderr.count("it is left out") == 2
    assert "going on" not in done.stdout
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 10


def test_saves_made_with_other_flags_are_not_used(interrupted):
    flags, out = interrupted
    done = run_script(*flags, "--beta", "0.1")
    assert done.stderr.count("made with other flags or inputs; it is left out") == 2
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()]
    assert steps == list(range(10))
