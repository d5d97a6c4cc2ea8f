"""SIGTERM and Ctrl-C. Normally they end the program at once; while a stage trains, after the current step is saved.

In a job of several processes, the launcher also sends SIGTERM to those that are left when one of them has died. It then
says itself what happened, so a process that is ended for another's death says nothing.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mpo.runtime import distributed
from mpo.runtime.errors import Interrupted

LAUNCHED = "MPO_LAUNCHED"  # in the environment of launched processes: the file in which the launcher records signals
SILENT = 128 + signal.SIGTERM  # exit status of a process that ends for another's death, and says nothing
_deferring, _received = False, 0
_next = ""  # what the same command would do next, once a stage has started


def install() -> None:
    """Handle both signals in this process."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)


@contextmanager
def borrowed() -> Iterator[None]:
    """Handle Ctrl-C as a stage does, for as long as a stage runs inside another program, such as a notebook.

    What SIGTERM does there is left to that program. Only the main thread of a program can handle signals; in another
    one, nothing changes.
    """
    global _received, _next
    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, _on_signal) if here else None
    try:
        yield
    finally:
        if here:
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)
        defer(False)
        _received, _next = 0, ""


def ignore() -> None:
    """Ignore both signals from now on, since this process is ending anyway."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _from_outside(number: int) -> bool:
    """Whether somebody asked the whole job to stop. The launcher records every signal that it gets (launch.py)."""
    record = Path(os.environ.get(LAUNCHED, ""))
    return number == signal.SIGINT or not record.is_file() or record.stat().st_size > 0


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _received
    from_outside = _from_outside(number)
    if _received or not _deferring:
        if not from_outside:
            os._exit(SILENT)
        raise Interrupted(number, _next)
    _received = number
    if from_outside and distributed.is_main():
        os.write(2, b"\nstopping after this step, which will be saved; the same signal again stops at once\n")


def promise(what: str) -> None:
    """Set what the message of a later interruption says that the same command does."""
    global _next
    _next = f"; the same command {what}"


def defer(on: bool) -> None:
    """While on, a first signal is only recorded (`received`); a second one still ends the program at once."""
    global _deferring
    _deferring = on


def received() -> int:
    """The number of the recorded signal, 0 for none."""
    return _received
