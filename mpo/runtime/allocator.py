"""How memory is allocated on a CPU: torch asks the C library (malloc), which on Linux is mostly glibc.

Before version 2.39, glibc's posix_memalign, which torch calls for every tensor, puts the few bytes that are left around
a tensor into a cache of small blocks. So the memory of a freed tensor does not join its neighbours, and is too small by
these bytes for the next tensor of its size (glibc's bug 30723). Without that cache much less is lost. It can only be
switched off before a program starts, by a variable of its environment, which make and launch.py set. `configure`
switches off a second cache of this kind, the fastbins.
"""

from __future__ import annotations

import ctypes
import os
import re

VARIABLE, WITHOUT_CACHE = "GLIBC_TUNABLES", "glibc.malloc.tcache_count=0"
MENDED = (2, 39)  # the version of glibc in which this was mended
MXFAST, TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = 1, -1, -3, -4  # mallopt's names for them (malloc.h)


def glibc_version() -> tuple[int, ...] | None:
    """The version of glibc, such as (2, 36); None where the C library is another one."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return None
    libc.gnu_get_libc_version.restype = ctypes.c_char_p
    return tuple(map(int, re.findall(r"\d+", libc.gnu_get_libc_version().decode())))


def loses_memory() -> bool:
    """Whether this process has a glibc with the fault, and was started with the cache on."""
    version = glibc_version()
    return version is not None and version < MENDED and WITHOUT_CACHE not in os.environ.get(VARIABLE, "").split(":")


def environment() -> dict[str, str]:
    """The environment for processes that this one starts: its own, with the cache off if it makes no such settings."""
    return {VARIABLE: WITHOUT_CACHE, **os.environ}


def configure(frugal: bool) -> None:
    """Let glibc keep the memory of freed tensors for the next ones, or return it to the system for a `frugal` stage.

    By default each large tensor is a mapping of its own, whose pages the kernel clears when they are first touched.
    That takes much of a small model's step. But memory that is kept has holes between tensors, which not every tensor
    fits into.

    Either way, small blocks join their free neighbours at once. glibc would first put them into lists (fastbins), and
    a small object that takes one from there divides the hole beside it for as long as the object lives. Training of
    adapters on `small` takes 140 MB more with these lists, and is no faster.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    libc.mallopt(MXFAST, 0)
    if frugal:
        libc.mallopt(MMAP_THRESHOLD, 2**20)  # fixed: glibc would raise it to the size of the largest tensor freed
    else:
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
