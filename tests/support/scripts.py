"""The scripts as a user runs them, forked from one process that has imported everything: that takes longest."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LIMIT = 900  # seconds

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload([*(path.stem for path in ROOT.glob("*.py")), "torch._dynamo"])  # torch's optimisers do


def run_script(*args: object, expect: int = 0, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a script of the project, or python with options (-m, -c), and check its exit status."""
    words = [str(arg) for arg in args]
    if words[0].startswith("-"):
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=LIMIT, check=False)
    else:
        done = _forked(words, cwd)
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def _forked(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = _forks.Process(target=_become, args=(words, cwd, dict(os.environ), out, err))
        process.start()
        process.join(LIMIT)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{words}: not done in {LIMIT} s\n{err.read_text()}")
        return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def _become(words: list[str], cwd: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ |= environment
    os.chdir(cwd)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
