"""make as a user runs it, what it would run, and a project whose .venv is a script."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from mpo.runtime.flags import parse
from mpo.tools.check import CONFIGS
from tests.support.scripts import ROOT


def make(*words: object, cwd: Path = ROOT, level: int = 0) -> subprocess.CompletedProcess[str]:
    """Run make as from a terminal, even if make runs the tests; level 1 is a make that another make has started."""
    env = {name: os.environ[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS") if name in os.environ}
    env |= {"MAKELEVEL": str(level)} if level else {}
    command = ["make", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def commands(*variables: object) -> list[str]:
    """The commands of all stages of a run in runs/hh, from a dry run."""
    done = make("-nB", "DATA=builtin", *variables, "runs/hh/eval/manifest.json")
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if " --out runs/" in line]


def resolved(command: str) -> tuple[str, dict[str, object]]:
    """A command's script, and the value of each of its flags. Make alone names the preset of the tokenizer's model."""
    script, *flags = (word for word in shlex.split(command) if not word.endswith("python"))
    values = vars(parse(CONFIGS[script], flags)) | {"overwrite": None}  # make passes it to eval.py
    return script, values | ({"model": None} if script == "train_tokenizer.py" else {})


def project(folder: Path, cases: str) -> Path:
    """A folder in which make sees this project, but a .venv whose python is a script.

    cases: what it does instead of running Python, as cases of the shell for its second argument.
    """
    for name in ("Makefile", "make", "requirements", "pyproject.toml", "kernels", "mpo"):
        (folder / name).symlink_to(ROOT / name)
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\ncase "$2" in {cases} esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return folder
