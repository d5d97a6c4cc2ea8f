"""The built wheel, in an environment that has nothing of the checkout: the command, a stage, the kernels.

The environment sees the packages of the one that runs the tests, so that nothing is downloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from mpo.kernels import build
from mpo.runtime.files import read_json
from tests.support.scripts import ROOT

needs_kernels = pytest.mark.skipif(not build.library().exists(), reason="the kernels are not compiled here")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for path in (*map(ROOT.joinpath, ("mpo", "kernels", "pyproject.toml", "README.md")), *ROOT.glob("*.py")):
        subprocess.run(["cp", "-R", str(path), str(source / path.name)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_claims_no_name_but_mpo(wheel):
    """`kernels` is Hugging Face's package; two packages of one name overwrite each other in site-packages."""
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"mpo"}
    expected = ["kernels/functions.py", "kernels/cpp/attention.cpp", "tools/page.html", "py.typed"]
    expected += [f"stages/{path.name}" for path in ROOT.glob("*.py")]
    assert {f"mpo/{name}" for name in expected} <= set(names)


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A new environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("environment") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    inside = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "lib" / inside / "site-packages" / "outside.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*command, "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    return folder / "bin"


def start(program: Path, *arguments: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the environment, one thread in each process, with a cache that is empty at first."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MPO_KERNELS")}
    env = kept | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cwd / "cache"), "CUDA_VISIBLE_DEVICES": ""} | variables
    words = [str(program), *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_the_command_of_the_wheel_runs_a_stage(environment, tmp_path):
    done = start(environment / "mpo", "data", "--train", 8, "--test", 4, "--out", "data", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "data: 8 training and 4 test pairs from the built-in world 'hh'\n"
    assert read_json(tmp_path / "data" / "manifest.json")["stage"] == "prepare_data"
    done = start(environment / "mpo", "data", "--trian", 8, "--out", "data", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "mpo data: error: unknown flag --trian; did you mean --train?\n")


TRY = """
import sys, transformers
import mpo

folder, out = sys.argv[1:]
assert "site-packages" in mpo.__file__, mpo.__file__
sft = mpo.load(folder, device="cpu")
question, answers = "What color is grass?", ["It is green.", "It is blue."]
theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in sft.model.parameters())
rows = [{"prompt": question, "chosen": answers[0], "rejected": answers[1]}]
mpo.train("dpo", rows, model=sft, out=out, batch=1, device="cpu")
from mpo.kernels import functions
print(*functions.IMPLEMENTATIONS)
"""
COMPILER = """#!/bin/sh
[ -n "$REFUSES" ] && { echo "cannot compile" >&2; exit 1; }
while [ "$1" != -o ]; do shift; done
echo compiled >> "$LOG"
cp "$COMPILED" "$2"
"""  # it copies the kernels of the checkout, which are the same, since compiling them would take long


@pytest.fixture
def compiler(tmp_path) -> dict[str, str]:
    """Variables that make a stand-in the C++ compiler."""
    script = tmp_path / "compiler"
    script.write_text(COMPILER)
    script.chmod(0o755)
    return {"CXX": str(script), "COMPILED": str(build.library()), "LOG": str(tmp_path / "log"), "REFUSES": ""}


@needs_kernels
def test_beside_transformers_the_wheel_loads_trains_and_compiles_its_kernels_once(
    environment, hh_run, tmp_path, compiler
):
    pytest.importorskip("transformers")
    done = start(environment / "python", "-c", TRY, hh_run / "sft", "first", cwd=tmp_path, **compiler)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("reference chunked cpu\n")
    assert f"kernels: compiling them for this processor, once, into {tmp_path / 'cache/mpo/kernels'}" in done.stderr
    models = ("--model", hh_run / "sft", "--max_new", 3)
    again = start(environment / "mpo", "chat", *models, cwd=tmp_path, **compiler)
    assert (again.returncode, again.stderr) == (0, "")
    assert (tmp_path / "log").read_text() == "compiled\n"


@needs_kernels
def test_two_processes_compile_once(environment, hh_run, tmp_path, compiler):
    flags = ("--data", hh_run / "data", "--model", hh_run / "sft", "--out", "rm", "--batch", 8, "--epochs", 0.1)
    done = start(environment / "mpo", "launch", 2, "rm", *flags, cwd=tmp_path, **compiler)
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "rm" / "manifest.json")["processes"] == 2
    assert (tmp_path / "log").read_text() == "compiled\n"


@pytest.mark.parametrize("lack", ["a compiler", "a compiler that works", "a cache"])
def test_without_kernels_the_wheel_falls_back_to_torch_with_one_line(environment, hh_run, tmp_path, compiler, lack):
    variables = compiler
    if lack == "a compiler":
        variables = {"CXX": "none", "PATH": str(tmp_path)}
    elif lack == "a compiler that works":
        variables["REFUSES"] = "1"
    else:
        (tmp_path / "cache").write_text("a file")
    flags = ("--model", hh_run / "sft", "--max_new", 3, "--device", "cpu")
    done = start(environment / "mpo", "chat", *flags, cwd=tmp_path, **variables)
    assert done.returncode == 0
    *before, last = done.stderr.splitlines()
    assert last.startswith("kernels: ")
    assert last.endswith("; using plain torch, which is slower")
    assert len(before) == (lack == "a compiler that works")  # it is tried once
    if before:
        (line,) = start(environment / "mpo", "chat", *flags, cwd=tmp_path, **variables).stderr.splitlines()
        assert "`mpo kernels` tries again" in line
        assert start(environment / "mpo", "kernels", cwd=tmp_path, **compiler | {"REFUSES": ""}).returncode == 0
        if build.library().exists():
            assert start(environment / "mpo", "chat", *flags, cwd=tmp_path, **compiler).stderr == ""


def test_a_source_distribution_has_the_scripts_themselves(tmp_path):
    """Not links to files that it does not have."""
    source = tmp_path / "source"
    source.mkdir()
    for path in (*map(ROOT.joinpath, ("mpo", "kernels", "pyproject.toml", "README.md")), *ROOT.glob("*.py")):
        subprocess.run(["cp", "-R", str(path), str(source / path.name)], check=True)
    code = "import setuptools.build_meta as b; b.build_sdist('out')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    shutil.unpack_archive(next((source / "out").glob("*.tar.gz")), tmp_path / "unpacked")
    (script,) = (tmp_path / "unpacked").glob("*/mpo/stages/train_ppo.py")
    assert script.read_text() == (ROOT / "train_ppo.py").read_text()
