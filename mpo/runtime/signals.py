"""SIGTERM and Ctrl-C. Normally they end the program at once; while a stage trains, after the current step is saved."""

from __future__ import annotations

import os
import signal
from types import FrameType

from mpo.runtime import distributed
from mpo.runtime.errors import Interrupted

_deferring, _received = False, 0


def install() -> None:
    """Handle both signals in this process."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)


def ignore() -> None:
    """Ignore both signals from now on, since this process is ending anyway."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _received
    if _received or not _deferring:
        raise Interrupted(number)
    _received = number
    if distributed.is_main():
        os.write(2, b"\nstopping after this step, which will be saved; the same signal again stops at once\n")


def defer(on: bool) -> None:
    """While on, a first signal is only recorded (`received`); a second one still ends the program at once."""
    global _deferring
    _deferring = on


def received() -> int:
    """The number of the recorded signal, 0 for none."""
    return _received
