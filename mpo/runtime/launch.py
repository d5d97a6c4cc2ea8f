"""Start a stage in several processes on this machine: python -m mpo.runtime.launch 2 train_sft.py --out ...

This uses torchrun's own engine, but shares out the cores, prints less, and makes the reason for an early end the last
line. For several machines use torchrun itself (docs/processes.md).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mpo.config import Range
from mpo.runtime import allocator, signals
from mpo.runtime.cores import threads
from mpo.runtime.entry import run_plain
from mpo.runtime.errors import InputError, Interrupted, RunError
from mpo.runtime.flags import read_number


@contextmanager
def recorded_signals() -> Iterator[None]:
    """Record each signal that this program gets in a file, for the processes that it starts (signals.py).

    The interpreter writes the record when the signal arrives, before any handler passes the signal on.
    """
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "signals"
        handle = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK)
        os.environ[signals.LAUNCHED] = str(record)
        signal.set_wakeup_fd(handle, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)
            os.close(handle)


def main(argv: list[str]) -> None:
    """Run argv[1:] in argv[0] processes. Raises InputError for a wrong number, RunError if a process is killed."""
    if len(argv) < 2:
        raise InputError("expected a number of processes and a command, as in: mpo launch 2 sft --out ...")
    processes = int(read_number("number of processes", int, Range(1, 1_000), argv[0]))
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # what goes wrong below also arrives as an exception
    os.environ |= allocator.environment()
    os.environ["OMP_NUM_THREADS"] = str(threads(processes=processes))
    config = LaunchConfig(
        1,
        1,
        processes,
        max_restarts=0,
        run_id="mpo",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        monitor_interval=0.1,
    )
    try:
        with recorded_signals():
            elastic_launch(config, sys.executable)(*argv[1:])
    except SignalException as e:
        raise Interrupted(int(e.sigval)) from None
    except ChildFailedError as e:
        # The process that died first is the one to name, not those that then ended because of it.
        silent = (-signal.SIGTERM, signals.SILENT)
        ends = ((failure.exitcode in silent, failure.exitcode, rank) for rank, failure in e.failures.items())
        _, status, rank = min(ends)
        if status > 0:
            sys.exit(status)  # the process itself has said why
        name = signal.Signals(-status).name
        raise RunError(
            f"process {rank} of {processes} was killed ({name}); the same command goes on from the last save, if any"
        ) from None


if __name__ == "__main__":
    run_plain(main)
