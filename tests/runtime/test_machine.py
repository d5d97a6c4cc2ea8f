"""What a machine lacks, a compiler or memory, is said in one line."""

from __future__ import annotations

import subprocess
import sys
import sysconfig

import pytest
import torch

from mpo.kernels import build
from mpo.runtime import device, setup
from mpo.runtime.errors import InputError
from tests.support.scripts import ROOT, run_script

BEGIN = """
import sys, torch
from mpo.runtime.entry import run_plain

def main(argv):
    {}

run_plain(main)
"""


def test_compile_without_a_cpp_compiler_is_refused_in_one_line(hh_run, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    flags = ("--data", hh_run / "split" / "pairs.jsonl", "--model", hh_run / "sft", "--out", tmp_path / "out")
    done = run_script("train_dpo.py", *flags, "--compile", "true", "--device", "cpu", expect=2)
    (line,) = done.stderr.strip().splitlines()
    assert "--compile true: torch.compile needs a C++ compiler, and no-such-compiler is not here" in line
    assert not (tmp_path / "out").exists()


def test_compile_on_a_gpu_needs_what_triton_needs(monkeypatch):
    monkeypatch.setattr(device, "_device", torch.device("cuda:0"))
    monkeypatch.setattr(setup, "triton_lacks", lambda: "Triton needs a C compiler")
    with pytest.raises(InputError, match="--compile true: Triton needs a C compiler"):
        setup.check_compiler()
    monkeypatch.setattr(setup, "triton_lacks", lambda: "")
    setup.check_compiler()


def test_triton_is_used_only_where_its_code_can_be_compiled(monkeypatch, tmp_path):
    for name in ("CC", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in build.triton_lacks()
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: "there")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs a C compiler" in build.triton_lacks()
    (tmp_path / "gcc").touch(0o755)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert f"{tmp_path} has no Python.h" in build.triton_lacks()
    (tmp_path / "Python.h").touch()
    assert build.triton_lacks() == ""
    (tmp_path / "gcc").unlink()
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # needs no compiler
    assert build.triton_lacks() == ""


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (
            "torch.empty(10**15)",
            "stopped: cpu has too little memory for 4000000000000000 bytes more; lower --microbatch",
        ),
        (
            "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 3 GiB')",
            "stopped: cpu has too little memory for 20.00 GiB more; lower --microbatch",
        ),
        (
            "from torch._dynamo.exc import TorchDynamoException; raise TorchDynamoException('no g++\\nsecond line')",
            "stopped: --compile true: torch.compile failed (TorchDynamoException: no g++); leave --compile out",
        ),
    ],
    ids=["memory of the machine", "memory of a GPU", "torch.compile"],
)
def test_what_torch_says_about_the_machine_is_one_line_and_status_1(fault, expected, tmp_path):
    script = tmp_path / "stage.py"
    script.write_text(BEGIN.format(fault))
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": "."})
    assert done.returncode == 1
    assert done.stderr.startswith(f"stage.py: {expected}")
    assert len(done.stderr.splitlines()) == 1


def test_any_other_error_of_torch_keeps_its_traceback(tmp_path):
    script = tmp_path / "stage.py"
    script.write_text(BEGIN.format("torch.ones(2) + torch.ones(3)"))
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": "."})
    assert "Traceback" in done.stderr
