"""Stages in several processes, forked from one that has imported everything: python -m tests.support.group RUN WORK

Runs every case below and the same stage in one process, into WORK/<stage>-<processes>[-sharded].
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import torch

from tests.support.crashes import FEWER, start, wait

# stage (crashes.STAGES), processes, sharded
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


SELDOM = ("--save_every", "1000")  # how processes save together is seen in test_parallel.py


def name(stage: str, count: int, sharded: bool) -> str:
    """Of a case's folder."""
    return f"{stage}-{count}" + ("-sharded" if sharded else "")


def free_port() -> str:
    """One that nothing listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def together(stage: str, base: Path, out: Path, count: int, *more: str) -> list[int]:
    """A stage in `count` processes, as torchrun would start them; their exit statuses."""
    port = free_port()

    def join(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    children = [start(stage, base, out, *more, before=lambda rank=rank: join(rank)) for rank in range(count)]
    return [wait(child) for child in children]


def main() -> None:
    """Every case, and each stage alone."""
    base, work = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    for stage, count, sharded in [*sorted({(stage, 1, False) for stage, _, _ in CASES}), *CASES]:
        out = work / name(stage, count, sharded)
        few = FEWER[stage.split("-")[0]].split()
        statuses = together(
            stage, base, out, count, *few, "--shard", str(sharded), "--recompute", str(count == 4), *SELDOM
        )
        if any(statuses):
            sys.exit(f"{out.name} ended with {statuses}: {out.with_suffix('.log').read_text()[-3000:]}")


if __name__ == "__main__":
    main()
