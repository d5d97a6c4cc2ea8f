"""make claims: run what is missing of the grids, then write docs/results.md from the result files.

python -m experiments.claims                    everything, from where it stopped
python -m experiments.claims --grids main,page  only these: tune, main, noise, price, gamma, pushed, page
python -m experiments.claims --reduced true     the same in minutes, with numbers that mean nothing
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, product

from experiments import page
from experiments.grid import ROOT, Cell, make, read_results, run_cells
from experiments.plan import FIRST_STAGE, FULL, GRIDS, REDUCED, TRIALS, TUNED, Plan
from mpo.config import parse
from mpo.errors import InputError
from mpo.files import read_json, write_json
from mpo.program import run_plain

STEPS = (*GRIDS, "page")


@dataclass(frozen=True, kw_only=True)
class ClaimsConfig:
    """Put the paper's claims to the test: tuning, main grid, sweeps, page."""

    grids: str = ",".join(STEPS)  # which of them, separated by commas
    reduced: bool = False  # the smallest size at which everything runs
    jobs: int = 0  # runs at a time; 0: one a core


def tuning_cells(plan: Plan, task: str, method: str, settings: dict[str, str]) -> Iterator[Cell]:
    """The trials of one method: runs that share all but its last stage, made once in the base run."""
    base, first, prompts = plan.base_run(task, plan.tuning_seed), FIRST_STAGE.get(method, "sft"), plan.prompts
    flags = plan.make_variables(settings, first)
    yield Cell("tune", task, plan.tuning_seed, "", first, base, "", flags, prompts)
    for i, trial in enumerate(TRIALS[TUNED[method]][: plan.trials]):
        run, flags = f"{plan.root}/tune/{task}-{method}-{i}", plan.make_variables(settings | {method: trial}, method)
        yield Cell("tune", task, plan.tuning_seed, trial, method, run, base, flags, prompts)


def tune(plan: Plan, jobs: int) -> int:
    """Settle every method's settings, in each world: those of the trial with the most gold."""
    results = plan.results / "tune.jsonl"
    chosen: dict[str, dict[str, str]] = read_json(plan.settings) if plan.settings.exists() else {}
    for _, methods in groupby(TUNED, key=lambda m: (TUNED[m], m in FIRST_STAGE and TUNED[m] == "dpo")):
        settings = {task: chosen.get(task, {}) for task in plan.tasks}
        todo = [(task, m) for m, task in product(methods, plan.tasks) if m not in settings[task]]
        cells = [c for task, m in todo for c in tuning_cells(plan, task, m, settings[task])]
        firsts = {c.key: c for c in cells if not c.source}  # before the runs that share them
        bases = list({c.run: c for c in firsts.values()}.values())
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda c: make(c, "policy-split", ROOT / c.run / "logs" / "split.log"), bases))
        failed = run_cells(list(firsts.values()), results, jobs)
        failed += run_cells([c for c in cells if c.source], results, jobs)
        if failed:
            return failed
        rows = read_results(results)
        for task, method in todo:
            mine = [r for r in rows if (r["task"], r["policy"]) == (task, method) and r["variant"]]
            chosen.setdefault(task, {})[method] = max(mine, key=lambda r: r["gold"])["variant"]
        write_json(plan.settings, chosen)
    return 0


def grid_cells(plan: Plan, grid: str) -> list[Cell]:
    """All cells of one grid, seed by seed, so that an unfinished grid has whole seeds."""
    if not plan.settings.exists():
        raise InputError(f"{plan.settings}: no such file; settle the settings first: --grids tune")
    tuned: dict[str, dict[str, str]] = read_json(plan.settings)
    cells = []

    def add(task: str, seed: int, variant: str, method: str, run: str, source: str, more: dict[str, str]) -> None:
        flags = plan.make_variables(tuned[task], method) | more
        cells.append(Cell(grid, task, seed, variant, method, run, source, flags, plan.prompts))

    for seed, task in product(plan.seeds, plan.tasks):
        base = plan.base_run(task, seed)
        if grid == "main":
            for method in plan.methods:
                add(task, seed, "", method, base, "", {})
        elif grid == "noise":
            for noise, method in product(plan.noise, plan.noise_methods):
                run, flags = f"{plan.root}/noise/{task}-{seed}-{noise}", {"DATA_FLAGS": f"--noise {noise}"}
                add(task, seed, f"{noise}", method, run, "", flags)
        elif grid == "price":
            noisy, flags = max(plan.noise), {"mpo_FLAGS": f"{tuned[task]['mpo']} {plan.price}"}
            flags |= {"DATA_FLAGS": f"--noise {noisy}"}
            run, source = f"{plan.root}/price/{task}-{seed}", f"{plan.root}/noise/{task}-{seed}-{noisy}"
            add(task, seed, "", "mpo", run, source, flags)
        elif grid == "gamma":
            for gamma, method in product(plan.gammas, plan.gamma_methods):
                run, flags = f"{plan.root}/gamma/{task}-{seed}-{gamma}", {"SPLIT_FLAGS": f"--gamma {gamma}"}
                add(task, seed, gamma, method, run, base, flags)
        elif grid == "pushed":
            for method, push in plan.pushed.items():
                flags = {f"{method}_FLAGS": f"{tuned[task][method]} {push}"}
                add(task, seed, "", method, f"{plan.root}/pushed/{task}-{seed}-{method}", base, flags)
    return cells


def main(config: ClaimsConfig) -> int:
    """Run the named grids in order; returns how many cells failed."""
    named = [g.strip() for g in config.grids.split(",")]
    if unknown := set(named) - set(STEPS):
        raise InputError(f"--grids {config.grids}: {sorted(unknown)[0]!r} is not one of {', '.join(STEPS)}")
    plan = REDUCED if config.reduced else FULL
    jobs = config.jobs or os.cpu_count() or 1
    failed = 0
    for grid in (g for g in STEPS if g in named):
        if grid == "tune":
            failed += tune(plan, jobs)
        elif grid == "page":
            page.write(plan)
        else:
            failed += run_cells(grid_cells(plan, grid), plan.results / f"{grid}.jsonl", jobs)
    return failed


if __name__ == "__main__":
    run_plain(lambda argv: sys.exit(main(parse(ClaimsConfig, argv)) > 0))
