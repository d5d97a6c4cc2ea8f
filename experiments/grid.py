"""A grid of cells. A cell is one policy, trained by make and evaluated by eval.py; a finished cell has a row.

A grid may be killed at any moment. The same command then continues: make keeps finished stages, and a cell that has
a row is not run again. One worker runs all cells of a run folder, in order. Each worker uses a single thread, which
is the fastest way to fill a machine with models this small.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mpo.data.rows import read_jsonl
from mpo.runtime.cores import cores
from mpo.runtime.errors import InputError, RunError
from mpo.runtime.files import read_json

ROOT = Path(__file__).parent.parent
PROMPTS = 400


@dataclass(frozen=True)
class Cell:
    """One policy of one run, and how make trains it."""

    grid: str  # the grid it belongs to
    task: str
    seed: int
    variant: str  # what is different in this run; "" for nothing
    policy: str  # its folder in the run (Makefile)
    run: str  # the run folder
    source: str = ""  # the run whose stages this one shares: make's FROM
    variables: Mapping[str, str] = field(default_factory=dict)  # make variables: DPO_FLAGS, mpo_FLAGS, LOSS, ...
    prompts: int = PROMPTS  # held-out prompts of the evaluation
    patch: str = ""  # the patch of experiments/patches.py that one of its stages is run with
    made: bool = False  # the stages that it shares are finished, so that nothing has to be made in `source`

    @property
    def key(self) -> tuple[str, str, int, str, str]:
        """The fields that identify this cell's row."""
        return self.grid, self.task, self.seed, self.variant, self.policy

    @property
    def settings(self) -> dict[str, str]:
        """What else this cell's result depends on. It is recorded in the row."""
        patch = {"patch": self.patch} if self.patch else {}
        return {"prompts": str(self.prompts)} | patch | dict(self.variables)


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file; [] if there is no file."""
    return [row for _, row in read_jsonl(path)] if path.exists() else []


def finished(cells: Sequence[Cell], results: Path) -> set[tuple[str, str, int, str, str]]:
    """The keys of the cells that have a row. Raises InputError if a row was made with other flags than its cell has."""
    rows = {tuple(row[k] for k in ("grid", "task", "seed", "variant", "policy")): row for row in read_results(results)}
    done = set()
    for cell in cells:
        if row := rows.get(cell.key):
            now, then = cell.settings, row["settings"]
            if now != then:
                other = {k: (then.get(k), now.get(k)) for k in now | then if then.get(k) != now.get(k)}
                name = " ".join(map(str, cell.key))
                raise InputError(f"{results}: {name} was run with other flags (then, now): {other}; move the file away")
            done.add(cell.key)
    return done


def run_cells(cells: Sequence[Cell], results: Path, jobs: int, after_each: Callable[[], None] = lambda: None) -> int:
    """Run every cell that has no row yet, `jobs` run folders at a time; returns the number of cells that failed.

    `after_each` is called, by one worker at a time, whenever a row has been written.
    """
    done = finished(cells, results)
    waiting: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.key not in done:
            waiting.setdefault(cell.run, []).append(cell)
    left = sum(map(len, waiting.values()))
    if left:
        print(f"{results.name}: {len(cells)} cells, {left} to run, {jobs} at a time", flush=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    lock, failed = threading.Lock(), [0]
    sources = {cell.source: threading.Lock() for cell in cells}

    def work(cells_of_run: list[Cell]) -> None:
        for cell in cells_of_run:
            try:
                if cell.source and not cell.made:  # the first run to need the shared stages makes them; the others wait
                    with sources[cell.source]:
                        make(
                            replace(cell, run=cell.source, source=""),
                            "policy-rm",
                            ROOT / cell.source / "logs" / "rm.log",
                        )
                row = run_cell(cell)
            except subprocess.CalledProcessError as e:
                failed[0] += 1
                print(f"FAILED {' '.join(map(str, cell.key))}: see {e.cmd}", file=sys.stderr, flush=True)
                continue
            with lock:
                with results.open("a", encoding="utf-8") as f:
                    f.write(json.dumps(row) + "\n")
                after_each()
            print(f"{' '.join(map(str, cell.key))}: gold {row['gold']:.2f}, KL {row['kl']:.2f}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, waiting.values()))
    return failed[0]


def run_cell(cell: Cell) -> dict[str, Any]:
    """Train a policy, evaluate it and the intermediate models that were kept, and return its row.

    Raises CalledProcessError, whose cmd is the path of the log, if a stage fails.
    """
    folder = ROOT / cell.run / cell.policy
    log = ROOT / cell.run / "logs" / f"{cell.policy}.log"
    make(cell, f"policy-{cell.policy} policy-rm", log)
    kept = sorted(folder.glob("step-*"), key=lambda p: int(p.name[5:]))
    policies = {"sft": f"{cell.run}/sft"} | {p.name: f"{cell.run}/{cell.policy}/{p.name}" for p in kept}
    policies[cell.policy] = f"{cell.run}/{cell.policy}"
    evaluated = f"{cell.run}/evals/{cell.policy}"
    flags = {"data": f"{cell.run}/data", "rm": f"{cell.run}/rm", "out": evaluated, "overwrite": "true"}
    flags |= {"seed": str(cell.seed), "prompts": str(cell.prompts)}
    flags["policies"] = ",".join(f"{name}={path}" for name, path in policies.items())
    _call([sys.executable, "eval.py", *(part for k, v in flags.items() for part in (f"--{k}", v))], log)
    key = {"grid": cell.grid, "task": cell.task, "seed": cell.seed, "variant": cell.variant}
    row = key | row_of(ROOT / evaluated, cell.policy, folder)
    check_patch(cell)
    return row | {"rm": reward_model(ROOT / cell.run / "rm"), "settings": cell.settings}


def check_patch(cell: Cell) -> None:
    """Raise RunError unless the stages of the cell's run were made with its patch, and with no other."""
    manifests = (read_json(path) for path in sorted((ROOT / cell.run).glob("*/manifest.json")))
    marks = {patch for manifest in manifests if (patch := manifest["results"].get("patch"))}
    if marks != {cell.patch} - {""}:
        with_ = ", ".join(sorted(marks)) or "none"
        raise RunError(f"{cell.run}: its stages were made with the patch {with_}, not {cell.patch or 'none'}")


def make(cell: Cell, targets: str, log: Path) -> None:
    """Bring targets of the cell's run up to date with make."""
    variables = {"TASK": cell.task, "SEED": str(cell.seed), "RUN": cell.run, "FROM": cell.source} | dict(cell.variables)
    variables |= {"launch": f"-m experiments.patches {cell.patch}"} if cell.patch else {}
    _call(["make", "--no-print-directory", *(f"{k}={v}" for k, v in variables.items()), *targets.split()], log)


def row_of(evaluated: Path, policy: str, folder: Path) -> dict[str, Any]:
    """A cell's row: results of the policy for each prompt, and means of each intermediate model that was kept."""
    means = read_json(evaluated / "results.json")["policies"]
    responses = [row for _, row in read_jsonl(evaluated / f"responses-{policy}.jsonl")]
    manifest = read_json(folder / "manifest.json")

    def point(name: str) -> dict[str, float]:
        row = means[name]
        kl, reward, gold = (round(row[column][0], 4) for column in ("kl", "reward", "gold"))
        return {"kl": kl, "reward": reward, "gold": gold, "eos": round(row["eos_rate"], 4)}

    return {
        "policy": policy,
        **point(policy),
        "words": round(means[policy]["words"], 2),
        "kinds": {k.split("/")[1]: round(v, 3) for k, v in means[policy].items() if k.startswith("gold/")},
        "refusals_benign": round(means[policy]["refusals_benign"], 4),
        "path": {name[5:]: point(name) for name in means if name.startswith("step-")},
        "golds": [round(r["gold"], 2) for r in responses],
        "rewards": [round(r["reward"], 2) for r in responses],
        "kls": [round(r["kl"], 2) for r in responses],
        "config": {k: v for k, v in manifest["config"].items() if k not in ("out", "overwrite", "threads")},
        "seconds": manifest["seconds"],
        "commit": commit(),
        "machine": machine(),
    }


def reward_model(folder: Path) -> dict[str, Any]:
    """How good a reward model is.

    accuracy: on held-out labels. spread: the standard deviation of its raw scores over the data set's chosen
    responses, in log-odds; the scores that PPO sees are divided by it. probe: for each mistake of the probe sheet,
    the share of right answers that score above the spoilt ones (docs/world.md).
    """
    results = read_json(folder / "manifest.json")["results"]
    accuracy, spread = results["held_out"]["accuracy"][0], results["sft_reference_std"]
    probe: dict[str, list[float]] = {}
    for cell in read_json(folder / "probe.json"):
        probe.setdefault(cell["mistake"], []).append(cell["right_above"])
    means = {mistake: round(sum(shares) / len(shares), 3) for mistake, shares in sorted(probe.items())}
    return {"accuracy": round(accuracy, 4), "spread": round(spread, 3), "probe": means}


def _call(command: Iterable[str], log: Path) -> None:
    level = os.environ.get("MAKELEVEL", "1")  # make takes the variable `launch` only from another make or from us
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MAKELEVEL": level}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as out:
        done = subprocess.run(list(command), cwd=ROOT, stdout=out, stderr=out, env=environment, check=False)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, str(log))


def commit() -> str:
    """The commit that is checked out, with "+" if the code differs from it; "" outside a repository."""
    head = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, encoding="utf-8")
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "*.py", "*.mk", "Makefile"], cwd=ROOT)
    return head.stdout.strip() + ("+" if changed.returncode == 1 else "") if head.returncode == 0 else ""


def machine() -> str:
    """The name of the processor, its widest vector instructions, and its number of cores."""
    name, widest = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(
            line.split(":", 1)
            for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
            if ":" in line
        )
        fields = {k.strip(): v.strip() for k, v in fields.items()}
        name, flags = fields.get("model name", name), fields.get("flags", "").split()
        known = {"avx512_bf16": "AVX-512 with BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
        widest = next((f" ({text})" for flag, text in known.items() if flag in flags), "")
    return f"{name}{widest}, {cores()} cores"
