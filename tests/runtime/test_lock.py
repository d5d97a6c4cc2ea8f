"""One process at a time works on a stage's folder; the lock of a process that is gone does not stay."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

from mpo.runtime import lock
from mpo.runtime.errors import InputError
from mpo.runtime.lock import Lock
from tests.support.scripts import ROOT

HOLD = """
import sys
from pathlib import Path
from mpo.runtime.lock import Lock
taken = Lock(Path(sys.argv[1]))
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock of tmp_path until its standard input is closed."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "taken\n"
    yield process
    if process.poll() is None:
        process.kill()
        process.communicate()


def test_a_second_process_is_refused_and_told_who_is_at_work(holder, tmp_path):
    who = rf"process {holder.pid} on {re.escape(socket.gethostname())}, since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d"
    for _ in range(2):
        with pytest.raises(InputError, match=rf"another process is at work here \({who}\); wait for it"):
            Lock(tmp_path)


@pytest.mark.parametrize("how", ["ends", "is killed"])
def test_the_lock_ends_with_its_process(holder, tmp_path, how):
    if how == "is killed":
        holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert (tmp_path / ".lock").exists() == (how == "is killed")
    mine = Lock(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    mine.release()
    assert not (tmp_path / ".lock").exists()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A lock file that a process on another machine has left, or still touches."""
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"pid": 7, "host": "another-machine", "since": "2026-01-01 00:00:00"}))
    os.utime(path, (1, 1))
    return path


def test_the_lock_of_another_machine_is_taken_over_once_nobody_touches_it(elsewhere, tmp_path):
    Lock(tmp_path).release()


def test_the_lock_of_another_machine_holds_while_its_owner_touches_it(elsewhere, tmp_path):
    done = threading.Event()

    def touch():
        while not done.wait(0.001):
            os.utime(elsewhere)

    owner = threading.Thread(target=touch)
    owner.start()
    try:
        with pytest.raises(InputError, match="process 7 on another-machine, since 2026-01-01 00:00:00"):
            Lock(tmp_path)
    finally:
        done.set()
        owner.join()


def test_a_lock_file_that_cannot_be_read_is_no_lock(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff\x00 nonsense")
    Lock(tmp_path).release()
