"""The cells of the claims (docs/protocol.md): tuning, main grid, sweeps; and their order.

python -m experiments.claims run            everything, from where it stopped
python -m experiments.claims run main       one grid: tune, main, noise, gamma or pushed
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from itertools import product

from experiments.grid import ROOT, Cell, make, read_results, run_cells
from mpo.artifacts import read_json, write_json
from mpo.config import run_plain
from mpo.errors import InputError

TASKS = ("hh", "tldr")
SEEDS = (11, 12, 13, 14, 15)
TUNING_SEED = 1
RESULTS = ROOT / "experiments" / "results"
SETTINGS = RESULTS / "settings.json"

# One unit of budget (docs/protocol.md), and how many models are kept on the way.
DPO_UNIT = "--steps 320 --keep 3"
PPO_UNIT = "--iterations 50 --keep 3"

DPO_TRIALS = [f"--lr {lr} --beta {beta}" for lr, beta in ((5e-5, 0.5), (1e-4, 0.5), (1e-4, 0.2))]
PPO_TRIALS = [f"--lr {lr} --kl_coef {kl}" for lr, kl in ((1e-4, 0.05), (2e-4, 0.05), (2e-4, 0.02))]

# What is tuned, and the stage each second stage starts from.
DPO_METHODS = ("dpo", "dpo-all", "dpo-hard")
PPO_METHODS = ("ppo", "ppo-hard", "mpo", "mpo-all", "mpo-sft-ref", "dpo-ppo", "reversed", "mixed")
FIRST_STAGE = {
    "mpo": "dpo",
    "mpo-all": "dpo",
    "mpo-sft-ref": "dpo",
    "dpo-ppo": "dpo-all",
    "reversed": "dpo-hard",
    "mixed": "dpo-random",
    "ppo-dpo": "ppo-hard",
}
# Whose settings the others take, and what makes them different.
INHERIT = {
    "dpo-random": ("dpo", ""),
    "dpo-inverted": ("dpo", ""),
    "dpo-long": ("dpo", "--steps 640"),
    "dpo-all-long": ("dpo-all", "--steps 640"),
    "ppo-long": ("ppo", "--iterations 100"),
    "ppo-some": ("ppo", "--limit 1600"),
    "ppo-few": ("ppo", "--limit 400"),
}
MAIN = ("sft", *DPO_METHODS, *PPO_METHODS, "ppo-dpo", *INHERIT)
NOISE_METHODS = ("sft", "dpo", "dpo-all", "dpo-all-long", "ppo", "ppo-long", "mpo", "dpo-ppo")
NOISE = (0.1, 0.2, 0.3)
GAMMA_METHODS = ("dpo", "mpo")
GAMMAS = ("q0.25", "q0.75", "q0.9")
PUSHED = {
    "dpo-all": "--lr 2e-4 --beta 0.05 --steps 640 --keep 7",
    "ppo": "--kl_coef 0 --iterations 100 --keep 7",
    "mpo": "--kl_coef 0 --iterations 100 --keep 7",
    "dpo-ppo": "--kl_coef 0 --iterations 100 --keep 7",
}


def base_run(task: str, seed: int) -> str:
    """The run folder of the main grid, whose stages the tuning and the sweeps share."""
    return f"runs/claims/{task}-{seed}"


def variables(settings: dict[str, str]) -> dict[str, str]:
    """Make variables: the budgets for every stage, and each folder's tuned flags."""
    found = {"DPO_FLAGS": DPO_UNIT, "PPO_FLAGS": PPO_UNIT}
    everything = settings | {
        name: f"{settings[of]} {more}".strip() for name, (of, more) in INHERIT.items() if of in settings
    }
    return found | {f"{name}_FLAGS": flags for name, flags in everything.items()}


# --- tuning -----------------------------------------------------------------------------------


def tuning_cells(task: str, method: str, trials: Sequence[str], settings: dict[str, str]) -> Iterator[Cell]:
    """The trials of one method: runs that share all but its last stage, made once in the base run."""
    base, first = base_run(task, TUNING_SEED), FIRST_STAGE.get(method, "sft")
    yield Cell("tune", task, TUNING_SEED, "", first, base, "", variables(settings))
    for i, flags in enumerate(trials):
        run = f"runs/claims/tune/{task}-{method}-{i}"
        yield Cell("tune", task, TUNING_SEED, flags, method, run, base, variables(settings | {method: flags}))


def tune(jobs: int) -> int:
    """Settle every method's settings, in each world: those of the trial with the most gold."""
    results = RESULTS / "tune.jsonl"
    everything: dict[str, dict[str, str]] = read_json(SETTINGS) if SETTINGS.exists() else {}
    rounds = [(DPO_METHODS, DPO_TRIALS), (PPO_METHODS, PPO_TRIALS), (("ppo-dpo",), DPO_TRIALS)]
    for methods, trials in rounds:
        settings = {task: everything.get(task, {}) for task in TASKS}
        todo = [(task, m) for m, task in product(methods, TASKS) if m not in settings[task]]
        cells = [c for task, m in todo for c in tuning_cells(task, m, trials, settings[task])]
        firsts = {c.key: c for c in cells if not c.source}  # before the runs that share them
        for cell in firsts.values():
            make(cell, "policy-split", ROOT / cell.run / "logs" / "split.log")
        failed = run_cells(list(firsts.values()), results, jobs)
        failed += run_cells([c for c in cells if c.source], results, jobs)
        if failed:
            return failed
        rows = read_results(results)
        for task, method in todo:
            mine = [r for r in rows if (r["task"], r["policy"]) == (task, method) and r["variant"]]
            best = max(mine, key=lambda r: r["gold"])
            everything.setdefault(task, {})[method] = best["variant"]
        write_json(SETTINGS, everything)
    return 0


# --- the grids ----------------------------------------------------------------------------------


def grid_cells(grid: str) -> list[Cell]:
    """All cells of one grid, seed by seed, so that an unfinished grid has whole seeds."""
    if not SETTINGS.exists():
        raise InputError(f"{SETTINGS}: no such file; settle the settings first: python -m experiments.claims run tune")
    tuned: dict[str, dict[str, str]] = read_json(SETTINGS)
    cells = []
    for seed, task in product(SEEDS, TASKS):
        base, flags = base_run(task, seed), variables(tuned[task])
        if grid == "main":
            cells += [Cell("main", task, seed, "", m, base, "", flags) for m in MAIN]
        for noise in NOISE if grid == "noise" else ():
            run, more = f"runs/claims/noise/{task}-{seed}-{noise}", {"DATA_FLAGS": f"--noise {noise}"}
            cells += [Cell("noise", task, seed, f"{noise}", m, run, "", flags | more) for m in NOISE_METHODS]
        for gamma in GAMMAS if grid == "gamma" else ():
            run, more = f"runs/claims/gamma/{task}-{seed}-{gamma}", {"SPLIT_FLAGS": f"--gamma {gamma}"}
            cells += [Cell("gamma", task, seed, gamma, m, run, base, flags | more) for m in GAMMA_METHODS]
        for method, push in PUSHED.items() if grid == "pushed" else ():
            run = f"runs/claims/pushed/{task}-{seed}-{method}"
            pushed = {f"{method}_FLAGS": f"{tuned[task][method]} {push}"}
            cells.append(Cell("pushed", task, seed, "", method, run, base, flags | pushed))
    return cells


GRIDS = ("tune", "main", "noise", "gamma", "pushed")


def main(argv: list[str]) -> int:
    """Run the named grids, or all of them in order."""
    if not argv or argv[0] != "run" or not set(argv[1:]) <= set(GRIDS):
        raise InputError(f"usage: python -m experiments.claims run [{' | '.join(GRIDS)}]...")
    jobs = int(os.environ.get("JOBS", 0)) or os.cpu_count() or 1
    failed = 0
    for grid in argv[1:] or GRIDS:
        failed += tune(jobs) if grid == "tune" else run_cells(grid_cells(grid), RESULTS / f"{grid}.jsonl", jobs)
    return failed


if __name__ == "__main__":
    run_plain(lambda argv: sys.exit(main(argv) > 0))
