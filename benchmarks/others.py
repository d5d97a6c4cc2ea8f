"""SFT and DPO steps beside more peers: python -m benchmarks.others

The peers are torchtune, LLaMA-Factory, and a model in one file of plain torch (plain.py). All sides begin with the same
weights and compute the same rows, and a row is kept only if the losses of all sides agree. Measures the rows that are
missing from "others" in bench.json and writes each at once, so that a run that is stopped goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.run import CACHED, OURS, PEER, Row, RowsConfig, hold, measure_missing, python_of, write_page
from experiments.grid import ROOT, commit, machine
from mpo.runtime.cores import cores
from mpo.runtime.entry import run_plain
from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json
from mpo.runtime.flags import parse

PLAIN = [sys.executable, "-m", "benchmarks.plain"]
PEERS = {  # name -> its command, to which the case is added, and what is added to the case
    "torchtune": ([python_of("torchtune"), "benchmarks/peer_torchtune.py"], ""),
    "LLaMA-Factory": ([python_of("llamafactory"), "benchmarks/peer_llamafactory.py"], ""),
    "plain torch": (PLAIN, ""),
    "plain torch, compiled": (PLAIN, "-compiled"),
}
STAGES = {  # name -> the case of every side, and our other cases
    "SFT step": ("sft", {}),
    "DPO step": ("dpo", {CACHED: "dpo-best"}),
}
TOLERANCE = 1e-4  # by how much losses may differ, as a share of the loss


def names() -> list[str]:
    """The rows of the table."""
    return [f"{stage}, {peer}" for stage in STAGES for peer in PEERS]


def commands(name: str) -> dict[str, list[str]]:
    """The command of each side of a row."""
    stage, peer = name.split(", ", 1)
    case, more = STAGES[stage]
    command, suffix = PEERS[peer]
    ours = {OURS: case} | more
    return {way: [sys.executable, "-m", "benchmarks.ours", c] for way, c in ours.items()} | {
        PEER: [*command, case + suffix]
    }


def check_losses(name: str, rows: Mapping[str, Row]) -> None:
    """Raise InputError where a side reports another loss than we do, before its first step or after one step."""
    for way, row in rows.items():
        for step, (ours, loss) in enumerate(zip(rows[OURS]["losses"][:2], row["losses"][:2], strict=True)):
            if not abs(loss - ours) <= TOLERANCE * abs(ours):
                raise InputError(f"{name}: after {step} steps the loss is {loss} ({way}) and {ours} (ours)")


def measure(name: str, config: RowsConfig) -> Row:
    """Measure one row: seconds and MiB of a step of each side, and how many times as fast as the peer we are."""
    rows = hold(commands(name), config.repeats, config.threads or cores())
    check_losses(name, rows)
    peer = rows[PEER]["seconds"]
    sides = {way: row if way == PEER else row | {"times": peer / row["seconds"]} for way, row in rows.items()}
    return sides | {"machine": machine(), "commit": commit()}


def main(config: RowsConfig) -> None:
    """Measure row by row; then write the page."""
    out = Path(config.out)
    wanted = [name for name in names() if config.only in name]
    for name, row in measure_missing(out, "others", wanted, lambda name: measure(name, config), config.again):
        print(f"{name}: {row[OURS]['times']:.2f} times as fast", flush=True)
    write_page(ROOT / config.page, read_json(out))
    print(f"written: {out}")


if __name__ == "__main__":
    run_plain(lambda argv: main(parse(RowsConfig, argv)))
