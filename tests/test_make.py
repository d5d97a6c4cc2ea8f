"""The Makefile: its help, what it refuses before anything runs, and the commands that it runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import others
from benchmarks.run import CONTESTS
from tests.support.makefile import commands, make, resolved
from tests.support.scripts import ROOT

FILES = [ROOT / "Makefile", *sorted((ROOT / "make").glob("*.mk"))]
PAGE = (ROOT / "docs" / "pipeline.md").read_text()

needs_venv = pytest.mark.skipif(not (ROOT / ".venv/bin/python").exists(), reason="make runs the stages with .venv")


def test_bare_make_prints_the_help_and_starts_nothing(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "make", tmp_path / "make")
    done = make(cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "make hh" in done.stdout
    assert len(done.stdout.splitlines()) <= 35
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Makefile", "make"]
    assert make("help", cwd=tmp_path).stdout == done.stdout


def test_the_help_names_every_goal_and_every_variable():
    shown = make("help").stdout
    texts = [path.read_text() for path in FILES]
    goals = {goal for text in texts for line in re.findall(r"^goals \+= (.*)", text, re.M) for goal in line.split()}
    assert {"hh", "verify", "bench", "setup", "soak"} <= goals
    taken = " ".join(re.findall(r"^run_takes +:= (.*)", "\n".join(texts), re.M)).split()
    assert "SHARD" in taken
    names = (goals | set(taken)) - {"help", "pipeline", "$(stage_flags)"}
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", shown)] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hh", "Quick=1"], "Quick=1: unknown variable of 'make hh'; did you mean QUICK?"),
        (["hh", "POLICY=dpo"], "POLICY=dpo: unknown variable of 'make hh'; did you mean POLICIES?"),
        (
            ["tldr", "dpoo_FLAGS=--beta 1"],
            "dpoo_FLAGS=--beta 1: unknown variable of 'make tldr'; did you mean dpo_FLAGS?",
        ),
        (["policy-mpo", "SED=2"], "did you mean SEED?"),
        (["hh", "KILLS=3"], "KILLS=3: unknown variable of 'make hh'"),
        (["ablate", "POLICIES=mpo"], "did you mean POLICY?"),
        (["ablate", "LOSS=ipo"], "LOSS=ipo: unknown variable of 'make ablate'"),
        (["Seed=2"], "Seed=2: unknown variable of 'make help'; did you mean SEED?"),
        (["tests"], "tests: unknown goal; did you mean test?"),
        (["policy-revresed"], "policy-revresed: unknown goal; did you mean policy-reversed?"),
        (["hh", "POLICIES=sft mpoo"], "unknown policy mpoo; did you mean mpo?"),
        (["hh", "RMS=rm better"], "RMS=rm better: must be names such as rm, rm-2, rm-3"),
        (["hh", "RUN=two words"], "RUN=two words: must be a name without spaces"),
        (["hh", "QUICK=0"], "QUICK=0: must be 1, or left out"),
        (["hh", "NPROC=two"], "NPROC=two: must be a number of processes"),
        (["hh", "LORA=yes"], "LORA=yes: must be a number"),
        (["hh", "BF16=yes"], "BF16=yes: must be 1, or left out"),
        (["hh", "FROM=runs/nowhere"], "FROM=runs/nowhere: no finished stage there"),
        (["pipeline", "TASK=foo"], "TASK=foo: must be hh or tldr"),
        (["hh", "TASK=tldr"], "`make hh` sets the task; run `make tldr`"),
    ],
)
def test_a_wrong_name_is_refused_in_one_line_with_the_nearest(words, message):
    done = make(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["hh", "dpo-all_FLAGS=--beta 0.1", "rm-2_FLAGS=--lr 1e-4", "KERNELS=reference", "PYTHON=python3"],
        ["ablate", "POLICY=mpo", "SEEDS=1", "TASK=tldr"],
        ["soak", "KILLS=1", "CASES=9"],
        ["claims", "REDUCED=1", "CLAIMS_FLAGS=--grids page"],
    ],
)
def test_a_goal_takes_its_own_variables(words):
    done = make("-n", *words)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_makes_of_an_experiment_see_its_variables_but_no_unknown_ones():
    variables = ["GRID=losses", "POLICY=mpo", "RUN=runs/x", "LOSS=ipo", "mpo_FLAGS=--lr 1e-4"]
    assert make("-n", "policy-mpo", *variables, level=1).returncode == 0
    done = make("-n", "policy-mpo", *variables, "PPO_FLAG=--lr 1", level=1)
    assert done.returncode == 2
    assert "did you mean PPO_FLAGS?" in done.stderr


@needs_venv
@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("RM_FLAGS=--lora_rank yes", "train_rm.py: error: --lora_rank yes: not a whole number"),
        ("LOSS=sgimoid", "train_dpo.py: error: --loss sgimoid: unknown loss 'sgimoid'; did you mean sigmoid?"),
        ("mpo_FLAGS=--lr fast", "train_ppo.py: error: --lr fast: not a number"),
        ('SFT_FLAGS=--lr "1', "train_sft.py: error: train_sft.py --out "),
        ("EVAL_FLAGS=--promts 9", "eval.py: error: unknown flag --promts; did you mean --prompts?"),
    ],
)
def test_a_wrong_flag_of_any_stage_is_refused_before_the_first_one(tmp_path, variable, message):
    run = tmp_path / "run"
    done = make("-o", ".venv/.ready", "pipeline", f"RUN={run}", variable)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not run.exists()


@needs_venv
def test_a_finished_stage_with_other_flags_is_refused_before_the_first_one_unless_redo_is_set(tmp_path):
    words = ("-o", ".venv/.ready", f"RUN={tmp_path}", "QUICK=1", "DATA=builtin")
    assert make(*words, "policy-data").returncode == 0
    stamp = (tmp_path / "data" / "manifest.json").stat().st_mtime_ns
    changed = "TOKENIZER_FLAGS=--vocab 300", "DATA_FLAGS=--train 200"
    done = make(*words, "pipeline", *changed)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        f"prepare_data.py: error: --out {tmp_path}/data: holds a finished stage, but --train was 400 and is now 200. "
    )
    assert (tmp_path / "data" / "manifest.json").stat().st_mtime_ns == stamp
    assert not (tmp_path / "tokenizer").exists()
    done = make(*words, "policy-data", *changed, "REDO=1")
    assert done.returncode == 0, done.stderr
    assert "data: 200 training and 40 test pairs" in done.stdout


@needs_venv
def test_a_file_of_data_that_is_replaced_by_an_older_one_is_noticed(tmp_path):
    rows, words = tmp_path / "my rows.jsonl", ("-o", ".venv/.ready", f"RUN={tmp_path}/run", "policy-data")
    lines = [{"prompt": f"\n\nHuman: {i}?\n\nAssistant:", "chosen": " yes", "rejected": " no"} for i in range(20)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert make(*words, f"DATA={rows}").returncode == 0
    assert make(*words, f"DATA={rows}").stdout == ""
    new = tmp_path / "new"
    new.write_text(rows.read_text().replace("yes", "Yes"))  # of the same size
    shutil.copystat(rows, new)
    new.replace(rows)
    done = make(*words, f"DATA={rows}")
    assert done.returncode == 2
    assert "holds a finished stage, but the content of its input data has changed (my rows.jsonl)" in done.stderr
    rows.write_text(rows.read_text().replace("Yes", "yes"))  # a new time, the old content
    done = make(*words, f"DATA={rows}")
    assert done.stdout.splitlines()[1:] == [f"{tmp_path}/run/data: is finished, with these flags and inputs"]
    assert make(*words, f"DATA={rows}").stdout == ""


@needs_venv
def test_a_checkout_in_a_folder_with_a_space_shares_the_stages_of_another_run(tmp_path):
    checkout = tmp_path / "a checkout"
    (checkout / ".venv").mkdir(parents=True)
    for path in [*ROOT.glob("[!.]*"), *(ROOT / ".venv").glob("[!.]*")]:
        (checkout / path.relative_to(ROOT)).symlink_to(path)
    for name in (".runtime", ".ready"):  # newer than everything, so that nothing is installed
        (checkout / ".venv" / name).touch()
    words = ("-o", ".venv/.ready", "policy-data", "QUICK=1", "DATA=builtin")
    assert make(*words, "RUN=one", cwd=checkout).returncode == 0
    done = make(*words, "RUN=two", "FROM=one", cwd=checkout)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (checkout / "two" / "data").resolve() == checkout / "one" / "data"


NAMES = (
    "a b",
    "a  b",
    "a:b",
    "a&b",
    "a;b",
    "it's",
    'a"b',
    "a(b)",
    "$(shell id)",
    "`id`",
    "a|b",
    "a>b",
    "a*",
    "a#b",
    "a%b",
)
NAMES += ("a=b", "-a", "~a", "a\\b", "a[b]", "{a,b}", "a!b", "a?b", "\u00e4", "a,b", "a+b@c")


@pytest.mark.parametrize(
    "variable", ["RUN", "DATA", "TEST_DATA", "MODEL", "FROM", "STAGE", "LOSS", "SEED", "DEVICE", "KERNELS", "RMS"]
)
def test_any_name_is_quoted_or_refused_in_one_line(variable):
    accepted = []
    for name in NAMES:
        goal = ("chat",) if variable == "STAGE" else ("-B", "runs/hh/sft/manifest.json")
        goal = ("-B", "--", f"{name}/sft/manifest.json") if variable == "RUN" else goal
        done = make("-n", f"{variable}={name}", *goal)
        if done.returncode:
            assert f"{variable}={name}: " in done.stderr
            assert len(done.stderr.splitlines()) == 1
            continue
        accepted.append(name)
        run = [line for line in done.stdout.splitlines() if re.search(r"python \w+\.py ", line)]
        words = {word for line in run for word in shlex.split(line)}
        form = {"RUN": f"{name}/sft", "STAGE": f"runs/hh/{name}", "KERNELS": f"MPO_KERNELS={name}"}.get(variable, name)
        assert form in words or variable in ("LOSS", "RMS", "FROM"), (name, run)
    quoted = [name for name in NAMES if "$" not in name and "  " not in name]
    expected = {
        "DATA": quoted,
        "TEST_DATA": quoted,
        "MODEL": quoted,
        "RUN": ["\u00e4", "a,b", "a+b@c"],
        "STAGE": ["\u00e4", "a,b", "a+b@c"],
    }
    assert accepted == expected.get(variable, accepted)
    assert not {"a&b", "a;b", "a|b", "`id`", "$(shell id)"} & set(accepted) or variable in (
        "DATA",
        "TEST_DATA",
        "MODEL",
    )


@needs_venv
def test_a_stage_prints_the_command_it_runs_and_is_not_run_again(tmp_path):
    words = ("-o", ".venv/.ready", "policy-data", f"RUN={tmp_path}", "QUICK=1", "DATA=builtin")
    done = make(*words)
    assert done.returncode == 0, done.stderr
    *_, command, told = done.stdout.splitlines()  # after those of a set-up, if the tree has changed since the last one
    assert command.startswith(f".venv/bin/python prepare_data.py --out {tmp_path}/data ")
    assert told.startswith("data: 400 training and 40 test pairs")
    manifest, checked = tmp_path / "data" / "manifest.json", tmp_path / ".made-from" / ".checked"
    assert (
        make(*words).stdout == ""
    )  # this one still checks the flags again, since a stage has begun after the last check
    stamps = [path.stat().st_mtime_ns for path in (manifest, checked)]
    assert make(*words).stdout == ""
    assert stamps == [path.stat().st_mtime_ns for path in (manifest, checked)]
    again = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert again.stdout.strip() == f"{tmp_path}/data: is finished, with these flags and inputs"


def test_the_commands_on_the_page_are_those_of_make_hh(tmp_path):
    page = [line for line in PAGE.splitlines() if line.startswith("python ")]
    assert len(page) == 8
    assert [resolved(line) for line in page] == [resolved(line) for line in commands()]
    lines = "\n".join(line.removeprefix("python ").replace("runs/hh", str(tmp_path)) for line in page)
    done = subprocess.run(
        [sys.executable, "-m", "mpo.tools.check"], cwd=ROOT, input=lines, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_presets_on_the_page_are_those_of_make():
    pattern = re.compile(r"^(\w+) += (--.*)$", re.M)
    lines = pattern.findall((ROOT / "make" / "tasks.mk").read_text())
    pretrained = {f"{what}_{size}" for what in ("full", "lora") for size in ("small", "medium", "large")}
    pretrained |= {"pretrained", "quick_pretrained"}
    others = {"hh", "tldr", "hh_files", "tldr_files", "toy_files", "quick", "scratch"}
    names = [name.rpartition("_")[0] for name, _ in lines]
    assert set(names) == pretrained | others
    on_models = [line for line, name in zip(lines, names, strict=True) if name in pretrained]
    assert on_models == pattern.findall((ROOT / "docs" / "models.md").read_text())
    assert [line for line in lines if line not in on_models] == pattern.findall(PAGE)
    stages = {name.rpartition("_")[2] for name, _ in lines}
    assert stages == {"data", "tokenizer", "sft", "rm", "split", "dpo", "ppo", "eval"}


@pytest.mark.parametrize(
    ("variables", "script", "flags"),
    [
        (["TASK=tldr"], "train_sft.py", {"epochs": 1.0, "max_prompt": 384}),
        (["TASK=tldr", "QUICK=1"], "train_sft.py", {"epochs": 1.0}),
        (["TASK=tldr", "QUICK=1", "SFT_FLAGS=--epochs 5"], "train_sft.py", {"epochs": 5.0}),
        (["TASK=tldr", "DATA=rows.jsonl"], "split_data.py", {"max_prompt": 640}),
        (["DATA=rows.jsonl"], "prepare_data.py", {"data": "rows.jsonl", "train": 0, "test": 0}),
        (["LORA=4"], "train_sft.py", {"lora_rank": 0}),
        (["LORA=4"], "train_rm.py", {"lora_rank": 4}),
        (["LOG=wandb"], "train_rm.py", {"log": "wandb"}),
        (["LOG=tensorboard"], "train_ppo.py", {"log": "tensorboard"}),
        (["BF16=1", "DEVICE=cpu", "SHARD=1"], "eval.py", {"precision": "bf16-mixed", "device": "cpu", "shard": True}),
        (["DPO_FLAGS=--beta 1 --steps 2", "dpo_FLAGS=--beta 3"], "train_dpo.py", {"beta": 3.0, "steps": 2}),
        (["RMS=rm rm-2"], "split_data.py", {"rm": "runs/hh/rm,runs/hh/rm-2"}),
        (["POLICIES=sft mpo"], "eval.py", {"policies": "sft=runs/hh/sft,mpo=runs/hh/mpo"}),
    ],
)
def test_what_a_variable_changes(variables, script, flags):
    found = dict(resolved(line) for line in commands("RUN=runs/hh", *variables))
    assert {name: found[script][name] for name in flags} == flags


def test_more_reward_models_differ_in_their_seed_and_may_have_flags_of_their_own():
    lines = [line for line in commands("RMS=rm rm-2 rm-3", "SEED=4", "rm-3_FLAGS=--lr 1e-4") if "train_rm.py" in line]
    values = [resolved(line)[1] for line in lines]
    assert [(v["out"], v["seed"], v["lr"]) for v in values] == [
        ("runs/hh/rm", 4, 5e-4),
        ("runs/hh/rm-2", 402, 5e-4),
        ("runs/hh/rm-3", 403, 1e-4),
    ]


def test_several_processes_are_started_by_the_launcher():
    lines = commands("NPROC=2", "KERNELS=reference")
    start = "MPO_KERNELS=reference .venv/bin/python"
    assert lines[1].startswith(f"{start} train_tokenizer.py ")
    assert lines[2].startswith(f"{start} -m mpo.runtime.launch 2 train_sft.py ")


def test_an_interpreter_that_has_all_packages_is_used_as_it_is():
    """As images for GPUs have one. Nothing is installed for it, neither for the stages nor for the check of a GPU."""
    for words in (("runs/hh/sft/manifest.json", "DATA=builtin", "RUN=runs/hh"), ("gpu-check",)):
        done = make("-nB", *words, "PY=/opt/torch/python")
        assert done.returncode == 0, done.stderr
        assert "/opt/torch/python" in done.stdout
        assert not re.search(r"pip|venv/bin", done.stdout)
    assert "-m benchmarks.gpu --rehearse true" in make("-nB", "gpu-check", "REHEARSE=1", "PY=python3").stdout


def test_make_bench_installs_every_environment_that_a_peer_needs_and_measures_every_table():
    done = make("-nB", "bench", "PY=python3")
    others_commands = [command for name in others.names() for command in others.commands(name).values()]
    of_others = {Path(c[0]).parts[-3] for c in others_commands if ".peers" in c[0]}
    assert of_others == {"torchtune", "llamafactory"}
    for environment in {c.environment for c in CONTESTS} | of_others:
        assert f"venv .peers/{environment}\n" in done.stdout
        assert f".peers/{environment}/bin/pip" in done.stdout
    for module in ("run", "scaling --again", "real --again", "others --again"):
        assert f"-m benchmarks.{module}" in done.stdout
