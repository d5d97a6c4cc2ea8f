"""What becomes of the memory of freed tensors, and how the processes of this project avoid a fault of older glibcs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpo.runtime import allocator
from tests.support.scripts import ROOT, run_script

# Prints how many of 80 MB stay with the process when they have been used and freed, in blocks of 8 MB.
KEPT = """
import ctypes, sys
from mpo.runtime import allocator
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.memset.argtypes = [ctypes.c_size_t], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def used():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

allocator.configure(frugal=sys.argv[1] == "frugal")
for _ in range(2):  # by itself glibc would no longer return a block as large as one that it has returned before
    before, blocks = used(), [libc.malloc(8_000_000) for _ in range(10)]
    end = libc.malloc(100)
    for block in blocks:
        libc.memset(block, 1, 8_000_000)
    for block in blocks:
        libc.free(block)
    print((used() - before) // 1_000_000)
"""

linux = pytest.mark.skipif(
    allocator.glibc_version() is None or not Path("/proc/self/statm").exists(), reason="no glibc"
)


def kept(how: str) -> list[int]:
    """The MB that stay, the first time and the second time; then they have been there before."""
    command = [sys.executable, "-c", KEPT, how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


@linux
def test_freed_memory_is_kept_except_by_a_frugal_stage():
    assert kept("fast") == pytest.approx([80, 0], abs=2)
    assert kept("frugal") == pytest.approx([0, 0], abs=2)


# Frees 100 groups of three small blocks that are neighbours. Prints how many groups there were, and how many of 100
# blocks, each as large as three small ones, then lie where a group was.
JOINED = """
import ctypes
from mpo.runtime import allocator
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

allocator.configure(frugal=False)
blocks = [libc.malloc(72) for _ in range(20_000)]
pairs = zip(range(10_000, 19_990), range(10_004, 19_994))
groups = [i for i, end in pairs if i % 4 == 0 and blocks[end] == blocks[i] + 4 * 80][:100]  # no other block in between
large = [0] * 100
for i in groups:
    for block in blocks[i : i + 3]:
        libc.free(block)
for i in range(100):  # into a list that is there: a request for much memory would join all small blocks
    large[i] = libc.malloc(3 * 80 - 8)
print(len(groups), len(set(large) & {blocks[i] for i in groups}))
"""


@linux
def test_small_blocks_that_are_freed_join_their_neighbours_at_once():
    environment = os.environ | {allocator.VARIABLE: allocator.WITHOUT_CACHE}
    command = [sys.executable, "-c", JOINED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    groups, joined = map(int, done.stdout.split())
    assert groups == 100
    assert joined > 80  # the memory of the others may have been used for something else


@pytest.mark.parametrize(
    ("version", "settings", "loses"),
    [
        ((2, 36), "", True),
        ((2, 36), "glibc.malloc.tcache_count=0", False),
        ((2, 36), "glibc.rtld.nns=3:glibc.malloc.tcache_count=0", False),
        ((2, 36), "glibc.malloc.tcache_count=7", True),
        ((2, 39), "", False),
        ((2, 41), "", False),
        (None, "", False),
    ],
)
def test_memory_is_lost_before_glibc_2_39_unless_the_cache_is_off(monkeypatch, version, settings, loses):
    monkeypatch.setattr(allocator, "glibc_version", lambda: version)
    monkeypatch.setenv("GLIBC_TUNABLES", settings)
    assert allocator.loses_memory() == loses


def test_make_and_the_launcher_start_processes_without_the_cache_unless_the_user_has_settings(monkeypatch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os\nprint(os.environ['GLIBC_TUNABLES'])\n")
    make = ["make", "--silent", "--eval", "help: shown", "--eval", "shown: ; @printenv GLIBC_TUNABLES", "help"]
    monkeypatch.delenv("MAKELEVEL", raising=False)
    for given, expected in (("", "glibc.malloc.tcache_count=0"), ("glibc.rtld.nns=3", "glibc.rtld.nns=3")):
        monkeypatch.setenv("GLIBC_TUNABLES", given) if given else monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
        assert run_script("-m", "mpo.runtime.launch", 1, script).stdout.strip() == expected
        assert subprocess.run(make, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()[0] == expected
