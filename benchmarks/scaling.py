"""How the time and memory of a DPO step grow with vocabulary, length, batch and width: python -m benchmarks.scaling

Compares this project, this project in plain torch, and trl. Measures the points that are missing from "scaling" in
bench.json, and draws docs/figures/scaling.png.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.run import hold, python_of, write_page
from experiments import figures
from experiments.grid import ROOT, commit, machine
from mpo.config import Few, Size
from mpo.runtime.cores import cores
from mpo.runtime.entry import run_plain
from mpo.runtime.files import read_json, write_json
from mpo.runtime.flags import parse

AXES = {
    "vocabulary": (2048, 8192, 32768),
    "tokens": (96, 192, 384, 768),
    "pairs": (4, 16, 64),
    "width": (128, 256, 512),
}
BASE = {"vocabulary": 8192, "tokens": 192, "pairs": 16, "width": 256}
OURS = [sys.executable, "-m", "benchmarks.ours", "dpo-best"]
WAYS: dict[str, tuple[list[str], dict[str, str]]] = {  # command, and what it has in its environment
    "this project": (OURS, {}),
    "this project, plain torch": (OURS, {"MPO_KERNELS": "reference"}),
    "trl": ([python_of("now"), "benchmarks/peers.py", "dpo"], {}),
}


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Measure what is missing, and draw the figure."""

    repeats: Size = 3  # turns that count; one more goes before them
    threads: Few = 0  # threads of each process; 0: one per core
    again: bool = False  # measure again what has been measured already
    out: str = "benchmarks/bench.json"  # where the numbers are kept
    figure: str = "docs/figures/scaling.png"  # where the figure goes


def key(sizes: dict[str, int]) -> str:
    """The name of a point in bench.json."""
    return ", ".join(f"{k} {v}" for k, v in sizes.items())


def measure(sizes: dict[str, int], config: ScalingConfig) -> dict[str, Any]:
    """Measure one point, one way after the other: the median time of a step, in seconds, and its memory, in MiB."""
    results = {}
    for way, (command, more) in WAYS.items():
        environment = {"MPO_BENCH": json.dumps(sizes)} | more
        row = hold({way: command}, config.repeats, config.threads or cores(), environment)[way]
        results[way] = {"seconds": row["seconds"], "step_mib": row["step_mib"]}
    return results


def draw(points: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the figure: time above, memory below, and a column for each size that grows."""

    def of(way: str, axis: str, value: int) -> tuple[float, float]:
        row = points[key(BASE | {axis: value})][way]
        return row["seconds"], row["step_mib"]

    lines = {axis: {way: {v: of(way, axis, v) for v in values} for way in WAYS} for axis, values in AXES.items()}
    figures.growth(lines, ("seconds a step", "memory of the step, MiB"), path)


def main(config: ScalingConfig) -> None:
    """Measure point by point, writing each to bench.json at once; then draw the figure and write the page."""
    out = Path(config.out)
    everything = read_json(out) if out.exists() else {}
    kept = everything.get("scaling", {})
    points = {} if config.again else kept.get("points", {})
    for axis, values in AXES.items():
        for value in values:
            sizes = BASE | {axis: value}
            if key(sizes) not in points:
                points[key(sizes)] = measure(sizes, config)
                print(
                    key(sizes), {way: f"{row['seconds']:.2f} s" for way, row in points[key(sizes)].items()}, flush=True
                )
                about = {"machine": machine(), "commit": commit(), "points": points}
                write_json(out, everything | {"scaling": about})
    draw(points, ROOT / config.figure)
    write_page(ROOT / "docs" / "benchmarks.md", read_json(out))
    print(f"written: {out}, {config.figure}, docs/benchmarks.md")


if __name__ == "__main__":
    run_plain(lambda argv: main(parse(ScalingConfig, argv)))
