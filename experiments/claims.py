"""make claims: run the missing cells of every grid of the study, then write docs/results.md from the result files.

python -m experiments.claims                    everything that is missing
python -m experiments.claims --grids main,page  some of: tune, main, noise, price, gamma, pushed, page
python -m experiments.claims --reduced true     everything at toy size, in minutes, with meaningless numbers
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, product

from experiments import page
from experiments.grid import ROOT, Cell, make, read_results, run_cells
from experiments.study import FIRST_STAGE, FULL, GRIDS, REDUCED, TRIALS, TUNED, Study
from mpo.config import Few
from mpo.runtime.cores import cores
from mpo.runtime.entry import run_plain
from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json, write_json
from mpo.runtime.flags import parse

STEPS = (*GRIDS, "page")


@dataclass(frozen=True, kw_only=True)
class ClaimsConfig:
    """Test the paper's claims: tuning, main grid, sweeps, page."""

    grids: str = ",".join(STEPS)  # what to run, separated by commas
    reduced: bool = False  # toy size: minutes, meaningless numbers
    jobs: Few = 0  # run folders at a time; 0: one for each core


def tuning_cells(study: Study, task: str, method: str, settings: dict[str, str]) -> Iterator[Cell]:
    """The trials of one method. They share all stages but the last, which are made once, in the base run."""
    base, first, prompts = study.base_run(task, study.tuning_seed), FIRST_STAGE.get(method, "sft"), study.prompts
    flags = study.make_variables(settings, first)
    yield Cell("tune", task, study.tuning_seed, "", first, base, "", flags, prompts)
    for i, trial in enumerate(TRIALS[TUNED[method]][: study.trials]):
        run, flags = f"{study.root}/tune/{task}-{method}-{i}", study.make_variables(settings | {method: trial}, method)
        yield Cell("tune", task, study.tuning_seed, trial, method, run, base, flags, prompts)


def tune(study: Study, jobs: int) -> int:
    """Choose every method's settings in each world: those of the trial with the highest gold. Returns failed cells."""
    results = study.results / "tune.jsonl"
    chosen: dict[str, dict[str, str]] = read_json(study.settings) if study.settings.exists() else {}
    for _, methods in groupby(study.tuned, key=lambda m: (TUNED[m], m in FIRST_STAGE and TUNED[m] == "dpo")):
        settings = {task: chosen.get(task, {}) for task in study.tasks}
        todo = [(task, m) for m, task in product(methods, study.tasks) if m not in settings[task]]
        cells = [c for task, m in todo for c in tuning_cells(study, task, m, settings[task])]
        firsts = {c.key: c for c in cells if not c.source}  # they run before the cells that share them
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
        write_json(study.settings, chosen)
    return 0


def grid_cells(study: Study, grid: str) -> list[Cell]:
    """All cells of one grid, seed by seed, so that an interrupted grid has complete seeds."""
    if not study.settings.exists():
        raise InputError(f"{study.settings}: no such file; run the tuning first: --grids tune")
    tuned: dict[str, dict[str, str]] = read_json(study.settings)
    cells = []

    def add(task: str, seed: int, variant: str, method: str, run: str, source: str, more: dict[str, str]) -> None:
        flags = study.make_variables(tuned[task], method) | more
        cells.append(Cell(grid, task, seed, variant, method, run, source, flags, study.prompts))

    for seed, task in product(study.seeds, study.tasks):
        base = study.base_run(task, seed)
        if grid == "main":
            for method in study.methods:
                add(task, seed, "", method, base, "", {})
        elif grid == "noise":
            for noise, method in product(study.noise, study.noise_methods):
                run, flags = f"{study.root}/noise/{task}-{seed}-{noise}", {"DATA_FLAGS": f"--noise {noise}"}
                add(task, seed, f"{noise}", method, run, "", flags)
        elif grid == "price":
            noisy, flags = max(study.noise), {"mpo_FLAGS": f"{tuned[task]['mpo']} {study.price}"}
            flags |= {"DATA_FLAGS": f"--noise {noisy}"}
            run, source = f"{study.root}/price/{task}-{seed}", f"{study.root}/noise/{task}-{seed}-{noisy}"
            add(task, seed, "", "mpo", run, source, flags)
        elif grid == "gamma":
            for gamma, method in product(study.gammas, study.gamma_methods):
                run, flags = f"{study.root}/gamma/{task}-{seed}-{gamma}", {"SPLIT_FLAGS": f"--gamma {gamma}"}
                add(task, seed, gamma, method, run, base, flags)
        elif grid == "pushed":
            for method, push in study.pushed.items():
                flags = {f"{method}_FLAGS": f"{tuned[task][method]} {push}"}
                add(task, seed, "", method, f"{study.root}/pushed/{task}-{seed}-{method}", base, flags)
    return cells


def main(config: ClaimsConfig) -> int:
    """Run the named grids in order; returns the number of cells that failed."""
    named = [g.strip() for g in config.grids.split(",")]
    if unknown := set(named) - set(STEPS):
        raise InputError(f"--grids {config.grids}: {sorted(unknown)[0]!r} is not one of {', '.join(STEPS)}")
    study = REDUCED if config.reduced else FULL
    jobs = config.jobs or cores()
    failed = 0
    for grid in (g for g in STEPS if g in named):
        if grid == "tune":
            failed += tune(study, jobs)
        elif grid == "page":
            page.write(study)
        else:
            failed += run_cells(grid_cells(study, grid), study.results / f"{grid}.jsonl", jobs)
    return failed


if __name__ == "__main__":
    run_plain(lambda argv: sys.exit(main(parse(ClaimsConfig, argv)) > 0))
