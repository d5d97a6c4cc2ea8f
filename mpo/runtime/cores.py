"""How many CPU cores this process may use, and so how many threads it starts.

A machine may have more cores than a job gets. Threads beyond the job's share would only wait for each other.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mpo.config import Range
from mpo.runtime.errors import InputError
from mpo.runtime.flags import read_number
from mpo.runtime.output import note

_told = set[str]()  # the values of OMP_NUM_THREADS about which a note was printed


def cores(root: Path = Path("/")) -> int:
    """The number of cores that this process may use, at least 1.

    These are the cores that it may run on (taskset and batch systems choose some), or fewer if its container has a
    limit on CPU time: a limit of 2.5 cores counts as 2. `root` is the folder that holds proc/ and sys/.
    """
    on_linux = hasattr(os, "sched_getaffinity")
    allowed = len(os.sched_getaffinity(0)) if on_linux else os.cpu_count() or 1
    return max(1, int(min([allowed, *_limits(root)])))


def _limits(root: Path) -> Iterator[float]:
    """The limits on CPU time, in cores, of this process's control groups (cgroups) and of all groups above them."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in filter(lambda line: line.count(":") >= 2, lines):
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # cgroups version 2 has one tree for all controllers
            trees = ["", "unified"]
        elif "cpu" in controllers.split(","):  # version 1 has a tree for each controller or for several
            trees = ["cpu", controllers]
        else:
            continue
        group = PurePosixPath(path.strip("/"))
        for tree in trees:
            yield from (_limit(root / "sys/fs/cgroup" / tree / part) for part in (group, *group.parents))


def _limit(folder: Path) -> float:
    """The limit of one group, in cores. Infinite if it has none, or if its files are not visible here."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = ((folder / f"cpu.cfs_{x}_us").read_text(encoding="ascii") for x in ("quota", "period"))
        share = int(quota) / int(period)  # no limit: "max" in version 2, -1 in version 1
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
    return share if share > 0 else math.inf


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
