"""docs/results.md from the result files: tables, verdicts, figures.

No number is typed by hand: prose that interprets a result stands in experiments/reasons/, by claim.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures
from experiments.grid import read_results
from experiments.judgement import (
    CLAIMS,
    JUDGED,
    SHOWN,
    Pair,
    Points,
    Row,
    World,
    collapsed,
    equal_kl_contrast,
    fall,
    gold_contrast,
    judged,
    read_world,
    verdict,
)
from experiments.statistics import Contrast, column, difference, hierarchical_bootstrap, win
from experiments.study import FIRST_STAGE, GRIDS, Study
from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json, write_text
from mpo.runtime.tables import interval, percent, table

NOISE_PAIRS = [("mpo", "dpo-all-long"), ("mpo", "ppo-long"), ("dpo", "dpo-all-long")]  # shown along the sweeps
GAMMA_PAIRS = [("mpo", "dpo")]
BLIND = 0.75  # a mistake that a reward model misses: fewer right answers than this above the spoilt ones
UNITS = dict.fromkeys((*FIRST_STAGE, "dpo-long", "dpo-all-long", "ppo-long"), 2) | {"sft": 0}


def contrast_line(world: World, name: str, found: Contrast | None, pair: Pair | None, seeds: int) -> list[str]:
    """One line of a claim's table."""
    if found is None:
        return [name, "not run", "", "", "", ""]
    signs = " ".join(f"{v:+.2f}" for _, v in sorted(found.per_seed.items()))
    won = equal = "-"
    if pair:
        won = percent(hierarchical_bootstrap(win(world.golds(pair[0]), world.golds(pair[1]))))
        at_equal = equal_kl_contrast(world, pair)
        equal = interval(at_equal.interval) if at_equal else "-"
    judged_by = len(found.per_seed)
    what = found.verdict if judged_by == seeds else f"{judged_by} of {seeds} seeds"
    return [name, interval(found.interval), what, signs, won, equal]


def claim_section(worlds: Sequence[World], study: Study, claim: int) -> str:
    """Title, verdict, one table a world, the reasons, and the claim's figure."""
    found = [judged(world, study, claim) for world in worlds]
    parts = [f"## {claim}. {CLAIMS[claim]}: {verdict(found, len(study.seeds))}"]
    header = ["contrast", "gold", "verdict", "by seed", "win %", "gold at equal KL"]
    for world, contrasts in zip(worlds, found, strict=True):
        pairs = {" - ".join(p): p for p in JUDGED.get(claim, []) + SHOWN.get(claim, [])}
        lines = [
            contrast_line(world, n, c, pairs.get(n), len(study.seeds))
            for n, c in contrasts.items()
            if not n.endswith("equal KL")
        ]
        shown = [(" - ".join(p), gold_contrast(world, p)) for p in SHOWN.get(claim, [])]
        lines += [contrast_line(world, f"({name})", c, pairs[name], len(study.seeds)) for name, c in shown]
        parts += [f"**{world.task}**", table(header, lines)]
    return "\n\n".join([*parts, *prose(study, f"claim-{claim}")])


def prose(study: Study, name: str) -> list[str]:
    """What interprets the numbers, where somebody has."""
    path = study.reasons / f"{name}.md" if study.reasons else None
    return [path.read_text(encoding="utf-8").strip()] if path and path.exists() else []


def main_table(world: World, study: Study) -> str:
    """Every method of the main grid."""
    lines, sft = [], world.golds("sft")
    for method in study.methods:
        rows = world.main.get(method, [])
        if not rows:
            continue
        golds = column(rows, "golds")
        means = {name: np.mean([r[name] for r in rows]) for name in ("reward", "kl", "words", "eos")}
        spread = np.std([r["gold"] for r in rows], ddof=1) if len(rows) > 1 else np.nan
        lines.append(
            [
                method,
                str(UNITS.get(method, 1)),
                str(len(rows)),
                interval(hierarchical_bootstrap(golds)),
                f"{spread:.2f}",
                percent(hierarchical_bootstrap(win(golds, sft))),
                f"{means['reward']:.2f}",
                f"{means['kl']:.2f}",
                f"{means['words']:.0f}",
                f"{100 * means['eos']:.0f}",
                str(sum(bool(collapsed(r, world.main["sft"])) for r in rows)),
            ]
        )
    header = ["method", "units", "seeds", "gold", "spread", "win vs SFT %", "RM", "KL", "words", "EOS %", "collapses"]
    return table(header, lines)


def sweep_table(
    grids: Mapping[str, Mapping[str, Sequence[Row]]], methods: Sequence[str], pairs: Sequence[Pair], name: str
) -> str:
    """Gold along a sweep, a line a method; then the paired differences of some."""
    golds = [{m: column(grid.get(m, []), "golds") for m in methods} for grid in grids.values()]
    lines = {m: [found[m] for found in golds] for m in methods}
    there = [p for p in pairs if set(p) <= set(methods)]
    lines |= {" - ".join(p): [difference(*(found[m] for m in p)) for found in golds] for p in there}
    cells = {k: [interval(hierarchical_bootstrap(v)) if v else "-" for v in line] for k, line in lines.items()}
    return table([name, *grids], [[title, *line] for title, line in cells.items()])


def reward_models_table(world: World) -> str:
    """Along the noise, the reward model of each seed: how often it is right, and what it does not see."""
    lines = []
    for noise, by_seed in world.reward_models().items():
        models = [rm for _, rm in sorted(by_seed.items())]
        missed = Counter(name for rm in models for name, share in rm["probe"].items() if share < BLIND)
        lines.append(
            [
                noise,
                " ".join(f"{100 * rm['accuracy']:.0f}" for rm in models),
                " ".join(f"{rm['spread']:.1f}" for rm in models),
                ", ".join(f"{name} {count}" for name, count in missed.most_common()) or "-",
            ]
        )
    header = ["labels flipped", "RM right, %, by seed", "spread of its scores", "mistakes it misses, on how many seeds"]
    return table(header, lines)


def pushed_table(world: World) -> str:
    """Where gold is highest on the path of each pushed method, and where it ends."""
    lines = []
    for method in world.pushed:
        seeds = world.seeds(method, pushed=True)
        paths = [world.path(method, s, pushed=True) for s in seeds]
        if not paths:
            continue
        best = [max(p, key=lambda point: point[1]) for p in paths]
        row = [method, str(len(paths)), f"{np.mean([b[1] for b in best]):.2f}", f"{np.mean([b[0] for b in best]):.1f}"]
        row += [f"{np.mean([p[-1][1] for p in paths]):.2f}", f"{np.mean([p[-1][0] for p in paths]):.1f}"]
        lines.append([*row, " ".join(f"{fall(p):.2f}" for p in paths)])
    return table(["pushed", "seeds", "best gold", "at KL", "last gold", "at KL", "fall, by seed"], lines)


def provenance(study: Study) -> str:
    """Which machine, which commits, how many cells, how long."""
    files = {grid: read_results(study.results / f"{grid}.jsonl") for grid in GRIDS}
    rows = [r for found in files.values() for r in found]
    cells = ", ".join(f"{grid} {len(found)}" for grid, found in files.items())
    hours = sum(r["seconds"] for r in rows) / 3600
    commits, machines = (", ".join(sorted({r[k] for r in rows})) for k in ("commit", "machine"))
    return (
        f"Finished cells: {cells}. Machine: {machines}; one single-threaded process a core. Commits: {commits}. "
        f"The last stages of the cells alone took {hours:.1f} process-hours. Written by `make claims` from "
        "`experiments/results/`; the rules are those of [protocol.md](protocol.md)."
    )


def settings_table(study: Study) -> str:
    """What the tuning chose."""
    chosen = read_json(study.settings)
    methods = list(dict.fromkeys(m for task in chosen.values() for m in task))
    return table(
        ["method", *chosen], [[m, *(task.get(m, "-").replace("--", "") for task in chosen.values())] for m in methods]
    )


def collapse_list(worlds: Sequence[World]) -> str:
    """Every collapse of every grid, by name."""
    lines = []
    for w in worlds:
        grids = {"main": w.main, "pushed": w.pushed}
        grids |= {f"noise {k}": g for k, g in w.noise.items() if k != "0"}
        grids |= {"price": {"sft": w.noisiest.get("sft", []), **w.price}} if w.price else {}
        grids |= {f"gamma {k}": g for k, g in w.gamma.items() if k != "q0.5"}
        for name, methods in grids.items():
            sft = methods.get("sft", w.main.get("sft", []))
            for method, rows in methods.items():
                lines += [[w.task, name, method, str(r["seed"]), why] for r in rows if (why := collapsed(r, sft))]
    return table(["world", "grid", "method", "seed", "why"], lines) if lines else "None."


def draw(worlds: Sequence[World], study: Study, folder: Path) -> list[str]:
    """All figures; returns them as Markdown, [] where they cannot be drawn."""
    if not figures.available():
        return []
    shown = ("dpo", "dpo-all-long", "ppo-long", "mpo", "dpo-ppo")

    def curves(name: str, methods: Sequence[str], pushed: bool) -> dict[str, dict[str, list[Points]]]:
        return {
            w.task: {
                m: [w.path(m, s, name, pushed) for s in seeds] for m in methods if (seeds := w.seeds(m, pushed=pushed))
            }
            for w in worlds
        }

    made = []

    def add(name: str, caption: str) -> Path:
        made.append(f"![{caption}]({folder.name}/{name}.png)\n\n*{caption}*")
        return folder / f"{name}.png"

    kl, gold = "KL to SFT, nats per response", "gold reward"
    where = add("gold-by-kl", "Gold along the way of each method; thick: the mean over seeds, thin: single seeds.")
    figures.paths(curves("gold", shown, False), where, kl, gold)
    contrasts = {w.task: {n: c for i in JUDGED for n, c in judged(w, study, i).items() if c} for w in worlds}
    figures.forest(contrasts, add("contrasts", "Judged contrasts of claims 1 to 4; small dots are single seeds."))
    return made + _sweep_figures(worlds, study, folder, curves)


def _sweep_figures(worlds: Sequence[World], study: Study, folder: Path, curves: Any) -> list[str]:
    made = []

    def lines(grids: str, methods: Sequence[str], number: Any) -> dict[str, dict[str, list[Any]]]:
        found: dict[str, dict[str, list[Any]]] = {}
        for w in worlds:
            for method in methods:
                points = [
                    (number(k), hierarchical_bootstrap(column(rows[method], "golds")))
                    for k, rows in getattr(w, grids).items()
                    if method in rows
                ]
                if len(points) > 1:
                    found.setdefault(w.task, {})[method] = points
        return found

    if noisy := lines("noise", [m for m in study.noise_methods if m != "sft"], float):
        figures.sweep(noisy, folder / "noise.png", "share of training labels flipped")
        made.append(f"![Gold as label noise grows]({folder.name}/noise.png)\n\n*Gold as label noise grows.*")
    if gammas := lines("gamma", study.gamma_methods, lambda k: float(k[1:])):
        figures.sweep(gammas, folder / "gamma.png", "gamma, as a quantile of |gap|")
        made.append(f"![Gold by gamma]({folder.name}/gamma.png)\n\n*Gold by the threshold of the split.*")
    pushed = [m for m in study.pushed if any(m in w.pushed for w in worlds)]
    if pushed:
        for name, title in (("gold", "gold reward"), ("reward", "RM reward")):
            file = folder / f"pushed-{name}.png"
            figures.paths(curves(name, pushed, True), file, "KL to SFT, nats per response", title)
            made.append(f"![{title}, pushed]({folder.name}/{file.name})\n\n*{title} of the pushed methods.*")
    return made


def write(study: Study) -> None:
    """Write the page and its figures from whatever the result files hold."""
    if not read_results(study.results / "main.jsonl"):
        raise InputError(f"{study.results / 'main.jsonl'}: no rows yet; run the main grid first")
    worlds = [w for task in study.tasks if (w := read_world(study, task)).main.get("sft")]
    verdicts = []
    for claim, title in CLAIMS.items():
        found = [judged(world, study, claim) for world in worlds]
        verdicts.append(
            [f"{claim}. {title}", *(verdict(f, len(study.seeds)) for f in (found, *([one] for one in found)))]
        )
    parts = ["# The claims, measured", provenance(study)]
    parts += ["## Verdicts", table(["claim", "verdict", *(w.task for w in worlds)], verdicts)]
    parts += prose(study, "summary")
    parts += draw(worlds, study, study.page.parent / "figures")
    for world in worlds:
        parts += [f"## Main grid, {world.task}", main_table(world, study)]
    parts += [claim_section(worlds, study, claim) for claim in CLAIMS]
    for world in worlds:
        parts += [f"## Sweeps, {world.task}"]
        priced = {f"{max(study.noise)}, mpo {study.price}": world.noisiest | world.price} if world.price else {}
        parts += [sweep_table(world.noise | priced, study.noise_methods, NOISE_PAIRS, "labels flipped")]
        parts += [reward_models_table(world)]
        parts += [sweep_table(world.gamma, study.gamma_methods, GAMMA_PAIRS, "gamma"), pushed_table(world)]
    parts += ["## Collapses", collapse_list(worlds), "## Settings", settings_table(study)]
    write_text(study.page, "\n\n".join(parts) + "\n")
    print(f"page: {study.page}")
