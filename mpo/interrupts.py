"""SIGTERM and Ctrl-C: at once, or, while a stage trains, behind the step that is being made, when it has been saved."""

from __future__ import annotations

import os
import signal
from types import FrameType

from mpo import parallel
from mpo.errors import Interrupted

_deferring, _received = False, 0


def install() -> None:
    """Take both signals over, for this process."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)


def ignore() -> None:
    """From now on, since this process is ending anyway."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _received
    if _received or not _deferring:
        raise Interrupted(number)
    _received = number
    if parallel.first():
        os.write(2, b"\nstopping behind this step, which is saved; the same signal again stops at once\n")


def defer(on: bool) -> None:
    """From now on a first signal is only noted (or no longer)."""
    global _deferring
    _deferring = on


def received() -> int:
    """The number of the signal that was noted, 0 for none."""
    return _received
