"""--log: every step goes to the tracker once, also over an interruption, and a tracker never stops a stage."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import pytest

from mpo.config import SFTConfig
from mpo.runtime.errors import InputError, UpToDate
from mpo.runtime.files import read_json
from mpo.runtime.manifest import ROUNDING_ONLY
from mpo.runtime.stage import Stage
from mpo.runtime.trackers import TRACKERS, check
from mpo.tools.verify import verify
from tests.conftest import SMALL
from tests.support.scripts import run_script

# Each stand-in appends what its real package would be told, one JSON list a line, to the file calls.jsonl beside it.
TELL = """
import json, pathlib
def tell(*what):
    with (pathlib.Path(__file__).parent / "calls.jsonl").open("a") as f:
        f.write(json.dumps(what) + "\\n")
    if (pathlib.Path(__file__).parent / f"broken-{what[0]}").exists():
        raise OSError("no connection\\nat all")
"""
STAND_INS = {
    "tensorboard": "",  # only looked for; the writer is torch's
    "trackio": TELL
    + """
def init(project, name, group, config, resume, embed):
    assert (project, resume, embed) == ("mpo", "allow", False)
    tell("open", name, config["seed"])
def log(metrics, step):
    tell("send", step, metrics)
def finish():
    tell("close")
""",
    "wandb": TELL
    + """
def Settings(console):
    assert console == "off"
class Run:
    def log(self, metrics, step):
        tell("send", step, metrics)
    def finish(self):
        tell("close")
def init(project, id, name, group, config, resume, dir, settings):
    assert (project, resume, name) == ("mpo", "allow", f"{group}/sft")
    tell("open", id, config["seed"])
    return Run()
""",
    "writer": TELL
    + """
class SummaryWriter:
    def __init__(self, folder):
        tell("open", pathlib.Path(folder).name, 1)
        assert pathlib.Path(folder).parent.name == "tensorboard"
    def add_scalar(self, name, value, step):
        tell("send", step, {name: value})
    def flush(self):
        pass
    def close(self):
        tell("close")
""",
}


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Put the stand-ins in the place of the packages; returns a function that reads what they were told."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name, code in STAND_INS.items():
        (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    for name in STAND_INS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", importlib.import_module("writer"))
    yield lambda: [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
    for name in STAND_INS:
        sys.modules.pop(name, None)


def open_stage(tmp_path: Path, log: str, **flags: object) -> Stage:
    config = SFTConfig(out=str(tmp_path / "run" / "sft"), data="data", tokenizer="t", log=log, **flags)  # type: ignore
    return Stage(config, {}, config.out, False)


def logged(stage: Stage) -> list[int]:
    return [json.loads(line)["step"] for line in (stage.out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", TRACKERS)
def test_every_step_is_sent_once_and_the_run_is_closed_at_the_end(tmp_path, calls, name):
    check(name)
    stage = open_stage(tmp_path, name)
    stage.log(0, {"loss": 2.0})
    stage.log(1, {"loss": 1.0, "lr": math.nan})
    stage.finish()
    (kind, run, seed), *sent, closed = calls()
    assert (kind, seed) == ("open", 1)
    assert run.startswith("run-sft-")
    assert sent == [["send", 0, {"loss": 2.0}], ["send", 1, {"loss": 1.0}]]  # without what is not a number
    assert closed == ["close"]
    assert sorted(p.name for p in stage.out.iterdir()) == ["manifest.json", "metrics.jsonl", "stage.json"]
    assert set(read_json(stage.manifest)["outputs"]) == {"stage.json"}


@pytest.mark.parametrize("name", TRACKERS)
def test_a_stage_that_goes_on_stays_in_the_same_run_and_sends_no_step_twice(tmp_path, calls, name):
    killed = open_stage(tmp_path, name)
    for step in range(3):
        killed.log(step, {"loss": 1.0})
    killed.lock.release()
    resumed = open_stage(tmp_path, name)
    resumed.forget(1)  # the last save was after step 0
    for step in range(1, 5):
        resumed.log(step, {"loss": 1.0})
    assert logged(resumed) == [1, 2, 3, 4]
    opened = [call[1] for call in calls() if call[0] == "open"]
    assert len(opened) == 2
    assert opened[0] == opened[1]
    assert [call[1] for call in calls() if call[0] == "send"] == [0, 1, 2, 3, 4]


def test_a_stage_with_other_flags_begins_another_run(tmp_path, calls):
    first = open_stage(tmp_path, "wandb")
    first.log(0, {"loss": 1.0})
    first.lock.release()
    for changes in ({"seed": 2}, {}):
        stage = open_stage(tmp_path, "wandb", **changes)
        stage.log(0, {"loss": 1.0})
        stage.lock.release()
    opened = [call[1] for call in calls() if call[0] == "open"]
    assert len(set(opened)) == 3
    (first.out / ".tracker").write_text('{"step": ')  # damaged
    open_stage(tmp_path, "wandb").log(0, {"loss": 1.0})
    assert [call[1] for call in calls() if call[0] == "send"] == [0, 0, 0, 0]


@pytest.mark.parametrize("name", TRACKERS)
@pytest.mark.parametrize("when", ["open", "send", "close"])
def test_a_tracker_that_fails_gets_one_note_and_the_stage_goes_on(tmp_path, calls, capsys, name, when):
    (tmp_path / "packages" / f"broken-{when}").touch()
    stage = open_stage(tmp_path, name)
    for step in range(3):
        stage.log(step, {"loss": 1.0})
    stage.finish()
    assert logged(stage) == [0, 1, 2]
    assert stage.manifest.exists()
    notes = capsys.readouterr().err.strip().splitlines()
    assert notes == [
        f"--log {name}: failed (OSError: no connection); the stage goes on without it, and metrics.jsonl has every step"
    ]


def test_following_a_run_is_no_change_of_its_recipe(tmp_path, calls):
    assert "log" in ROUNDING_ONLY
    stage = open_stage(tmp_path, "none")
    stage.finish()
    with pytest.raises(UpToDate):
        open_stage(tmp_path, "wandb")
    unfinished = Stage(
        SFTConfig(out=str(tmp_path / "run" / "b"), data="d", tokenizer="t", log="wandb"),
        {},
        str(tmp_path / "run" / "b"),
        False,
    )
    unfinished.log(0, {"loss": 1.0})
    assert verify(tmp_path / "run")["sft"].state == "good"


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_one_line_with_the_command_before_any_training(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if "editable" not in str(f)])
    monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    with pytest.raises(InputError) as refusal:
        check(name)
    command = f"{sys.executable} -m pip install {name}"
    assert str(refusal.value) == f"--log {name}: needs the {name} package; install it with: {command}"


def test_a_folder_that_is_called_as_the_package_is_not_taken_for_it(tmp_path, monkeypatch):
    """wandb keeps its files in a folder `wandb` of the working directory."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(InputError, match="needs the wandb package"):
        check("wandb")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed here")
def test_a_stage_and_the_check_of_make_refuse_a_missing_package(tmp_path):
    flags = ["--out", tmp_path / "sft", "--data", tmp_path, "--tokenizer", tmp_path, "--log", "wandb", *SMALL]
    done = run_script("train_sft.py", *flags, expect=2)
    assert done.stderr.startswith("train_sft.py: error: --log wandb: needs the wandb package; install it with: ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "sft").exists()
