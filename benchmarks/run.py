"""make bench: this project and its peers, timed in turns in one run. Writes bench.json and docs/benchmarks.md."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import workload
from experiments.grid import ROOT, commit, machine
from mpo.config import Few, Size
from mpo.runtime.cores import cores
from mpo.runtime.entry import run_plain
from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json, write_json, write_text
from mpo.runtime.flags import parse
from mpo.runtime.output import table

Row = dict[str, Any]


@dataclass(frozen=True)
class Contest:
    """One row of the first table: a case of this project against a case of a peer."""

    name: str
    ours: str  # a case of ours.py; with -bf16, products in bf16
    peer: str  # a case of peers.py
    environment: str  # the peer's environment, a folder of .peers/
    target: float  # how many times as fast as the peer this project aims to be


CONTESTS = (
    Contest("DPO step, same maths", "dpo", "dpo", "now", 5.0),
    Contest("DPO step, reference cached", "dpo-best", "dpo", "now", 5.0),
    Contest("DPO step, reference cached, bf16", "dpo-best-bf16", "dpo", "now", 8.0),
    Contest("reward-model step", "reward", "reward", "now", 3.0),
    Contest("reward-model step, bf16", "reward-bf16", "reward", "now", 3.0),
    Contest("generation", "generate", "generate", "now", 3.0),
    Contest("generation, bf16", "generate-bf16", "generate", "now", 5.0),
    Contest("PPO iteration", "ppo", "ppo", "ppo", 3.0),
    Contest("PPO iteration, bf16", "ppo-bf16", "ppo", "ppo", 3.0),
    Contest("PPO iteration, shared critic", "ppo-shared", "ppo", "ppo", 5.0),
    Contest("PPO iteration, shared critic, bf16", "ppo-shared-bf16", "ppo", "ppo", 5.0),
)


GROWTH = "Seconds and memory of a step against vocabulary, tokens of a text, pairs and width."


@dataclass(frozen=True)
class Heads:
    """Rows of the second table: ways to compute log-probs from hidden states."""

    name: str
    suffix: str  # which is added to each way to name a case of heads.py
    ways: tuple[str, ...]


ALONE = ("ours", "product", "plain", "torch.compile", "linear_cross_entropy", "trl", "cut-cross-entropy")
PAIR = ("ours", "product", "plain", "torch.compile")
HEADS = (
    Heads("log-probs", "", ALONE),
    Heads("log-probs, with gradients", "-backward", tuple(way for way in ALONE if way != "product")),
    Heads("policy, reference, KL, entropy", "-pair", PAIR),
)
OURS, BF16, PLAIN, TRL = REAL_WAYS = ("this project", "in bf16", "plain torch", "trl")  # of real.py
CACHED, PEER = "reference cached", "peer"  # further ways of others.py, beside OURS
THEIRS = ("trl", "cut-cross-entropy")  # ways that run in the peers' environment


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measure this project and its peers side by side."""

    repeats: Size = 7  # turns that count; one more goes before them
    threads: Few = 0  # threads of each process; 0: one per core
    only: str = ""  # measure only the rows whose name contains this, and keep the others
    out: str = "benchmarks/bench.json"  # every number measured
    page: str = "docs/benchmarks.md"  # the tables


@dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """Measure the rows that are missing, and write the page."""

    repeats: Size = 3  # turns that count; one more goes before them
    threads: Few = 0  # threads of each process; 0: one per core
    again: bool = False  # measure again what has been measured already
    only: str = ""  # only the rows whose name contains this; the others are kept
    out: str = "benchmarks/bench.json"  # where the numbers are kept
    page: str = "docs/benchmarks.md"  # the table


class Worker:
    """A process that does one step each turn (turns.py)."""

    def __init__(self, command: Sequence[str], threads: int, more: Mapping[str, str] | None = None):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | dict(more or {})
        self.words = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # its stderr  # noqa: SIM115
        self.command = [*command, str(threads)]
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,
            encoding="utf-8",
            cwd=ROOT,
            env=environment,
        )
        self.loaded_mib = self._read()["mib"]

    def turn(self) -> Row:
        """Do one step; returns {"seconds", "peak_mib"}. Raises InputError if the process has ended."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        """End the process and wait for it."""
        self.process.kill()
        self.process.wait()

    def _read(self) -> Row:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.words.seek(0)
            words = self.words.read().strip().splitlines()[-5:]
            raise InputError(f"{' '.join(self.command)} ended: " + " | ".join(words))
        result: Row = json.loads(line)
        return result


def hold(
    commands: Mapping[str, Sequence[str]], repeats: int, threads: int, environment: Mapping[str, str] | None = None
) -> dict[str, Row]:
    """Let all commands take turns.

    Returns for each name {"seconds", "all", "step_mib"}: the median time, every time, and by how many MiB the peak of a
    step exceeds what the process held once everything was loaded. Where a worker reports the loss of its steps, there
    is "losses", too, with the turn that does not count.
    """
    workers: dict[str, Worker] = {}
    turns: dict[str, list[Row]] = {name: [] for name in commands}
    scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # workers are killed, and leave their files
    try:
        for name, command in commands.items():
            workers[name] = Worker(command, threads, {"TMPDIR": scratch.name} | dict(environment or {}))
        for _ in range(repeats + 1):
            for name, worker in workers.items():
                turns[name].append(worker.turn())
    finally:
        for worker in workers.values():
            worker.stop()
        scratch.cleanup()
    results = {}
    for name, worker in workers.items():
        times = [turn["seconds"] for turn in turns[name][1:]]
        step_mib = turns[name][-1]["peak_mib"] - worker.loaded_mib
        results[name] = {"seconds": statistics.median(times), "all": times, "step_mib": step_mib}
        if losses := [turn["loss"] for turn in turns[name] if "loss" in turn]:
            results[name]["losses"] = losses
    return results


def measure_missing(
    out: Path, key: str, names: Iterable[str], measure: Callable[[str], Row], again: bool
) -> Iterator[tuple[str, Row]]:
    """Measure those of the named rows that `out` does not have under this key or, with `again`, all of them.

    Each is written at once, so that a run that is stopped goes on with the next row. Yields each row with its name.
    """

    def read() -> Row:
        return read_json(out) if out.exists() else {}

    for name in names:
        if again or name not in read().get(key, {}):
            row = measure(name)
            everything = read()  # again, since another command may have written to it in the meantime
            write_json(out, everything | {key: everything.get(key, {}) | {name: row}})
            yield name, row


def python_of(environment: str) -> str:
    """The Python interpreter of one of the peers' environments."""
    return str(ROOT / ".peers" / environment / "bin" / "python")


def contest(c: Contest, repeats: int, threads: int) -> Row:
    """Measure one row of the first table: both sides, and how many times as fast this project is."""
    commands = {
        "ours": [sys.executable, "-m", "benchmarks.ours", c.ours],
        "peer": [python_of(c.environment), "benchmarks/peers.py", c.peer],
    }
    sides = hold(commands, repeats, threads)
    row: Row = {"name": c.name, "target": c.target, "gflops": workload.flops(c.ours) / 1e9} | sides
    row["ratio"] = sides["peer"]["seconds"] / sides["ours"]["seconds"]
    row["memory_ratio"] = sides["ours"]["step_mib"] / sides["peer"]["step_mib"]
    return row


def heads(h: Heads, size: tuple[int, ...], repeats: int, threads: int) -> Row:
    """Measure one row of the second table: all ways at one size (N, V, D)."""
    commands = {}
    for way in h.ways:
        case = way + h.suffix.replace("-backward", "") + ("-backward" if "backward" in h.suffix else "")
        python = python_of("now") if way in THEIRS else sys.executable
        commands[way] = [python, "-m", "benchmarks.heads", case, *map(str, size)]
    return {"name": f"{h.name}, {size[0]} x {size[1]} x {size[2]}"} | hold(commands, repeats, threads)


def rate(threads: int) -> float:
    """The speed of a large matrix product in fp32, in GFLOP/s, which the page calls the peak of the machine.

    It is the faster one of torch's product and ours: on some processors torch's uses only half of a vector.
    """
    ways = {c: [sys.executable, "-m", "benchmarks.heads", c, "512", "512", "16384"] for c in ("product", "linear")}
    results = hold(ways, 9, threads)
    return 2e-9 * 512 * 512 * 16384 / min(time for row in results.values() for time in row["all"])


def first_table(rows: Sequence[Row], peak: float) -> str:
    """The contests. `peak`: of the machine, in GFLOP/s; benchmarks/page.md explains the columns."""
    header = [
        "what",
        "ours, s",
        "peer, s",
        "times as fast",
        "target",
        "MiB of the step",
        "share of the peak",
        "at the peak",
    ]
    lines = []
    for r in rows:
        reached = "" if r["ratio"] >= r["target"] else " (missed)"
        share = r["gflops"] / r["ours"]["seconds"] / peak
        memory = f"{r['ours']['step_mib']:.0f} / {r['peer']['step_mib']:.0f}"
        times = [f"{r[side]['seconds']:.3f}" for side in ("ours", "peer")]
        most = "-" if "bf16" in r["name"] else f"{r['ratio'] / share:.1f}"  # the peak of bf16 is another one
        what = [r["name"], *times, f"{r['ratio']:.2f}", f"{r['target']:g}{reached}", memory]
        lines.append([*what, f"{100 * share:.0f} %", most])
    return table(header, lines)


def second_table(rows: Sequence[Row]) -> str:
    """The ways to compute log-probs: milliseconds and MiB of each."""
    lines = []
    for r in rows:
        cells = [f"{1e3 * r[w]['seconds']:.0f} / {r[w]['step_mib']:.0f}" if w in r else "-" for w in ALONE]
        lines.append([r["name"], *cells])
    return table(["ms / MiB", *ALONE], lines)


def origins(rows: Mapping[str, Row]) -> list[str]:
    """A line for each machine and commit on which rows were measured."""
    return sorted({f"Machine: {row['machine']}. Commit: {row['commit']}." for row in rows.values()})


def real_table(rows: Mapping[str, Row]) -> str:
    """Steps a second of each way on a real model's shape (real.py), and how many times as fast this project is."""
    if not rows:
        return "Not measured yet: python -m benchmarks.real"
    header = ["steps a second", *REAL_WAYS, "times plain torch", "times trl", "MiB of the step"]
    lines = []
    for name, row in rows.items():
        rates = [f"{1 / row[way]['seconds']:.2f}" if way in row else "-" for way in REAL_WAYS]
        times = [f"{row[way]['times']:.2f}" if way in row else "-" for way in (PLAIN, TRL)]
        memory = " / ".join(f"{row[way]['step_mib']:.0f}" if way in row else "-" for way in (OURS, PLAIN, TRL))
        lines.append([name, *rates, *times, memory])
    return "\n".join([*origins(rows), "", table(header, lines)])


def others_table(rows: Mapping[str, Row]) -> str:
    """Seconds and memory of each side of a step (others.py), and how many times as fast as the peer this project is."""
    if not rows:
        return "Not measured yet: python -m benchmarks.others"
    header = ["what", "ours, s", "ours, cached, s", "peer, s", "times as fast", "cached, times as fast"]
    lines = []
    for name, row in rows.items():
        seconds = [f"{row[way]['seconds']:.3f}" if way in row else "-" for way in (OURS, CACHED, PEER)]
        times = [f"{row[way]['times']:.2f}" if way in row else "-" for way in (OURS, CACHED)]
        lines.append([name, *seconds, *times, f"{row[OURS]['step_mib']:.0f} / {row[PEER]['step_mib']:.0f}"])
    return "\n".join([*origins(rows), "", table([*header, "MiB of the step"], lines)])


def profile(case: str, threads: int) -> Row:
    """The seconds that each compiled function takes of a step of this project (breakdown.py)."""
    command = [sys.executable, "-m", "benchmarks.breakdown", case, str(threads)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    result: Row = json.loads(done.stderr.splitlines()[-1])  # turns.py sends everything but its own lines to stderr
    return result


def third_table(profiles: Mapping[str, Row]) -> str:
    """The share of a step that each compiled function takes, with one column for each case."""
    names = sorted(
        {n for row in profiles.values() for n in row}, key=lambda n: -max(r.get(n, 0) for r in profiles.values())
    )
    total = {case: sum(row.values()) for case, row in profiles.items()}
    lines = [[n, *(f"{100 * r[n] / total[c]:.1f} %" if n in r else "" for c, r in profiles.items())] for n in names]
    return table(["share of a step", *profiles], [*lines, ["seconds", *(f"{s:.3f}" for s in total.values())]])


def write_page(path: Path, bench: Mapping[str, Any]) -> None:
    """Fill the template page.md with the content of bench.json. Without the rows of `make bench` there is no page."""
    if "rows" not in bench:
        print(f"{path}: not written, since `make bench` has not measured its first table yet")
        return
    scaling, growth = bench.get("scaling"), "Not measured yet: python -m benchmarks.scaling"
    if scaling:
        growth = "\n".join([*origins(scaling), "", f"![{GROWTH}](figures/scaling.png)"])
    more = {
        "table": first_table(bench["rows"], bench["peak"]),
        "heads": second_table(bench["heads"]),
        "scaling": growth,
        "real": real_table(bench.get("real", {})),
        "others": others_table(bench.get("others", {})),
        "profile": third_table(bench["profiles"]) if "profiles" in bench else "not measured yet",
        "profile_machine": bench.get("profile_machine", ""),
        "stages": bench.get("stages", {}).get("table", "not measured yet"),
    }
    text = (ROOT / "benchmarks" / "page.md").read_text(encoding="utf-8")
    write_text(path, text.format(**dict(bench) | more))


def main(config: BenchConfig) -> None:
    """Measure the rows that are asked for, one after another, then write bench.json and the page."""
    threads = config.threads or cores()
    before: Row = read_json(Path(config.out)) if Path(config.out).exists() else {}
    rows = {r["name"]: r for r in before.get("rows", []) if config.only}
    head_rows = {r["name"]: r for r in before.get("heads", []) if config.only}
    about = {name: before.get(name) for name in ("machine", "commit", "threads", "repeats", "peak")}
    if config.only != "profile":  # the profile has an entry "profile_machine" of its own
        about = {"machine": machine(), "commit": commit(), "threads": threads}
        about |= {"repeats": config.repeats, "peak": rate(threads)}
        print(f"matrix products: {about['peak']:.0f} GFLOP/s", flush=True)
    for c in (c for c in CONTESTS if config.only in c.name):
        rows[c.name] = contest(c, config.repeats, threads)
        print(f"{c.name}: {rows[c.name]['ratio']:.2f} times as fast (target {c.target:g})", flush=True)
    for h in (h for h in HEADS if config.only in h.name):
        for size in workload.HEADS:
            row = heads(h, size, config.repeats, threads)
            head_rows[row["name"]] = row
            print(row["name"] + ": " + ", ".join(f"{w} {1e3 * row[w]['seconds']:.0f} ms" for w in h.ways), flush=True)
    kept = {k: v for k, v in before.items() if k not in (*about, "rows", "heads")}
    if config.only in "profile":
        cases = ("dpo-best", "reward", "generate", "ppo-shared")
        kept |= {"profiles": {c: profile(c, threads) for c in cases}, "profile_machine": machine()}
    write_json(Path(config.out), about | {"rows": list(rows.values()), "heads": list(head_rows.values())} | kept)
    write_page(Path(config.page), read_json(Path(config.out)))
    print(f"written: {config.out}, {config.page}")


if __name__ == "__main__":
    run_plain(lambda argv: main(parse(BenchConfig, argv)))
