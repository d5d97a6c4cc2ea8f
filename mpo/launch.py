"""Start a stage in several processes of this machine: python -m mpo.launch 2 train_sft.py --out ...

What torchrun does, by its own engine, but quietly: cores are shared out, and when a process ends early, what it said
is the last line. On several machines it is torchrun itself (docs/processes.md).
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from mpo.errors import InputError, Interrupted, RunError
from mpo.program import run_plain


def main(argv: list[str]) -> None:
    """Errors: InputError for a wrong number; RunError for a process that was killed."""
    if len(argv) < 2 or not argv[0].isdigit() or not 0 < int(argv[0]) < 1 << 10:
        raise InputError("expected a number of processes and a script: python -m mpo.launch 2 train_sft.py --help")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    processes = int(argv[0])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ["MPO_LAUNCHED"] = "1"  # this program says which process was killed, if one was
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
        elastic_launch(config, sys.executable)(*argv[1:])
    except SignalException as e:
        raise Interrupted(int(e.sigval)) from None
    except ChildFailedError as e:
        # One that was killed, if any, rather by anything else than the SIGTERM that then ends the others.
        ends = ((failure.exitcode == -signal.SIGTERM, failure.exitcode, rank) for rank, failure in e.failures.items())
        _, status, rank = min(ends)
        if status > 0:
            sys.exit(status)  # it has said why
        name = signal.Signals(-status).name
        raise RunError(
            f"process {rank} of {processes} was killed ({name}); the same command goes on from the last save"
        ) from None


if __name__ == "__main__":
    run_plain(main)
