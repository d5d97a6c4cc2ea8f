"""make soak: long versions of the tests that kill stages and of the tests with malformed input.

    python -m tests.support.soak KILLS CASES PAGE

Every stage is killed KILLS times at random moments, and then within its writes. CASES malformed inputs are divided
among the readers. The results are written as tables to PAGE, which is docs/robustness.md.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.grid import commit, machine
from mpo.config import Range
from mpo.runtime.entry import run_plain
from mpo.runtime.errors import InputError
from mpo.runtime.files import write_between
from mpo.runtime.flags import read_number
from mpo.runtime.output import table
from tests.conftest import ROOT, run_pipeline
from tests.support.crashes import STAGES
from tests.support.fuzz import TARGETS, run_target

BEGIN, END = "<!-- written by make soak -->\n", "<!-- end -->"


def crashes(base: Path, work: Path, stage: str, kills: int, seed: int) -> dict[str, Any]:
    """Kill one stage this many times at random moments, or with 0 kills within its writes (crashes.py)."""
    command = [sys.executable, "-m", "tests.support.crashes", str(base), str(work), stage, str(kills), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


def kills_table(base: Path, work: Path, kills: int, seed: int) -> tuple[str, int]:
    """The table of killed stages, and how many of them ended with another result."""
    rows, wrong = [], 0
    for stage in STAGES:
        for count, how in ((kills, "at random"), (0, "within a write")):
            outcome = crashes(base, work / f"{stage}-{count}", stage, count, seed)
            wrong += not outcome["same"]
            same = "the same bytes" if outcome["same"] else "OTHER BYTES"
            rows.append([stage, how, *(str(outcome[k]) for k in ("kills", "resumed", "runs")), same])
            print(" ".join(rows[-1]), flush=True)
    return table(["stage", "killed", "kills", "went on from a save", "runs", "ended with"], rows), wrong


def inputs_table(cases: int, seed: int) -> tuple[str, int]:
    """The table of malformed inputs, and how many of them were neither accepted nor refused in one line."""
    rows, wrong = [], 0
    for target in TARGETS:
        result = run_target(target, math.ceil(cases / len(TARGETS)), seed)
        wrong += len(result["details"])
        names = ("cases", "refused", "accepted", "faults")
        rows.append([target, *(str(result.get(k, 0)) for k in names)])
        print(" ".join(rows[-1]), result["details"] or "", flush=True)
    return table(["reader", "inputs", "refused in one line", "accepted", "faults"], rows), wrong


def main(argv: list[str]) -> None:
    """Make both tables, and write them to the page. Raises InputError for wrong arguments."""
    if len(argv) != 3:
        raise InputError("usage: python -m tests.support.soak KILLS CASES PAGE")
    kills, cases = (int(read_number(n, int, Range(1), x)) for n, x in zip(("KILLS", "CASES"), argv, strict=False))
    page = Path(argv[2])
    if not page.is_file():
        raise InputError(f"{page}: no such file")
    began, seed = (
        time.time(),
        int(time.time()) % 100_000,
    )  # another seed each time, since a soak is a search for new faults
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        run_pipeline(base, "hh")
        kills_text, wrong_kills = kills_table(base, Path(folder), kills, seed)
        inputs_text, wrong_inputs = inputs_table(cases, seed)
    facts = f"Machine: {machine()}. Commit: {commit()}. Seed {seed}; {(time.time() - began) / 60:.0f} minutes."
    write_between(page, BEGIN, END, f"{facts}\n\n{kills_text}\n\n{inputs_text}\n")
    print(f"{wrong_kills} stages ended with other bytes, and {wrong_inputs} inputs caused a fault. Wrote {page}")
    sys.exit(wrong_kills + wrong_inputs > 0)


if __name__ == "__main__":
    run_plain(main)
