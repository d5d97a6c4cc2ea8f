"""Writes docs/results.md from the result files: tables, verdicts, figures.

The numbers in the tables come from the result files alone. The prose that explains them is in experiments/reasons/.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments import figures
from experiments.grid import read_results
from experiments.judgement import (
    CLAIMS,
    JUDGED,
    SHOWN,
    Points,
    World,
    gold_contrast,
    judged,
    read_world,
    verdict,
)
from experiments.statistics import column, hierarchical_bootstrap
from experiments.study import GRIDS, Study
from experiments.tables import (
    BLIND,
    collapse_list,
    contrast_line,
    main_table,
    methods_table,
    pushed_table,
    reward_models_table,
    settings_table,
    sweep_table,
)
from mpo.runtime.errors import InputError
from mpo.runtime.files import write_text
from mpo.runtime.output import table

NOISE_PAIRS = [("mpo", "dpo-all-long"), ("mpo", "ppo-long"), ("mpo", "dpo"), ("dpo", "dpo-all-long")]
GAMMA_PAIRS = [("mpo", "dpo")]

INTRODUCTION = """\
The paper on Mixed Preference Optimization ([2403.19443](https://arxiv.org/abs/2403.19443)) makes claims that can be
tested where the true reward is known. This page tests six of them in the two built-in worlds, by the rules of
[protocol.md](protocol.md). `make claims` writes the page from `experiments/results/`."""

METHODS = """\
All methods of a seed begin with the same SFT model. A one-stage method trains it with DPO or PPO. A two-stage method
continues from the final policy of another method. The *reference* is the model that PPO's KL penalty and DPO's
log-ratios are measured against. The *units* are the whole training budget of the method after SFT."""

MAIN = """\
Averages over seeds and prompts. *Spread*: the standard deviation of gold over seeds. *Win vs SFT*: win % against the
SFT model. *RM*: the reward model's score. *Words*: the length of a response. *EOS*: the share of responses that end.
*Collapses*: the number of seeds on which the policy collapsed."""

REWARD_MODELS = f"""\
**Reward models under label noise.** The accuracy is on held-out labels, which are never flipped. The spread is the
standard deviation of the raw scores over the data set's chosen responses, in log-odds. The last column counts the
seeds on which the reward model misses a mistake of the probe sheet ([world.md](world.md)): fewer than
{100 * BLIND:.0f} % of the right answers score above the spoilt ones."""

QUESTIONS = {
    1: """\
Does MPO end with more gold than DPO alone and than PPO alone, at the same total budget? For these two contrasts the
last column counts as well.""",
    2: """\
Does DPO on easy pairs end with more gold than DPO on all, on random and on inverted pairs? Is DPO on all pairs better
than on hard ones?""",
    3: """\
Does PPO end with more gold if the DPO model is its reference, or both its start and its reference? Does it gain from
more prompts?""",
    4: """\
Does the order matter? `mpo` uses easy pairs and then hard ones, `reversed` the opposite, `mixed` a random split.""",
    5: """\
How much further than MPO do DPO and PPO of the same total budget drop under label noise? The *drop* is the gold without
noise less the gold with {noise:.0f} % of the labels flipped.""",
    6: "How much further than MPO does PPO fall when both are pushed?",
}


def claim_section(worlds: Sequence[World], study: Study, claim: int) -> str:
    """A claim with its verdict, its question, a table for each world, and the prose."""
    contrasts = [judged(world, study, claim) for world in worlds]
    parts = [f"## Claim {claim}. {CLAIMS[claim]}: {verdict(contrasts, len(study.seeds))}"]
    parts += [QUESTIONS[claim].format(noise=100 * max(study.noise))]
    pairs = {" - ".join(p): p for p in JUDGED.get(claim, []) + SHOWN.get(claim, [])}
    header = ["contrast", "gold", "verdict", "on each seed", "win %", "gold at equal KL"]
    for world, of_world in zip(worlds, contrasts, strict=True):
        lines = [
            contrast_line(world, name, contrast, pairs.get(name), len(study.seeds))
            for name, contrast in of_world.items()
            if not name.endswith("equal KL")
        ]
        shown = [(" - ".join(p), gold_contrast(world, p)) for p in SHOWN.get(claim, [])]
        lines += [contrast_line(world, f"({name})", c, pairs[name], len(study.seeds)) for name, c in shown]
        width = len(header) if pairs else 4  # the last two columns are for pairs of methods
        parts += [f"**{world.task}**", table(header[:width], [line[:width] for line in lines])]
    return "\n\n".join([*parts, *prose(study, f"claim-{claim}")])


def prose(study: Study, name: str) -> list[str]:
    """A part of the page's prose; [] where there is none."""
    path = study.reasons / f"{name}.md" if study.reasons else None
    return [path.read_text(encoding="utf-8").strip()] if path and path.exists() else []


def sweeps_section(world: World, study: Study) -> list[str]:
    """The tables of one world's sweeps, each after what it shows."""
    noisiest = max(study.noise)
    priced = {f"{noisiest}, mpo {study.price}": world.noisiest | world.price} if world.price else {}
    noise_text = "Gold by the share of training labels that are flipped, and contrasts."
    if priced:
        noise_text += f" In the last column, MPO alone has another KL coefficient (`{study.price}`)."
    return [
        f"## Sweeps, {world.task}",
        f"**Label noise.** {noise_text}",
        sweep_table(world.noise | priced, study.noise_methods, NOISE_PAIRS, "labels flipped"),
        REWARD_MODELS,
        reward_models_table(world),
        "**Gamma.** Gold by the threshold of the split: a quantile of |gap| (`q0.5` is the main grid).",
        sweep_table(world.gamma, study.gamma_methods, GAMMA_PAIRS, "gamma"),
        "**Pushed.** Averages over seeds of the highest gold and the last, each with the KL to SFT at which it occurs.",
        pushed_table(world),
    ]


def provenance(study: Study) -> str:
    """Which cells are finished, on which machines and commits, and how long they took."""
    files = {grid: read_results(study.results / f"{grid}.jsonl") for grid in GRIDS}
    rows = [row for of_grid in files.values() for row in of_grid]
    cells = ", ".join(f"{grid} {len(of_grid)}" for grid, of_grid in files.items())
    hours = sum(r["seconds"] for r in rows) / 3600
    commits, machines = ("; ".join(sorted({r[k] for r in rows})) for k in ("commit", "machine"))
    return (
        f"- Finished cells (a cell is one trained and evaluated policy), by grid: {cells}.\n"
        f"- Machines: {machines}; one single-threaded process for each core.\n- Commits: {commits}.\n"
        f"- The last stages of the cells alone took {hours:.1f} process-hours."
    )


# --- figures --------------------------------------------------------------------------------------

KL = "KL to SFT, nats per response"


def curves(
    worlds: Sequence[World], methods: Sequence[str], name: str, pushed: bool
) -> dict[str, dict[str, list[list[Points]]]]:
    """World -> method -> the path on each finished seed, stage by stage."""
    return {
        w.task: {
            m: [w.stages(m, s, name, pushed) for s in seeds] for m in methods if (seeds := w.seeds(m, pushed=pushed))
        }
        for w in worlds
    }


def along(
    worlds: Sequence[World], grids: str, methods: Sequence[str], number: Callable[[str], float]
) -> dict[str, dict[str, list[Any]]]:
    """World -> method -> (setting, gold with its interval) along a sweep. `number` turns a setting's name into it."""
    lines: dict[str, dict[str, list[Any]]] = {}
    for w in worlds:
        for method in methods:
            points = [
                (number(name), hierarchical_bootstrap(column(rows[method], "golds")))
                for name, rows in getattr(w, grids).items()
                if method in rows
            ]
            if len(points) > 1:
                lines.setdefault(w.task, {})[method] = points
    return lines


def draw(worlds: Sequence[World], study: Study, folder: Path) -> list[str]:
    """Draw all figures; returns them as Markdown, [] where they cannot be drawn."""
    if not figures.available():
        return []
    made = []

    def add(name: str, title: str, caption: str) -> Path:
        made.append(f"![{title}]({folder.name}/{name}.png)\n\n*{title}. {caption}*")
        return folder / f"{name}.png"

    file = add(
        "gold-by-kl",
        "Gold against KL to SFT, from the SFT model to the final policy",
        "Each line is a mean over seeds. `mpo` begins as `dpo`: its first stage is the dotted line on the blue band, "
        "and its PPO begins at the ring. The first stage of `dpo-ppo` is `dpo-all`. Right: the framed part, enlarged.",
    )
    shown = ("dpo", "dpo-all-long", "ppo-long", "mpo", "dpo-ppo")
    figures.paths(curves(worlds, shown, "gold", False), file, KL, "gold reward", enlarge=True)
    contrasts = {w.task: {i: {n: c for n, c in judged(w, study, i).items() if c} for i in JUDGED} for w in worlds}
    file = add(
        "contrasts",
        "The judged contrasts of claims 1 to 4",
        "A contrast holds if its interval lies above 0, and fails if it lies below.",
    )
    figures.forest(contrasts, file)
    if noisy := along(worlds, "noise", [m for m in study.noise_methods if m != "sft"], float):
        file = add("noise", "Gold as label noise grows", "Lines are drawn side by side, so that no bar hides another.")
        figures.sweep(noisy, file, "share of training labels flipped")
    if gammas := along(worlds, "gamma", study.gamma_methods, lambda name: float(name[1:])):
        file = add("gamma", "Gold by the threshold of the split", "With a larger gamma, fewer pairs are easy.")
        figures.sweep(gammas, file, "gamma, as a quantile of |gap|")
    if pushed := [m for m in study.pushed if any(m in w.pushed for w in worlds)]:
        for name, title, caption in (
            ("gold", "Gold of the pushed methods", "These methods are trained past their highest gold."),
            (
                "reward",
                "RM score of the pushed methods",
                "The same policies, by the reward model's score instead of gold.",
            ),
        ):
            file = add(f"pushed-{name}", title, caption)
            label = "gold reward" if name == "gold" else "RM score"
            figures.paths(curves(worlds, pushed, name, True), file, KL, label)
    return made


def write(study: Study) -> None:
    """Write the page and its figures from the rows that there are."""
    if not read_results(study.results / "main.jsonl"):
        raise InputError(f"{study.results / 'main.jsonl'}: no rows yet; run the main grid first")
    worlds = [w for task in study.tasks if (w := read_world(study, task)).main.get("sft")]
    verdicts = []
    for claim, title in CLAIMS.items():
        contrasts = [judged(world, study, claim) for world in worlds]
        together, *alone = (verdict(c, len(study.seeds)) for c in (contrasts, *([one] for one in contrasts)))
        verdicts.append([f"{claim}. {title}", together, *alone])
    parts = ["# The paper's claims, measured", INTRODUCTION, *prose(study, "warning"), *prose(study, "terms")]
    parts += ["## Methods", METHODS, methods_table(study)]
    parts += ["## Verdicts", table(["claim", "verdict", *(f"in {w.task} alone" for w in worlds)], verdicts)]
    parts += prose(study, "summary")
    if drawn := draw(worlds, study, study.page.parent / "figures"):
        parts += ["## Figures", *drawn]
    for world in worlds:
        parts += [f"## Main grid, {world.task}", MAIN, main_table(world, study)]
    parts += [claim_section(worlds, study, claim) for claim in CLAIMS]
    for world in worlds:
        parts += sweeps_section(world, study)
    parts += ["## Collapses", "Every policy of every grid that collapsed, and why.", collapse_list(worlds)]
    parts += ["## Settings", "The settings of each method's last stage that the tuning chose.", settings_table(study)]
    parts += ["## Provenance", provenance(study)]
    write_text(study.page, "\n\n".join(parts) + "\n")
    print(f"page: {study.page}")
