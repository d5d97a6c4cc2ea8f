"""Run the project's scripts in tests, as a user would run them, but without importing everything each time.

At the sizes of the tests, most scripts would spend more time on importing torch than on their work. So `run_script`
does not start a new interpreter for a script. A server process (the forkserver of Python's multiprocessing) imports
every script of the project once, and then forks a child for each call. The child takes over the call's arguments,
working directory, environment and output files, and runs the script from its first line, under the name "__main__".

The children share the modules that the server has imported. An environment variable that a module reads while it is
imported, such as MPO_KERNELS, therefore has no effect on them; a test that sets one starts an interpreter of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LIMIT = 900  # seconds that a script may take

# Whether there is a GPU is asked in such a way that a fork of this process can still use it (torch.cuda.is_available).
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload([*(path.stem for path in ROOT.glob("*.py")), "torch._dynamo"])  # for torch's optimisers


def run_script(*args: object, expect: int = 0, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a script in a forked process, and check its exit status.

    Arguments that start with an option of Python (-m or -c) are run by a new interpreter.
    """
    words = [str(arg) for arg in args]
    if words[0].startswith("-"):
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=LIMIT, check=False)
    else:
        done = _run_forked(words, cwd)
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def _run_forked(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = _forks.Process(target=_child, args=(words, cwd, dict(os.environ), out, err))
        process.start()
        process.join(LIMIT)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{words}: not done in {LIMIT} s\n{err.read_text()}")
        return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def _child(words: list[str], cwd: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    """Run a script in this process, which was forked to do so."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ |= environment
    os.chdir(cwd)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
