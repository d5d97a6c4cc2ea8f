"""python -m benchmarks.processes: tokens a second of DPO steps in one process and in several (DDP, FSDP2).

All processes share the cores of one machine. A long and a short run are timed and their difference is taken, so that
the time to start does not count. The ways take turns, and the table in docs/processes.md has their medians.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.plans import PROMPT, RESPONSE, ROOT, write_inputs
from experiments.grid import commit, machine
from mpo.runtime.cores import cores
from mpo.runtime.entry import run_plain
from mpo.runtime.errors import InputError
from mpo.runtime.files import write_between
from mpo.runtime.output import table

PAGE = ROOT / "docs" / "processes.md"
BEGIN, END = "<!-- written by benchmarks.processes -->\n", "<!-- end -->"
BATCH, SHORT, LONG, REPEATS, SIZE = 8, 4, 16, 5, "mini"


def ways(cores: int) -> dict[str, tuple[int, int, bool]]:
    """Name -> processes, threads of each, whether models are sharded."""
    result = {"1 process, 1 thread": (1, 1, False), f"1 process, {cores} threads": (1, cores, False)}
    for name, sharded in (("DDP", False), ("FSDP2", True)):
        result[f"{cores} processes, 1 thread each, {name}"] = (cores, 1, sharded)
    return result


def seconds(folder: Path, way: tuple[int, int, bool], steps: int) -> float:
    """How long a whole DPO stage with this many steps takes."""
    processes, threads, sharded = way
    start = ["-m", "mpo.runtime.launch", str(processes)] if processes > 1 else []
    inputs = ["--data", f"{folder}/data/train.jsonl", "--model", f"{folder}/model", "--out", f"{folder}/out"]
    sizes = ["--steps", str(steps), "--batch", str(BATCH), "--microbatch", str(BATCH // processes)]
    more = ["--overwrite", "true", "--threads", str(threads), "--shard", str(sharded), "--save_every", "1000"]
    command = [sys.executable, *start, "train_dpo.py", *inputs, *sizes, *more]
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - began


def main(argv: list[str]) -> None:
    """Measure, and write the table of the page."""
    if argv:
        raise InputError("usage: python -m benchmarks.processes")
    plan = ways(cores())
    rates: dict[str, list[float]] = {name: [] for name in plan}  # tokens a second
    tokens = BATCH * (PROMPT + 2 * RESPONSE) * (LONG - SHORT)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, SIZE)
        for _ in range(REPEATS):
            for way, sizes in plan.items():
                rates[way].append(tokens / (seconds(folder, sizes, LONG) - seconds(folder, sizes, SHORT)))
    medians = {way: statistics.median(values) for way, values in rates.items()}
    alone = medians["1 process, 1 thread"]
    rows = [
        [way, f"{rate:,.0f}", f"{rate / plan[way][0]:,.0f}", f"{rate / alone:.2f}"] for way, rate in medians.items()
    ]
    text = f"DPO steps of the `{SIZE}` preset on full rows, {REPEATS} repeats. "
    text += f"Machine: {machine()}. Commit: {commit()}.\n\n"
    text += table(["on this machine", "tokens/s", "of each process", "times one thread"], rows)
    write_between(PAGE, BEGIN, END, text + "\n")
    print(text)


if __name__ == "__main__":
    run_plain(main)
