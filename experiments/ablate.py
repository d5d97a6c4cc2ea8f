"""make ablate: train and evaluate variants that differ in one thing, on several seeds; writes a table and a figure.

make ablate                                   every preference loss, three seeds
make ablate GRID=estimators                   one of the grids below
make ablate GRID=details                      the details of docs/details.md (details.py)
make ablate VARY=PPO_FLAGS VALUES="--clip 0.1,--clip 0.3" POLICY=mpo    the values of any make variable
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments import details, figures
from experiments.grid import ROOT, Cell, finished, make, read_results, run_cells
from experiments.statistics import column, contrast, difference, hierarchical_bootstrap, win
from mpo.config import Few, Range, Size
from mpo.ppo.equations import CRITIC_FREE
from mpo.preference.losses import PREFERENCE_LOSSES
from mpo.runtime.cores import cores
from mpo.runtime.entry import run_plain
from mpo.runtime.errors import InputError
from mpo.runtime.files import write_text
from mpo.runtime.flags import parse, read_number
from mpo.runtime.output import interval, percent, table

Variables = dict[str, str]

# Most losses use log-ratios summed over a response's tokens. These use means over its tokens, which are about twenty
# times smaller, so their beta is larger in proportion.
LOSS_FLAGS = {"ipo_mean": "ipo_mean:beta=10", "simpo": "simpo:beta=10"}

# Name of a grid -> (the policy to train, {variant: make variables}). The first variant is the baseline.
GRIDS: dict[str, tuple[str, dict[str, Variables]]] = {
    "losses": ("dpo", {name: {"LOSS": LOSS_FLAGS.get(name, name)} for name in PREFERENCE_LOSSES if name != "sft"}),
    "sums": ("dpo", {loss: {"LOSS": loss} for loss in ("sigmoid", "sigmoid+0.1*sft", "0.8*sigmoid+0.2*bco_pair+sft")}),
    "estimators": (
        "mpo",
        {"gae": {}, "gae, shared critic": {"PPO_FLAGS": "--shared_critic true"}}
        | {name: {"PPO_FLAGS": f"--advantage {name} --group 4"} for name in CRITIC_FREE}
        | {"grpo, k3 in loss": {"PPO_FLAGS": "--advantage grpo --group 4 --kl_in loss --kl_estimator k3"}},
    ),
    "kl": (
        "mpo",
        {
            "k1 in reward": {},
            "exact in reward": {"PPO_FLAGS": "--kl_estimator exact"},
            "k3 in reward": {"PPO_FLAGS": "--kl_estimator k3"},
            "k2 in loss": {"PPO_FLAGS": "--kl_in loss --kl_estimator k2"},
            "k3 in loss": {"PPO_FLAGS": "--kl_in loss --kl_estimator k3"},
            "exact in loss": {"PPO_FLAGS": "--kl_in loss --kl_estimator exact"},
            "adaptive": {"PPO_FLAGS": "--kl_target 1"},
        },
    ),
    "split": (
        "mpo",
        {
            "quantile 0.5": {},
            "gamma 0.5": {"SPLIT_FLAGS": "--gamma 0.5"},
            "uncertainty of 3": {"RMS": "rm rm-2 rm-3", "SPLIT_FLAGS": "--by uncertainty"},
            "contradicted dropped": {"SPLIT_FLAGS": "--contradicted drop"},
            "contradicted flipped": {"SPLIT_FLAGS": "--contradicted flip"},
            "all smoothed": {
                "SPLIT_FLAGS": "--easy smooth --hard smooth --contradicted smooth",
                "LOSS": "cdpo",
                "POLICY": "dpo",
            },
        },
    ),
    "reward": (
        "mpo",
        {
            "bradley-terry": {},
            "smoothing 0.1": {"RM_FLAGS": "--label_smoothing 0.1"},
            "centring 0.01": {"RM_FLAGS": "--centring 0.01"},
        },
    ),
    # The details of docs/details.md: some are flags, some are patches, and they share more stages (details.py).
    "details": ("mpo", {variant.name: variant.all_variables for variant in details.VARIANTS}),
}


DEFAULT_SEEDS = defaultdict(lambda: "1,2,3", details=details.SEEDS)


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """Compare variants over seeds. Each finished cell adds a row; at the end come a table and a figure."""

    grid: str = "losses"  # a grid of experiments/ablate.py; ignored with --vary
    vary: str = ""  # instead of a grid: the make variable to vary, such as LOSS
    values: str = ""  # its values, separated by commas
    policy: str = ""  # the policy to train; empty: the grid's own
    task: Literal["hh", "tldr"] = "hh"  # which built-in world
    seeds: str = ""  # separated by commas; empty: 1,2,3 or, for the grid `details`, its own
    make: str = ""  # further make variables for every cell, separated by semicolons: QUICK=1;DPO_FLAGS=--lr 1e-4
    prompts: Size = 400  # held-out prompts of the evaluation
    jobs: Few = 0  # run folders at a time; 0: one for each core
    out: str = "runs/ablate"  # folder for runs, rows, table and figure


def variants_of(config: AblateConfig) -> tuple[str, str, dict[str, Variables]]:
    """The grid's name, its policy and its variants."""
    if config.vary:
        values = [v.strip() for v in config.values.split(",") if v.strip()]
        if len(values) < 2:
            raise InputError(f"--values {config.values!r}: expected two or more values, separated by commas")
        return config.vary, config.policy or "dpo", {value: {config.vary: value} for value in values}
    if config.grid not in GRIDS:
        raise InputError(f"--grid {config.grid}: expected one of {', '.join(GRIDS)}, or --vary")
    policy, variants = GRIDS[config.grid]
    return config.grid, config.policy or policy, variants


def common_variables(text: str) -> Variables:
    """ "QUICK=1;DPO_FLAGS=--lr 1e-4" -> {"QUICK": "1", "DPO_FLAGS": "--lr 1e-4"}"""
    variables = {}
    for part in filter(None, text.split(";")):
        name, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"--make {text}: expected VARIABLE=value;VARIABLE=value")
        variables[name.strip()] = value
    return variables


def seeds_of(text: str) -> list[int]:
    """ "1,2,3" -> [1, 2, 3]. Raises InputError for anything but different whole numbers."""
    seeds = [int(read_number(f"--seeds {text}: seed", int, Range(0), seed.strip())) for seed in text.split(",")]
    if len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds {text}: a seed is named twice")
    return seeds


def cells_of(config: AblateConfig) -> list[Cell]:
    """All cells, seed by seed. The runs of one seed share every stage that does not differ."""
    grid, policy, variants = variants_of(config)
    common, out, seeds = common_variables(config.make), Path(config.out), seeds_of(config.seeds or DEFAULT_SEEDS[grid])
    if grid == "details":
        if config.policy:
            raise InputError(f"--policy {config.policy}: the grid details has its own for each variant")
        return details.cells(config.out, config.task, seeds, common, config.prompts)
    cells = []
    for seed in seeds:
        base = out / f"{config.task}-{seed}"
        for i, (variant, own) in enumerate(variants.items()):
            variables = common | own
            trained = variables.pop("POLICY", policy)
            run = str(out / f"{grid}-{config.task}-{seed}-{i}")
            cell = (grid, config.task, seed, variant, trained, run, str(base), variables, config.prompts)
            cells.append(Cell(*cell, made=True))
    return cells


def shared_stages(cells: Sequence[Cell], config: AblateConfig) -> None:
    """Train the stages that the runs of each seed share, up to the split, before those runs start."""
    common, sources = common_variables(config.make), {cell.source: cell for cell in cells}
    bases = [Cell(c.grid, c.task, c.seed, "", "split", source, "", common) for source, c in sources.items()]
    if config.grid == "details" and not config.vary:
        bases = details.base_cells(cells, config.out, common)
    for base in bases:
        make(base, f"policy-{base.policy}", ROOT / base.run / "logs" / f"{base.policy}.log")


def results_of(config: AblateConfig, grid: str) -> Path:
    """The file of the rows. Those of the grid `details` are part of the repository, unless its cells are changed."""
    if grid == "details" and not config.make and config.out == AblateConfig.out:
        return details.RESULTS
    return Path(config.out) / f"{grid}-{config.task}.jsonl"


def summary(rows: Sequence[Mapping[str, Any]], variants: Sequence[str]) -> str:
    """The table: gold, difference and win rate against the first variant, RM score, KL, length, EOS rate."""
    by_variant = {v: [r for r in rows if r["variant"] == v] for v in variants}
    by_variant = {v: mine for v, mine in by_variant.items() if mine}
    first, lines = next(iter(by_variant)), []
    reference = column(by_variant[first], "golds")
    for variant, mine in by_variant.items():
        golds = column(mine, "golds")
        against_first = contrast(difference(golds, reference))
        lines.append(
            [
                variant,
                str(len(mine)),
                interval(hierarchical_bootstrap(golds)),
                "-" if variant == first else interval(against_first.interval),
                "-" if variant == first else percent(hierarchical_bootstrap(win(golds, reference))),
                f"{np.mean([r['reward'] for r in mine]):.2f}",
                f"{np.mean([r['kl'] for r in mine]):.2f}",
                f"{np.mean([r['words'] for r in mine]):.0f}",
                f"{100 * np.mean([r['eos'] for r in mine]):.0f}",
            ]
        )
    header = ["variant", "seeds", "gold", f"less {first}", f"win vs {first} %", "RM", "KL to SFT", "words", "EOS %"]
    return table(header, lines)


def run(cells: Sequence[Cell], results: Path, config: AblateConfig) -> int:
    """Run the cells that have no row yet, after what they share. Returns how many failed."""
    done, of_page = finished(cells, results), results == details.RESULTS
    shared_stages([cell for cell in cells if cell.key not in done], config)
    return run_cells(cells, results, config.jobs or cores(), details.write if of_page else lambda: None)


def run_details(cells: Sequence[Cell], results: Path, config: AblateConfig) -> int:
    """The same for the grid `details`, whose page is written anew with each row. Returns how many cells failed."""
    done = finished(cells, results)
    print(f"about {details.hours(c for c in cells if c.key not in done):.1f} hours on one core", flush=True)
    failed = sum(run(wave, results, config) for wave in details.waves(cells))
    if results == details.RESULTS:
        details.draw()
        print(f"page: {details.PAGE}")
    return failed


def main(config: AblateConfig) -> int:
    """Run the missing cells; then print and write the table, and draw the figure. Returns how many cells failed."""
    cells = cells_of(config)
    grid, _, variants = variants_of(config)
    results = results_of(config, grid)
    if grid == "details":
        return run_details(cells, results, config)
    failed = run(cells, results, config)
    keys = {cell.key for cell in cells}
    rows = [r for r in read_results(results) if (r["grid"], r["task"], r["seed"], r["variant"], r["policy"]) in keys]
    if rows:
        page = results.with_suffix(".md")
        text = summary(rows, list(variants))
        write_text(page, text + "\n")
        print(f"\n{text}\n\nrows: {results}\ntable: {page}")
        if figures.ablation(rows, list(variants), results.with_suffix(".png")):
            print(f"figure: {results.with_suffix('.png')}")
    return failed


if __name__ == "__main__":
    run_plain(lambda argv: sys.exit(main(parse(AblateConfig, argv)) > 0))
