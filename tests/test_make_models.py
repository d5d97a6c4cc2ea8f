"""What make does for a model of the user: flags by its size, downloads, packages that are installed when needed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.makefile import commands, make, project, resolved
from tests.support.scripts import ROOT


def model_of(folder: Path, *shapes: tuple[int, ...]) -> Path:
    """A folder with the header of a weight file, but no weights: what make reads of a model."""
    folder.mkdir()
    entries = {f"w{i}": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for i, shape in enumerate(shapes)}
    header = json.dumps(entries | {"__metadata__": {"format": "pt"}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


SIZES = {"small": ((49152, 576), (1000, 100_000)), "medium": ((2048, 1_000_000),), "large": ((4096, 2_000_000), (7,))}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("what", "lora"), [("full", ""), ("lora", "LORA=8")])
def test_a_model_folder_gets_the_flags_of_its_size(size, what, lora, tmp_path):
    model = model_of(tmp_path / size, *SIZES[size])
    written = dict(re.findall(r"^(\w+) += (--.*)$", (ROOT / "make" / "tasks.mk").read_text(), re.M))
    stages = [
        line for line in commands(f"MODEL={model}", *([lora] if lora else []), "SFT_FLAGS=--lr 7") if "train_" in line
    ]
    for stage, script in (("rm", "train_rm.py"), ("dpo", "train_dpo.py"), ("ppo", "train_ppo.py")):
        _, flags = resolved(next(line for line in stages if script in line))
        expected = parse_flags(written[f"{what}_{size}_{stage}"])
        assert {name: flags[name] for name in expected} == expected
    assert resolved(next(line for line in stages if "train_sft.py" in line))[1]["lr"] == 7  # one's own flags win


def parse_flags(line: str) -> dict[str, float]:
    """Numbers by flag: "--lr 1 --beta 2" -> {"lr": 1.0, "beta": 2.0}."""
    words = line.split()
    return {name[2:]: float(value) for name, value in zip(words[::2], words[1::2], strict=True)}


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs", b"\x02" + bytes(7) + b"[]", None])
def test_a_model_whose_size_cannot_be_read_gets_no_flags_of_a_size(content, tmp_path):
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    done = subprocess.run(
        [sys.executable, "make/size.py", tmp_path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


HUB = r"-m mpo\.tools\.hub (model|dataset) (\S+)"


@pytest.mark.parametrize(
    ("variables", "asked"),
    [
        (["MODEL=org/name"], [("model", "org/name")]),
        (["MODEL=org/name@v1", "DATA=org/rows"], [("model", "org/name@v1"), ("dataset", "org/rows")]),
        (["MODEL=tiny", "DATA=data/hh-rlhf"], []),
        (["MODEL=runs/hh", "DATA=my/pairs.jsonl"], []),
        (["MODEL=models/mine", "DATA=my/pairs.json.gz"], []),
        (["MODEL=make", "DATA=tests/data"], []),
        (["MODEL=/org/name", "DATA=a/b/c"], []),
    ],
)
@pytest.mark.parametrize("goal", ["hh", "policy-dpo"])
def test_a_name_that_is_no_folder_is_downloaded_from_the_hub_first(tmp_path, variables, asked, goal):
    done = make("-n", goal, *variables, f"RUN={tmp_path}")
    assert re.findall(HUB, done.stdout) == asked


@pytest.mark.parametrize(
    ("files", "needed"),
    [
        ({"tokenizer.json": b"{}"}, True),
        ({"tokenizer.json": b"{}", "tokenizer.model": b"\n\x0e\n\x05"}, False),  # sentencepiece reads the latter
        ({"tokenizer.json": b"{}", "tokenizer.model": b"IQ== 0\n"}, True),  # tiktoken's, which is not read
        ({"tokenizer.model": b"\n\x0e\n\x05"}, False),
    ],
)
@pytest.mark.parametrize("goal", ["hh", "chat"])
def test_a_model_with_tokenizer_json_alone_needs_the_package_that_reads_it(tmp_path, files, needed, goal):
    folder = tmp_path / ("a model" if goal == "hh" else "mpo")
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    words = [f"MODEL={folder}", f"RUN={tmp_path}/run"] if goal == "hh" else [f"RUN={tmp_path}"]
    done = make("-nB", goal, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("Installing the tokenizers package into .venv" in done.stdout) == needed


@pytest.mark.parametrize(("there", "pip"), [(True, "false"), (False, "true"), (False, "false")])
def test_the_package_is_installed_once_and_offline_one_line_says_what_to_run(tmp_path, there, pip):
    """With a python that has the package or not, and a pip that works or not."""
    project(tmp_path, f'"import tokenizers") exit {int(not there)};;')
    (tmp_path / ".venv" / ".ready").touch()
    done = make("-o", ".venv/.ready", ".venv/.tokenizers", f"PIP={pip}", cwd=tmp_path)
    say = "Installing the tokenizers package into .venv, which reads tokenizer.json.\n"
    assert done.stdout == ("" if there else say)
    assert done.returncode == (2 if pip == "false" and not there else 0)
    assert (tmp_path / ".venv" / ".tokenizers").exists() == (done.returncode == 0)
    if done.returncode:
        first, *_ = done.stderr.splitlines()
        assert first == (
            "tokenizers: could not be installed (see .venv/tokenizers.log); once there is a network, run: "
            "make .venv/.tokenizers"
        )


@pytest.mark.parametrize("pip", ["true", "false"])
def test_make_report_does_without_figures_where_matplotlib_cannot_be_installed(tmp_path, pip):
    project(tmp_path, '"import matplotlib") exit 1;; mpo.*) echo "$@"; exit 0;;')
    done = make("-o", ".venv/.runtime", "report", "RUN=runs/x", f"PIP={pip}", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Installing matplotlib into .venv, for figures.\n-m mpo.tools.page runs/x\n"
