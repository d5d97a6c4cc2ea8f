"""Every stage on the shape of a real small model, SmolLM2-135M: python -m benchmarks.real

Compares this project, the same with products in bf16, this project in plain torch, and trl; once with all weights
trained, and once with adapters alone. The weights are random, since only the time counts. Measures the rows that are
missing from "real" in bench.json and writes each of them at once, so that a run that is stopped goes on where it was.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.run import BF16, OURS, PLAIN, REAL_WAYS, TRL, RowsConfig, hold, measure_missing, python_of, write_page
from experiments.grid import ROOT, commit, machine
from mpo.runtime.cores import cores
from mpo.runtime.entry import run_plain
from mpo.runtime.files import read_json
from mpo.runtime.flags import parse

Row = dict[str, Any]
SHAPE = {
    "vocabulary": 49152,
    "width": 576,
    "layers": 30,
    "heads": 9,
    "kv_heads": 3,
    "ffn": 1536,
    "tied": 1,
    "pairs": 4,
    "rollout": 4,
    "epochs": 1,
}
RANK = 16
STAGES = {  # name -> the case of ours.py, the case of peers.py, its environment
    "SFT": ("sft", "sft", "now"),
    "RM": ("reward", "reward", "now"),
    "DPO": ("dpo-best", "dpo", "now"),
    "generation": ("generate", "generate", "now"),
    "PPO": ("ppo", "ppo", "ppo"),
}


def names() -> list[str]:
    """The rows. Adapters are merged before a model generates, so generation has no row of its own with them."""
    return [f"{stage}, all weights" for stage in STAGES] + [
        f"{stage}, LoRA" for stage in STAGES if stage != "generation"
    ]


def commands(name: str) -> dict[str, list[str]]:
    """The command of each way.

    trl's PPO puts adapters on the policy alone and trains all of the critic: another workload, so it is left out.
    """
    ours, peer, environment = STAGES[name.split(",")[0]]
    ways = {OURS: [sys.executable, "-m", "benchmarks.ours", ours]}
    ways[BF16] = [*ways[OURS][:-1], f"{ours}-bf16"]
    ways[PLAIN] = ["env", "MPO_KERNELS=reference", *ways[OURS]]
    if name != "PPO, LoRA":
        ways[TRL] = [python_of(environment), "benchmarks/peers.py", peer]
    return ways


def measure(name: str, config: RowsConfig) -> Row:
    """Measure one row: seconds and MiB of a step, and how many times as fast as each other way this project is.

    This project takes turns with one other way at a time, since a machine may not have memory for more.
    """
    sizes = SHAPE | ({"lora": RANK} if name.endswith("LoRA") else {})
    ways, results, mine = commands(name), dict[str, Any](), list[Row]()
    for way in [w for w in ways if w != OURS]:
        pair = {OURS: ways[OURS], way: ways[way]}
        rows = hold(pair, config.repeats, config.threads or cores(), {"MPO_BENCH": json.dumps(sizes)})
        mine.append(rows[OURS])
        times = rows[way]["seconds"] / rows[OURS]["seconds"]
        results[way] = {"seconds": rows[way]["seconds"], "step_mib": rows[way]["step_mib"], "times": times}
    seconds = statistics.median(t for row in mine for t in row["all"])
    results[OURS] = {"seconds": seconds, "step_mib": statistics.median(row["step_mib"] for row in mine)}
    return results | {"machine": machine(), "commit": commit()}


def main(config: RowsConfig) -> None:
    """Measure row by row, writing each to bench.json at once; then write the page."""
    out = Path(config.out)
    wanted = [name for name in names() if config.only in name]
    for name, row in measure_missing(out, "real", wanted, lambda name: measure(name, config), config.again):
        print(name, {way: f"{row[way]['seconds']:.2f} s" for way in REAL_WAYS if way in row}, flush=True)
    write_page(ROOT / config.page, read_json(out))
    print(f"written: {out}")


if __name__ == "__main__":
    run_plain(lambda argv: main(parse(RowsConfig, argv)))
