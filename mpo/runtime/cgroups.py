"""What this process's control groups (cgroups) allow it: a container, or a job of a batch system, may have limits.

`root` is the folder that holds proc/ and sys/, everywhere here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def cpu_limit(root: Path = ROOT) -> float:
    """The limit on CPU time, in cores. Infinite without one."""
    return min(map(_cores, _folders("cpu", root)), default=math.inf)


def memory_limit(root: Path = ROOT) -> float:
    """The limit on memory, in bytes. Infinite without one."""
    return min(map(_bytes, _folders("memory", root)), default=math.inf)


def _folders(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's groups, and of all groups above them, in the trees that this controller has."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in filter(lambda line: line.count(":") >= 2, lines):
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # cgroups version 2 has one tree for all controllers
            trees = ["", "unified"]
        elif controller in controllers.split(","):  # version 1 has a tree for each controller or for several
            trees = [controller, controllers]
        else:
            continue
        group = PurePosixPath(path.strip("/"))
        for tree in trees:
            yield from (root / "sys/fs/cgroup" / tree / part for part in (group, *group.parents))


def _cores(folder: Path) -> float:
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


def _bytes(folder: Path) -> float:
    """The limit of one group, in bytes. Infinite if it has none, or if its files are not visible here."""
    for name in ("memory.max", "memory.limit_in_bytes"):  # version 2, version 1
        try:
            limit = int((folder / name).read_text(encoding="ascii"))  # no limit: "max" in version 2
        except (OSError, ValueError):
            continue
        return float(limit) if limit > 0 else math.inf
    return math.inf
