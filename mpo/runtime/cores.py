"""How many CPU cores this process may use, and so how many threads it starts.

A machine may have more cores than a job gets. Threads beyond the job's share would only wait for each other.
"""

from __future__ import annotations

import os
from pathlib import Path

from mpo.config import Range
from mpo.runtime import cgroups
from mpo.runtime.errors import InputError
from mpo.runtime.flags import read_number
from mpo.runtime.output import note

_told = set[str]()  # the values of OMP_NUM_THREADS about which a note was printed


def cores(root: Path = cgroups.ROOT) -> int:
    """The number of cores that this process may use, at least 1.

    These are the cores that it may run on (taskset and batch systems choose some), or fewer if its container has a
    limit on CPU time: a limit of 2.5 cores counts as 2. `root`: see cgroups.py.
    """
    on_linux = hasattr(os, "sched_getaffinity")
    allowed = len(os.sched_getaffinity(0)) if on_linux else os.cpu_count() or 1
    return max(1, int(min(allowed, cgroups.cpu_limit(root))))


def threads_asked_for() -> int:
    """The threads that OMP_NUM_THREADS asks for, 0 if it is not set.

    It may be a list, with a number for each level of nested parallel regions. Only the first level is used here. As in
    OpenMP itself, any other value is ignored; a note says so.
    """
    text = os.environ.get("OMP_NUM_THREADS", "").strip()
    try:
        return int(read_number("OMP_NUM_THREADS", int, Range(1, 1_000), text.split(",")[0].strip())) if text else 0
    except InputError as e:
        if text not in _told:
            note(f"{e}; it is ignored (--threads also sets the number)")
            _told.add(text)
        return 0


def threads(flag: int = 0, processes: int = 1) -> int:
    """The number of threads of each process: --threads, or else OMP_NUM_THREADS, or else its share of the cores."""
    return flag or threads_asked_for() or max(1, cores() // processes)
