"""make soak: the long versions of the tests that promise something. Their figures go into docs/robustness.md.

python -m tests.support.soak KILLS CASES [PAGE]: so many kills of every stage, so many malformed inputs altogether.
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
from mpo.runtime.files import write_between
from mpo.runtime.tables import table
from tests.conftest import ROOT, run_pipeline
from tests.support.crashes import STAGES
from tests.support.fuzz import TARGETS, run_target

BEGIN, END = "<!-- written by make soak -->\n", "<!-- end -->"


def crashes(base: Path, work: Path, stage: str, kills: int, seed: int) -> dict[str, Any]:
    """Kill one stage again and again (crashes.py); 0 kills: at every point of a write instead."""
    command = [sys.executable, "-m", "tests.support.crashes", str(base), str(work), stage, str(kills), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def kills_table(base: Path, work: Path, kills: int, seed: int) -> tuple[str, int]:
    """Every stage killed at random, then at each point of a write; and how many went wrong."""
    rows, wrong = [], 0
    for stage in STAGES:
        for count, how in ((kills, "at random"), (0, "within a write")):
            found = crashes(base, work / f"{stage}-{count}", stage, count, seed)
            wrong += not found["same"]
            same = "the same bytes" if found["same"] else "OTHER BYTES"
            rows.append([stage, how, *(str(found[k]) for k in ("kills", "resumed", "runs")), same])
            print(" ".join(rows[-1]), flush=True)
    return table(["stage", "killed", "kills", "went on from a save", "runs", "ended with"], rows), wrong


def inputs_table(cases: int, seed: int) -> tuple[str, int]:
    """Every reader's malformed inputs; and how many ended in anything but acceptance or one line."""
    rows, wrong = [], 0
    for target in TARGETS:
        found = run_target(target, math.ceil(cases / len(TARGETS)), seed)
        wrong += len(found["details"])
        names = ("cases", "refused", "accepted", "faults")
        rows.append([target, *(str(found.get(k, 0)) for k in names)])
        print(" ".join(rows[-1]), found["details"] or "", flush=True)
    return table(["reader", "inputs", "refused in one line", "accepted", "faults"], rows), wrong


def main() -> None:
    """Run both, and write the page."""
    kills, cases, page = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    began, seed = time.time(), int(time.time()) % 100_000  # other ones every time: a soak is a search
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        run_pipeline(base, "hh")
        killed, wrong_kills = kills_table(base, Path(folder), kills, seed)
        tried, wrong_inputs = inputs_table(cases, seed)
    facts = f"Machine: {machine()}. Commit: {commit()}. Seed {seed}; {(time.time() - began) / 60:.0f} minutes."
    write_between(page, BEGIN, END, f"{facts}\n\n{killed}\n\n{tried}\n")
    print(f"{wrong_kills} stages ended otherwise, {wrong_inputs} inputs; written: {page}")
    sys.exit(wrong_kills + wrong_inputs > 0)


if __name__ == "__main__":
    main()
