"""The tables of docs/results.md, each made from the rows of the result files alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.judgement import (
    Pair,
    Row,
    World,
    collapsed,
    equal_kl_contrast,
    fall,
)
from experiments.statistics import Contrast, column, difference, hierarchical_bootstrap, win
from experiments.study import FIRST_STAGE, LAST_STAGES, Study
from mpo.runtime.files import read_json
from mpo.runtime.output import interval, percent, table

BLIND = 0.75  # a reward model misses a mistake if it puts fewer right answers than this above the spoilt ones
UNITS = dict.fromkeys((*FIRST_STAGE, "dpo-long", "dpo-all-long", "ppo-long"), 2) | {"sft": 0}

ROWS = {
    "data/train.jsonl": "all pairs",
    "split/pairs.jsonl": "easy pairs",
    "split/hard.jsonl": "hard pairs",
    "split/prompts.jsonl": "hard and contradicted pairs",
    "split/random/pairs.jsonl": "random pairs, as many as are easy",
    "split/random/prompts.jsonl": "the pairs that dpo-random leaves",
    "split/inverted/pairs.jsonl": "the smallest gaps that are not contradicted, as many as are easy",
}


def contrast_line(world: World, name: str, contrast: Contrast | None, pair: Pair | None, seeds: int) -> list[str]:
    """One line of a claim's table."""
    if contrast is None:
        return [name, "not run", "", "", "", ""]
    by_seed = " ".join(f"{v:+.2f}" for _, v in sorted(contrast.per_seed.items()))
    won = equal = "-"
    if pair:
        won = percent(hierarchical_bootstrap(win(world.golds(pair[0]), world.golds(pair[1]))))
        at_equal = equal_kl_contrast(world, pair)
        equal = interval(at_equal.interval) if at_equal else "-"
    finished = len(contrast.per_seed)
    what = contrast.verdict if finished == seeds else f"{finished} of {seeds} seeds"
    return [name, interval(contrast.interval), what, by_seed, won, equal]


def methods_table(study: Study) -> str:
    """What each method is: the kind of its last stage, its data, start, reference and budget."""
    first_prompts = {"ppo-some": study.some, "ppo-few": study.few}
    lines = [["sft", "SFT", "the chosen responses", "untrained model", "-", "0"]]
    for method in study.methods[1:]:
        last = LAST_STAGES[method]
        data = ROWS[last.rows]
        if last.kind == "ppo":
            data = (
                f"prompts of {data}" if method not in first_prompts else f"the first {first_prompts[method]:,} prompts"
            )
        lines.append([method, last.kind.upper(), data, last.model, last.ref, str(UNITS.get(method, 1))])
    return table(["method", "last stage", "trained on", "starts from", "reference", "units"], lines)


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
    header = ["method", "units", "seeds", "gold", "spread", "win vs SFT %", "RM", "KL to SFT", "words", "EOS %"]
    return table([*header, "collapses"], lines)


def sweep_table(
    grids: Mapping[str, Mapping[str, Sequence[Row]]], methods: Sequence[str], pairs: Sequence[Pair], name: str
) -> str:
    """Gold along a sweep, a line for each method; then the contrasts of those pairs whose methods are there."""
    golds = [{m: column(grid.get(m, []), "golds") for m in methods} for grid in grids.values()]
    lines = {m: [by_method[m] for by_method in golds] for m in methods}
    present = [p for p in pairs if set(p) <= set(methods)]
    lines |= {" - ".join(p): [difference(*(by_method[m] for m in p)) for by_method in golds] for p in present}
    cells = {k: [interval(hierarchical_bootstrap(v)) if v else "-" for v in line] for k, line in lines.items()}
    return table([name, *grids], [[title, *line] for title, line in cells.items()])


def reward_models_table(world: World) -> str:
    """At each level of noise, the reward model of each seed: its accuracy, its spread, the mistakes that it misses."""
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
    return table(["labels flipped", "accuracy %, each seed", "spread, each seed", "missed mistakes, seeds"], lines)


def pushed_table(world: World) -> str:
    """Where gold is highest on the path of each pushed method, and where the path ends."""
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
    return table(["pushed", "seeds", "highest gold", "at KL", "last gold", "at KL", "fall on each seed"], lines)


def settings_table(study: Study) -> str:
    """The settings that the tuning chose."""
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
