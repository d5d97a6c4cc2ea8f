"""A benchmark's worker: does one step each time it is told to, and says how long it took.

Protocol, by lines: the worker prints {"ready": true}; for each line it reads it does one step and
prints {"seconds": ..., "peak_mib": ...}. So a runner can let workers take turns on one machine.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable

_out = os.fdopen(os.dup(1), "w")  # what the libraries print goes to stderr, and not between our lines
os.dup2(2, 1)


def ready() -> None:
    """Tell the runner that all is loaded."""
    print(json.dumps({"ready": True, "mib": _mib()}), file=_out, flush=True)


def wait() -> float:
    """Block until the next turn; returns the time at which it began. Exits when there is none."""
    if not sys.stdin.readline():
        os._exit(0)
    return time.perf_counter()


def report(began: float, **more: float) -> None:
    """Say how long the turn took."""
    result = {"seconds": time.perf_counter() - began, "peak_mib": _mib()} | more
    print(json.dumps(result), file=_out, flush=True)


def serve(step: Callable[[], object]) -> None:
    """Do one step a turn, for ever."""
    ready()
    while True:
        began = wait()
        step()
        report(began)


def _mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
