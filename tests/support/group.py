"""Run stages in several processes, and the same stages in one process: python -m tests.support.group RUN WORK

The stages read the data and models of RUN, a finished run. Each writes WORK/<stage>-<processes>[-sharded]. Their
processes are forked from this one, so that torch is imported only once. test_distributed.py compares the results.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import torch

from mpo.tools import memory
from tests.support.crashes import SHORTEST, start, wait

# (stage, a key of crashes.STAGES; number of processes; whether the model is sharded)
CASES = [
    ("sft", 4, False),
    ("rm", 2, True),
    ("dpo-bco", 4, True),
    ("ppo", 2, False),
    ("ppo-shared", 2, True),
    ("ppo-grpo", 4, True),
    ("dpo-lora", 2, True),
    ("ppo-lora", 2, False),
]
SHORT_OF_MEMORY = ("ppo-grpo", "ppo-lora")  # sample one row at a time and, sharded, gather layers in turn
# Saves cost time, so only the last step is saved. test_distributed.py tests how several processes save.
LAST_SAVE_ONLY = ("--save_every", "1000")


def case_name(stage: str, count: int, sharded: bool) -> str:
    """The name of the folder that a case writes."""
    return f"{stage}-{count}" + ("-sharded" if sharded else "")


def free_port() -> str:
    """A TCP port that no process is using."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def run_group(stage: str, base: Path, out: Path, count: int, *more: str) -> list[int]:
    """Run a stage in `count` processes, as torchrun would start them. Returns their exit statuses."""
    port = free_port()

    def join(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if stage in SHORT_OF_MEMORY and count > 1:
            memory.capacity_of_device = lambda: 0.0

    children = [start(stage, base, out, *more, before=lambda rank=rank: join(rank)) for rank in range(count)]
    return [wait(child) for child in children]


def main() -> None:
    """Run each stage in one process, and then every case."""
    base, work = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    for stage, count, sharded in [*sorted({(stage, 1, False) for stage, _, _ in CASES}), *CASES]:
        out = work / case_name(stage, count, sharded)
        short = SHORTEST[stage.split("-")[0]].split()
        # Where a gradient is nearly 0, AdamW makes a share of a whole step of its rounding; so the steps are small.
        flags = ("--shard", str(sharded), "--recompute", str(count == 4), *LAST_SAVE_ONLY, "--lr", "2e-4")
        statuses = run_group(stage, base, out, count, *short, *flags)
        if any(statuses):
            sys.exit(f"{out.name} ended with {statuses}: {out.with_suffix('.log').read_text()[-3000:]}")


if __name__ == "__main__":
    main()
