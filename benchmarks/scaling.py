"""How the time and memory of a DPO step grow with vocabulary, length, batch and width: python -m benchmarks.scaling

Compares this project, this project in plain torch, and trl. Measures the points that are missing from "scaling" in
bench.json, and draws docs/figures/scaling.png.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.run import hold, measure_missing, python_of, write_page
from experiments import figures
from experiments.grid import ROOT, commit, machine
from mpo.config import Few, Size
from mpo.runtime.cores import cores
from mpo.runtime.entry import run_plain
from mpo.runtime.files import read_json
from mpo.runtime.flags import parse

AXES = {
    "vocabulary": (2048, 8192, 32768),
    "tokens": (96, 192, 384, 768),
    "pairs": (4, 16, 64),
    "width": (128, 256, 512, 768, 1024, 2048),
}
BASE = {"vocabulary": 8192, "tokens": 192, "pairs": 16, "width": 256}
SMALLER = {"width": {"pairs": 4}}  # else a step of the largest model would take minutes
OURS = [sys.executable, "-m", "benchmarks.ours", "dpo-best"]
WAYS = {
    "this project": OURS,
    "this project, plain torch": ["env", "MPO_KERNELS=reference", *OURS],
    "trl": [python_of("now"), "benchmarks/peers.py", "dpo"],
}
ALONE = 2048  # the width from which on the memory of a machine holds only one way at a time


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Measure what is missing, and draw the figure."""

    repeats: Size = 3  # turns that count; one more goes before them
    threads: Few = 0  # threads of each process; 0: one per core
    again: bool = False  # measure again what has been measured already
    only: Literal["", "vocabulary", "tokens", "pairs", "width"] = ""  # only this size grows; other points are kept
    out: str = "benchmarks/bench.json"  # where the numbers are kept
    figure: str = "docs/figures/scaling.png"  # where the figure goes


def key(sizes: dict[str, int]) -> str:
    """The name of a point in bench.json."""
    return ", ".join(f"{k} {v}" for k, v in sizes.items())


def point(axis: str, value: int) -> dict[str, int]:
    """The sizes of one point of the figure."""
    return BASE | SMALLER.get(axis, {}) | {axis: value}


def measure(sizes: dict[str, int], config: ScalingConfig) -> dict[str, Any]:
    """Measure one point. The ways take turns. Returns the median time of a step, in seconds, and its memory, in MiB."""
    groups = [{way: command} for way, command in WAYS.items()] if sizes["width"] >= ALONE else [WAYS]
    results: dict[str, Any] = {"machine": machine(), "commit": commit()}
    for group in groups:
        rows = hold(group, config.repeats, config.threads or cores(), {"MPO_BENCH": json.dumps(sizes)})
        results |= {way: {"seconds": row["seconds"], "step_mib": row["step_mib"]} for way, row in rows.items()}
    return results


def draw(points: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the figure: time above, memory below, and a column for each size that grows."""

    def of(way: str, axis: str, value: int) -> tuple[float, float]:
        row = points[key(point(axis, value))][way]
        return row["seconds"], row["step_mib"]

    measured = {axis: [v for v in values if key(point(axis, v)) in points] for axis, values in AXES.items()}
    lines = {a: {way: {v: of(way, a, v) for v in values} for way in WAYS} for a, values in measured.items() if values}
    figures.growth(lines, ("seconds a step", "memory of the step, MiB"), path)


def main(config: ScalingConfig) -> None:
    """Measure point by point, writing each to bench.json at once; then draw the figure and write the page."""
    out = Path(config.out)
    wanted = {key(point(a, v)): point(a, v) for a, values in AXES.items() if config.only in ("", a) for v in values}
    found = measure_missing(out, "scaling", wanted, lambda name: measure(wanted[name], config), config.again)
    for name, row in found:
        print(name, {way: f"{row[way]['seconds']:.2f} s" for way in WAYS}, flush=True)
    draw(read_json(out)["scaling"], ROOT / config.figure)
    write_page(ROOT / "docs" / "benchmarks.md", read_json(out))
    print(f"written: {out}, {config.figure}")


if __name__ == "__main__":
    run_plain(lambda argv: main(parse(ScalingConfig, argv)))
