"""What each stage of `make hh` took in two runs, from their manifests: python -m benchmarks.stages BEFORE NOW

Writes bench.json's "stages" and docs/benchmarks.md.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.run import write_page
from experiments.grid import ROOT, commit, machine
from mpo.runtime.entry import run_plain
from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json, write_json
from mpo.runtime.stage import read_manifest
from mpo.runtime.tables import table

STAGES = ("data", "tokenizer", "sft", "rm", "split", "dpo", "mpo", "eval")


def compare(before: Path, now: Path) -> str:
    """The table: seconds and peak memory of each stage, and how many times as fast it is."""
    rows, sums = [], [0.0, 0.0]
    for stage in STAGES:
        found = [read_manifest(run / stage / "manifest.json") for run in (before, now)]
        seconds, memory = [m["seconds"] for m in found], [m["peak_memory_mb"] for m in found]
        sums = [a + b for a, b in zip(sums, seconds, strict=True)]
        ratio = f"{seconds[0] / max(seconds[1], 0.1):.1f}"
        rows.append([stage, *(f"{s:.0f}" for s in seconds), ratio, *(f"{m:.0f}" for m in memory)])
    rows.append(["all", *(f"{s:.0f}" for s in sums), f"{sums[0] / sums[1]:.1f}", "", ""])
    return table(["stage", "plain, s", "now, s", "times as fast", "plain, MB", "now, MB"], rows)


def main(argv: list[str]) -> None:
    """Compare, write, print."""
    if len(argv) != 2:
        raise InputError("usage: python -m benchmarks.stages RUN_BEFORE RUN_NOW")
    text = compare(Path(argv[0]), Path(argv[1]))
    out = ROOT / "benchmarks" / "bench.json"
    found = read_json(out) | {"stages": {"table": f"Machine: {machine()}. Commit: {commit()}.\n\n{text}"}}
    write_json(out, found)
    write_page(ROOT / "docs" / "benchmarks.md", found)
    print(text)


if __name__ == "__main__":
    run_plain(main)
