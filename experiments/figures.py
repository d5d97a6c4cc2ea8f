"""The figures, where matplotlib is installed (an optional extra); without it there are tables only."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.statistics import Contrast, column, hierarchical_bootstrap

Rows = Sequence[Mapping[str, Any]]
Points = Sequence[tuple[float, float]]

COLOURS = {
    "sft": "#777777",
    "dpo": "#1b6ca8",
    "dpo-all": "#62b0e8",
    "dpo-all-long": "#62b0e8",
    "dpo-long": "#1b6ca8",
    "dpo-hard": "#8c6bb1",
    "ppo": "#e08214",
    "ppo-hard": "#b35806",
    "ppo-long": "#e08214",
    "mpo": "#1a9850",
    "dpo-ppo": "#d6604d",
    "reversed": "#999933",
    "mixed": "#cc6677",
}


def available() -> bool:
    """Whether figures can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def _axes(columns: int, width: float = 4.6, height: float = 3.6, rows: int = 1) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    style = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 10}
    plt.rcParams.update(style | {"legend.frameon": False, "figure.constrained_layout.use": True})
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    return figure, axes[0] if rows == 1 else axes


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def ablation(rows: Rows, variants: Sequence[str], path: Path) -> bool:
    """Gold of each variant with its interval, and against KL to SFT; False where it cannot be drawn."""
    if not available():
        return False
    present = [v for v in variants if any(r["variant"] == v for r in rows)]
    figure, (left, right) = _axes(2, height=max(3.0, 0.28 * len(present) + 1))
    for i, variant in enumerate(present):
        mine = [r for r in rows if r["variant"] == variant]
        mean, low, high = hierarchical_bootstrap(column(mine, "golds"))
        left.errorbar(mean, i, xerr=[[mean - low], [high - mean]], fmt="o", color="#1b6ca8", capsize=2)
        right.scatter([r["kl"] for r in mine], [r["gold"] for r in mine], s=14)
        kl = float(np.mean([r["kl"] for r in mine]))
        right.annotate(variant, (kl, mean), fontsize=7, xytext=(3, 3), textcoords="offset points")
    left.set_yticks(range(len(present)), present)
    left.invert_yaxis()
    left.set(xlabel="gold reward, 95 % interval over seeds and prompts", title=f"{rows[0]['task']}")
    right.set(xlabel="KL to SFT, nats per response", ylabel="gold reward", title="one point a seed")
    _save(figure, path)
    return True


def paths(curves: Mapping[str, Mapping[str, Sequence[Points]]], path: Path, xlabel: str, ylabel: str) -> None:
    """One panel a world: for each method its mean path over seeds, and the single seeds faintly."""
    figure, axes = _axes(len(curves))
    for axis, (task, methods) in zip(axes, curves.items(), strict=True):
        furthest = 0.1
        for method, seeds in methods.items():
            colour = COLOURS.get(method)
            for points in seeds:
                axis.plot(*zip(*points, strict=True), color=colour, alpha=0.18, linewidth=0.8)
            length = min(map(len, seeds))
            mean = np.mean([points[-length:] for points in seeds], axis=0)
            axis.plot(mean[:, 0], mean[:, 1], color=colour, marker="o", markersize=3, label=method)
            furthest = max(furthest, float(mean[:, 0].max()))
        axis.set(xlabel=xlabel, ylabel=ylabel, title=task)
        axis.set_xlim(right=1.25 * furthest)  # a single seed may leave the picture, the means stay readable
        axis.legend(fontsize=7)
    _save(figure, path)


def forest(groups: Mapping[str, Mapping[str, Contrast]], path: Path) -> None:
    """One panel a world: each contrast with its interval; green holds, red fails, grey is open."""
    figure, axes = _axes(len(groups), height=0.3 * max(map(len, groups.values())) + 1)
    colour = {"holds": "#1a9850", "fails": "#d73027", "open": "#777777"}
    for axis, (task, contrasts) in zip(axes, groups.items(), strict=True):
        for i, found in enumerate(contrasts.values()):
            mean, low, high = found.interval
            c = colour[found.verdict]
            axis.errorbar(mean, i, xerr=[[mean - low], [high - mean]], fmt="o", color=c, capsize=2)
            axis.scatter(list(found.per_seed.values()), [i] * len(found.per_seed), s=6, color=c, alpha=0.5)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(contrasts)), list(contrasts))
        axis.invert_yaxis()
        axis.set(xlabel="difference in gold reward", title=task)
    _save(figure, path)


def sweep(
    lines: Mapping[str, Mapping[str, Sequence[tuple[float, tuple[float, float, float]]]]], path: Path, xlabel: str
) -> None:
    """One panel a world: gold with its interval along a swept setting, a line a method."""
    figure, axes = _axes(len(lines))
    for axis, (task, methods) in zip(axes, lines.items(), strict=True):
        for i, (method, points) in enumerate(methods.items()):
            x = np.asarray([p[0] for p in points])
            mean, low, high = (np.asarray([p[1][k] for p in points]) for k in range(3))
            x = x + (x.max() - x.min()) * 0.006 * (i - len(methods) / 2)  # side by side, not on top
            style = "--" if method.endswith("-long") else "-"
            error = np.stack((mean - low, high - mean))
            axis.errorbar(
                x, mean, error, fmt=style, marker="o", markersize=3, capsize=2, color=COLOURS.get(method), label=method
            )
        axis.set(xlabel=xlabel, ylabel="gold reward", title=task)
        axis.legend(fontsize=7)
    _save(figure, path)


def growth(
    lines: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]], ylabels: Sequence[str], path: Path
) -> None:
    """A column for each thing that grows, a row for each quantity: lines[thing][who][size] has one number a row."""
    figure, axes = _axes(len(lines), width=3.4, height=2.8, rows=len(ylabels))
    colours = ("#1a9850", "#a6d96a", "#d6604d")
    for place, (thing, ways) in enumerate(lines.items()):
        for row, label in enumerate(ylabels):
            axis = axes[row][place]
            for (who, points), colour in zip(ways.items(), colours, strict=False):
                ys = [numbers[row] for numbers in points.values()]
                axis.plot(list(points), ys, "o-", color=colour, label=who, markersize=4)
            axis.set(xscale="log", yscale="log", xlabel=thing, ylabel=label if place == 0 else "")
            axis.set_xticks(list(points), [f"{size:,}" for size in points])
            low, high = axis.get_ylim()
            ticks = [
                t for t in (digit * 10.0**power for power in range(-3, 7) for digit in (1, 2, 5)) if low <= t <= high
            ]
            axis.set_yticks(ticks, [f"{t:,g}" for t in ticks])
            axis.minorticks_off()
    axes[0][0].legend(fontsize=7)
    _save(figure, path)


def names(methods: Iterable[str]) -> str:
    """For captions: "a, b and c"."""
    *rest, last = methods
    return f"{', '.join(rest)} and {last}" if rest else last
