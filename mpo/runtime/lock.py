"""One process at a time works on a stage's folder.

The lock belongs to the operating system (fcntl) and ends with its process, however that ends, so that on one machine
no lock outlives its owner. Machines that share a folder may not see each other's locks. So the owner also touches the
lock file every few seconds, and another machine takes the lock over only after it has seen no touch for a while.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from mpo.runtime.errors import InputError
from mpo.runtime.manifest import LOCK
from mpo.runtime.output import note

HEARTBEAT = 5.0  # seconds between two touches of the file
WATCH = 3  # heartbeats without a touch, after which the owner counts as gone
PATIENCE = 2.0  # seconds to wait, because an owner that has just been killed may hold the lock a little longer
_held = list["Lock"]()  # the locks of this process


class Lock:
    """The lock of one folder, held until `release` or the end of the process."""

    def __init__(self, folder: Path):
        """Take the lock. Raises InputError, naming the owner, where another process has it."""
        self.folder, self.path = folder, folder / LOCK
        self.handle = self._open()
        os.ftruncate(self.handle, 0)
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.pwrite(self.handle, json.dumps(about).encode(), 0)
        self.released = threading.Event()
        self.owner = os.getpid()  # a forked child does not hold the lock
        threading.Thread(target=self._beat, daemon=True).start()
        atexit.register(self.release)
        _held.append(self)

    def _open(self) -> int:
        """Open and lock the file. Another process may remove it between the two, so that is checked at the end."""
        asked = time.monotonic()
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            owner, shared = os.pread(handle, 1000, 0), True
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                if e.errno in (errno.EACCES, errno.EAGAIN):
                    os.close(handle)
                    if time.monotonic() > asked + PATIENCE:
                        raise self._refusal(owner) from None
                    time.sleep(0.05)
                    continue
                shared = False  # this file system has no locks
            # An owner on this machine is gone: it would still hold the lock. If it is on another machine, or if there
            # are no locks, only its touches can tell.
            if owner and not (shared and _host(owner) in ("", socket.gethostname())):
                note(f"{self.folder}: a process on {_host(owner)} has been at work here; checking whether it still is")
                if self._is_alive():
                    raise self._refusal(owner)
            with suppress(FileNotFoundError):
                if self.path.stat().st_ino == os.fstat(handle).st_ino:
                    return handle
            os.close(handle)

    def _is_alive(self) -> bool:
        """Whether the owner, perhaps on another machine, touches the file within a few heartbeats."""
        before = self.path.stat().st_mtime_ns
        for _ in range(4 * WATCH):
            time.sleep(HEARTBEAT / 4)
            if not self.path.exists():
                return False
            if self.path.stat().st_mtime_ns != before:
                return True
        return False

    def _refusal(self, owner: bytes) -> InputError:
        try:
            about = json.loads(owner)
            who = f"process {about['pid']} on {about['host']}, since {about['since']}"
        except (ValueError, KeyError, TypeError):
            who = "its owner is not recorded"
        return InputError(
            f"--out {self.folder}: another process is at work here ({who}); wait for it, or stop it first"
        )

    def _beat(self) -> None:
        while not self.released.wait(HEARTBEAT):
            with suppress(OSError):
                os.utime(self.handle)

    def release(self) -> None:
        """Give the lock back. A second call does nothing."""
        if self.released.is_set() or os.getpid() != self.owner:
            return
        self.released.set()
        _held.remove(self)
        atexit.unregister(self.release)
        with suppress(OSError):
            self.path.unlink()
        os.close(self.handle)


def release_all() -> None:
    """Give back every lock that this process still holds, for a program that goes on after a stage has failed."""
    for lock in list(_held):
        lock.release()


def _host(owner: bytes) -> str:
    try:
        return str(json.loads(owner)["host"])
    except (ValueError, KeyError, TypeError):
        return ""
