"""The time and memory of each stage of `make hh` in two runs: python -m benchmarks.stages RUN_BEFORE RUN_NOW

Reads the manifests of both runs. Writes "stages" in bench.json, and docs/benchmarks.md.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.run import write_page
from experiments.grid import ROOT, commit, machine
from mpo.runtime.entry import run_plain
from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json, write_json
from mpo.runtime.manifest import read_manifest
from mpo.runtime.output import table

STAGES = ("data", "tokenizer", "sft", "rm", "split", "dpo", "mpo", "eval")


def compare(before: Path, now: Path) -> str:
    """The table: seconds and peak memory of each stage in both runs, and how many times as fast the second one is."""
    rows, sums = [], [0.0, 0.0]
    for stage in STAGES:
        manifests = [read_manifest(run / stage / "manifest.json") for run in (before, now)]
        seconds, memory = [m["seconds"] for m in manifests], [m["peak_memory_mb"] for m in manifests]
        sums = [a + b for a, b in zip(sums, seconds, strict=True)]
        ratio = f"{seconds[0] / max(seconds[1], 0.1):.1f}"
        rows.append([stage, *(f"{s:.0f}" for s in seconds), ratio, *(f"{m:.0f}" for m in memory)])
    rows.append(["all", *(f"{s:.0f}" for s in sums), f"{sums[0] / sums[1]:.1f}", "", ""])
    return table(["stage", "plain, s", "now, s", "times as fast", "plain, MB", "now, MB"], rows)


def main(argv: list[str]) -> None:
    """Compare two runs, write the table and print it. Raises InputError without two run folders."""
    if len(argv) != 2:
        raise InputError("usage: python -m benchmarks.stages RUN_BEFORE RUN_NOW")
    text = compare(Path(argv[0]), Path(argv[1]))
    out = ROOT / "benchmarks" / "bench.json"
    bench = read_json(out) | {"stages": {"table": f"Machine: {machine()}. Commit: {commit()}.\n\n{text}"}}
    write_json(out, bench)
    write_page(ROOT / "docs" / "benchmarks.md", bench)
    print(text)


if __name__ == "__main__":
    run_plain(main)
