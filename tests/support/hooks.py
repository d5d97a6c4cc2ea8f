"""Interrupt a stage at a step that the test chooses, so that nothing depends on which of the two is faster."""

from __future__ import annotations

import textwrap
from pathlib import Path

from tests.support.scripts import ROOT

TEMPLATE = """
import os, runpy, signal, sys, time
sys.path.insert(0, {root!r})
from mpo.runtime import distributed, signals
from mpo.runtime.stage import Stage

def after_step(step):
{body}

log = Stage.log

def log_and_call(self, step, metrics):
    log(self, step, metrics)
    after_step(step)

Stage.log = log_and_call
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""

# For after_step: send a signal to the process of this number, and wait until it has come back to this one.
WAIT_FOR_SIGNAL = """
if step == {step} and distributed.is_main():
    os.kill({process}, {number})
    while not signals.received():
        time.sleep(0.01)
"""


def script_with_hook(folder: Path, script: str, body: str) -> Path:
    """A script that runs a stage's script and, in each process, `body` after each step (0, 1, ...) has been logged."""
    path = folder / "hooked.py"
    indented = textwrap.indent(textwrap.dedent(body).strip(), "    ")
    path.write_text(TEMPLATE.format(root=str(ROOT), body=indented, script=str(ROOT / script)))
    return path
