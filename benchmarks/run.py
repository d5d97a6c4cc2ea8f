"""make bench: us and our peers in one run, taking turns; writes docs/benchmarks.md and bench.json."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.grid import ROOT, commit, machine
from mpo.artifacts import write_json
from mpo.config import parse, run_plain
from mpo.errors import InputError


@dataclass(frozen=True)
class Contest:
    """One row of the table: a case of ours against a case of a peer."""

    name: str
    ours: str  # a case of ours.py
    peer: str  # a case of peers.py
    environment: str  # the peer's, a folder of .peers/
    target: float  # how many times as fast we mean to be


CONTESTS = (
    Contest("DPO step, same maths, fp32", "dpo", "dpo", "now", 5.0),
    Contest("DPO step, reference cached", "dpo-best", "dpo", "now", 5.0),
    Contest("DPO step, reference cached, bf16", "dpo-best-bf16", "dpo", "now", 8.0),
    Contest("reward-model step", "reward", "reward", "now", 3.0),
    Contest("reward-model step, bf16", "reward-bf16", "reward", "now", 3.0),
    Contest("generation, fp32", "generate", "generate", "now", 3.0),
    Contest("generation, bf16", "generate-bf16", "generate", "now", 5.0),
    Contest("PPO iteration, fp32", "ppo", "ppo", "ppo", 3.0),
    Contest("PPO iteration, bf16", "ppo-bf16", "ppo", "ppo", 3.0),
)


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measure this project and its peers side by side."""

    repeats: int = 7  # turns of each, after one that does not count
    threads: int = 0  # of each; 0: one a core
    only: str = ""  # only the contests whose name holds this
    out: str = "bench.json"  # every number measured
    page: str = "docs/benchmarks.md"  # the table


class Worker:
    """A process that does one step a turn (turns.py)."""

    def __init__(self, command: list[str], threads: int):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.words = tempfile.TemporaryFile("w+")  # what it says besides  # noqa: SIM115
        self.command = command
        self.process = subprocess.Popen(
            [*command, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self.loaded_mib = self._read()["mib"]

    def turn(self) -> dict[str, Any]:
        """One step: {"seconds", "peak_mib"}."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        """End the process and wait for it."""
        self.process.kill()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.words.seek(0)
            words = self.words.read().strip().splitlines()[-5:]
            raise InputError(f"{' '.join(self.command)} ended: " + " | ".join(words))
        result: dict[str, Any] = json.loads(line)
        return result


def hold(contest: Contest, repeats: int, threads: int) -> dict[str, Any]:
    """Let both take turns; medians, and every time measured."""
    python = ROOT / ".peers" / contest.environment / "bin" / "python"
    workers = {
        "ours": Worker([sys.executable, "-m", "benchmarks.ours", contest.ours], threads),
        "peer": Worker([str(python), "benchmarks/peers.py", contest.peer], threads),
    }
    turns: dict[str, list[dict[str, Any]]] = {side: [] for side in workers}
    try:
        for _ in range(repeats + 1):
            for side, worker in workers.items():
                turns[side].append(worker.turn())
    finally:
        for worker in workers.values():
            worker.stop()
    row: dict[str, Any] = {"name": contest.name, "target": contest.target}
    for side, worker in workers.items():
        times = [turn["seconds"] for turn in turns[side][1:]]
        row[side] = statistics.median(times)
        row[f"{side}_all"] = times
        row[f"{side}_step_mib"] = turns[side][-1]["peak_mib"] - worker.loaded_mib
    row["ratio"] = row["peer"] / row["ours"]
    row["memory_ratio"] = row["ours_step_mib"] / row["peer_step_mib"]
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The contests as markdown."""
    lines = [
        "| what | ours, s | peer, s | times as fast | target | memory of the step, ours / peer, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        reached = "" if r["ratio"] >= r["target"] else " (missed)"
        times = f"{r['ours']:.3f} | {r['peer']:.3f} | {r['ratio']:.2f}"
        memory = f"{r['ours_step_mib']:.0f} / {r['peer_step_mib']:.0f}"
        lines.append(f"| {r['name']} | {times} | {r['target']:g}{reached} | {memory} |")
    return "\n".join(lines)


def main(config: BenchConfig) -> None:
    """Run the contests one after another, then write what was found."""
    threads = config.threads or os.cpu_count() or 1
    chosen = [c for c in CONTESTS if config.only in c.name]
    if not chosen:
        raise InputError(f"--only {config.only}: in no name of {', '.join(c.name for c in CONTESTS)}")
    rows = []
    for contest in chosen:
        rows.append(hold(contest, config.repeats, threads))
        print(f"{contest.name}: {rows[-1]['ratio']:.2f} times as fast (target {contest.target:g})", flush=True)
    found = {"machine": machine(), "commit": commit(), "threads": threads, "repeats": config.repeats, "rows": rows}
    write_json(Path(config.out), found)
    text = (ROOT / "benchmarks" / "page.md").read_text(encoding="utf-8")
    text = text.format(table=table(rows), **{k: found[k] for k in ("machine", "commit", "threads", "repeats")})
    Path(config.page).write_text(text, encoding="utf-8")
    print(f"written: {config.out}, {config.page}")


if __name__ == "__main__":
    run_plain(lambda argv: main(parse(BenchConfig, argv)))
