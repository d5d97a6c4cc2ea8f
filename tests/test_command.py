"""The command `mpo`: what it lists, runs and refuses. tests/test_wheel.py runs it outside the checkout."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint

import pytest

from mpo.__main__ import COMMANDS, STAGES, main
from mpo.runtime.files import read_json
from tests.support.scripts import ROOT, run_script

MPO = "mpo/__main__.py"


def test_help_has_a_line_for_each_command(capsys, monkeypatch):
    shown = []
    for words in ([], ["--help"], ["-h"], ["help"]):
        monkeypatch.setattr(sys, "argv", ["mpo", *words])
        main()
        shown.append(capsys.readouterr().out)
    assert len(set(shown)) == 1
    for name, (_, about) in COMMANDS.items():
        assert f"\n  {name:10} {about}\n" in shown[0]
    assert max(map(len, shown[0].splitlines())) <= 100


def test_help_imports_no_torch():
    code = "import sys, mpo.__main__; sys.argv[1:] = ['--help']; mpo.__main__.main(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("kernels", "launch")])
def test_each_command_explains_itself_under_its_own_name(name):
    done = run_script(MPO, name, "--help")
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith(f"usage: mpo {name} ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dpoo"], "mpo: error: dpoo: unknown command; did you mean dpo?"),
        (["train_ppo.py"], "mpo: error: train_ppo.py: unknown command; mpo --help lists all commands"),
        (["--version"], "mpo: error: --version: unknown command; "),
        (["dpo", "--beat", 1], "mpo dpo: error: unknown flag --beat; did you mean --beta?"),
        (["ppo"], "mpo ppo: error: the following flags are required: --prompts, --model, --ref, --rm, --out"),
        (["report"], "mpo report: error: usage: mpo report RUN"),
        (["launch", 2], "mpo launch: error: expected a number of processes and a command"),
        (["launch", 2, "dpoo"], "mpo: error: dpoo: unknown command; did you mean dpo?"),
        (["launch", "two", "dpo"], "mpo launch: error: number of processes two: not a whole number in digits"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(words, message):
    done = run_script(MPO, *words, expect=2)
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(message)


def test_a_stage_writes_what_its_script_writes(tmp_path):
    flags = ("--train", 8, "--test", 4, "--seed", 3)
    run_script(MPO, "data", *flags, "--out", tmp_path / "command")
    run_script("prepare_data.py", *flags, "--out", tmp_path / "script")
    command, script = (read_json(tmp_path / name / "manifest.json") for name in ("command", "script"))
    assert command["stage"] == script["stage"] == "prepare_data"
    assert {k: v for k, v in command["outputs"].items() if k != "stage.json"} == {
        k: v for k, v in script["outputs"].items() if k != "stage.json"
    }


def test_a_tool_that_writes_a_folder_signs_with_its_own_name(hh_run, tmp_path):
    flags = ("--data", hh_run / "data" / "test.jsonl", "--rm", hh_run / "rm", "--device", "cpu", "--threads", 1)
    run_script(MPO, "score", *flags, "--out", tmp_path / "scores")
    assert read_json(tmp_path / "scores" / "manifest.json")["stage"] == "score"


def test_every_stage_of_the_checkout_is_a_command():
    scripts = {path.stem for path in ROOT.glob("*.py")} - {"chat"}
    assert {module.rpartition(".")[2] for module, _ in STAGES.values()} == scripts


def test_the_package_declares_the_command():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert [EntryPoint(name, at, "console_scripts").load() for name, at in scripts.items()] == [main]


def test_torchrun_starts_a_stage_in_several_processes(tmp_path, hh_run):
    """As docs/library.md says. (tests/test_wheel.py has `mpo launch`.)"""
    flags = ("--data", hh_run / "split" / "pairs.jsonl", "--model", hh_run / "sft", "--out", tmp_path / "out")
    sizes = ("--batch", 8, "--steps", 1, "--threads", 1, "--device", "cpu")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    run_script(*torchrun, "-m", "mpo", "dpo", *flags, *sizes)
    assert read_json(tmp_path / "out" / "manifest.json")["processes"] == 2
