"""A worker of the benchmark: it does one step each time it is told to, and reports how long that took.

The protocol consists of lines. The worker prints {"ready": true, "mib": ...} once it has loaded everything. For each
line that it reads, it does one step and prints {"seconds": ..., "peak_mib": ...} and, in some cases, {"loss": ...}. So
run.py can let several workers take turns on one machine.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Collection
from typing import Any

_out = os.fdopen(
    os.dup(1), "w", encoding="utf-8"
)  # for the protocol; what libraries print to stdout goes to stderr from now on
os.dup2(2, 1)


def arguments(usage: str, numbers: int = 1, cases: Collection[str] = ()) -> tuple[str, list[int]]:
    """The case that the command line names, and the numbers after it. Ends the program for any other arguments."""
    case, *rest = sys.argv[1:] or [""]
    if (
        (cases and case not in cases)
        or len(rest) != numbers
        or not all(re.fullmatch("[1-9][0-9]{0,8}", x) for x in rest)
    ):
        sys.exit(f"usage: {usage}" + (f"; cases: {', '.join(cases)}" if cases else ""))
    return case, [int(x) for x in rest]


def ready() -> None:
    """Report that everything is loaded."""
    if gpu := _gpu():
        gpu.reset_peak_memory_stats()
    print(json.dumps({"ready": True, "mib": _mib()}), file=_out, flush=True)


def wait() -> float:
    """Wait for the next turn and return the time at which it began. Exits if no turn follows."""
    if not sys.stdin.readline():
        os._exit(0)
    return time.perf_counter()


def report(began: float, **more: float) -> None:
    """Report how long the turn took that began at this time. A GPU first does all that it was asked to do."""
    if gpu := _gpu():
        gpu.synchronize()
    result = {"seconds": time.perf_counter() - began, "peak_mib": _mib()} | more
    print(json.dumps(result), file=_out, flush=True)


def serve(step: Callable[[], object]) -> None:
    """Do one step each turn until no turn follows. A number that the step returns is reported as its loss."""
    ready()
    while True:
        began = wait()
        result = step()
        report(began, **({"loss": result} if isinstance(result, float) else {}))


def _gpu() -> Any:
    """torch.cuda where this process uses it, else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch and torch.cuda.is_initialized() else None


def _mib() -> float:
    """The most memory that this process has used so far, in MiB; on a GPU, that of tensors since `ready`."""
    if gpu := _gpu():
        return gpu.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
