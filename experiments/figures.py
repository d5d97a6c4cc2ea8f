"""The figures, drawn where matplotlib (an optional extra) is installed. Without it there are tables only.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart. Markers and dashes differ as well,
and each line has its name beside its end.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.panels import FAINT, End, make_panels, save
from experiments.statistics import Contrast, column, hierarchical_bootstrap

Rows = Sequence[Mapping[str, Any]]
Points = Sequence[tuple[float, float]]
Stages = Sequence[Points]  # the path of a policy, a list of points for each stage

BLACK, GREY, BLUE, SKY, ORANGE, RED = "#000000", "#777777", "#0072B2", "#56B4E9", "#E69F00", "#D55E00"


class Style(NamedTuple):
    """How a line is drawn."""

    colour: str
    marker: str
    dashes: Any


STYLES = {
    "mpo": Style(BLACK, "o", "-"),
    "dpo": Style(BLUE, "s", (0, (6, 1.5))),
    "dpo-all": Style(SKY, "^", (0, (6, 1.5, 1, 1.5))),
    "ppo": Style(ORANGE, "D", (0, (2.5, 1.5))),
    "dpo-ppo": Style(RED, "v", (0, (1, 1))),
}


def style_of(method: str) -> Style:
    """A method's style. A longer run of a method has the same style: ppo-long that of ppo."""
    return STYLES.get(method.removesuffix("-long"), Style(GREY, "x", "-"))


def available() -> bool:
    """Whether figures can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


# --- figures of results ----------------------------------------------------------------------------


def ablation(rows: Rows, variants: Sequence[str], path: Path) -> bool:
    """Gold of each variant with its interval, and against KL to SFT; False where it cannot be drawn."""
    if not available():
        return False
    present = [v for v in variants if any(r["variant"] == v for r in rows)]
    figure, ((left, right),) = make_panels(2, height=max(3.0, 0.28 * len(present) + 1))
    ends = []
    for i, variant in enumerate(present):
        mine = [r for r in rows if r["variant"] == variant]
        mean, low, high = hierarchical_bootstrap(column(mine, "golds"))
        left.errorbar(mean, i, xerr=[[mean - low], [high - mean]], fmt="o", color=BLUE, capsize=2)
        kl = float(np.mean([r["kl"] for r in mine]))
        right.scatter([r["kl"] for r in mine], [r["gold"] for r in mine], s=8, color=GREY, alpha=0.6)
        right.plot(kl, mean, "o", color=BLUE, markersize=5)
        ends.append(End(variant, kl, mean, BLUE))
    left.set_yticks(range(len(present)), present)
    left.invert_yaxis()
    left.set(xlabel="gold reward, 95 % interval over seeds and prompts", title=rows[0]["task"])
    right.set(xlabel="KL to SFT, nats per response", ylabel="gold reward", title="large: mean; small: single seeds")
    save(figure, path, [(right, ends)])
    return True


def _mean_path(seeds: Sequence[Stages]) -> tuple[NDArray[np.float64], int]:
    """(points, 2): the path averaged over seeds; and the index of the point at which the last stage begins."""
    whole = [[*stages[0], *(point for stage in stages[1:] for point in stage[1:])] for stages in seeds]
    length = min(map(len, whole))
    return np.mean([points[-length:] for points in whole], axis=0), length - len(seeds[0][-1])


def _draw_paths(axis: Any, methods: Mapping[str, Sequence[Stages]]) -> dict[str, NDArray[np.float64]]:
    """Draw each method's mean path, and its single seeds faintly; returns the mean paths.

    A path that another one continues is drawn as a wide band, so that both can be seen.
    """
    means = {method: _mean_path(seeds) for method, seeds in methods.items()}
    for method, (mean, cut) in means.items():
        colour, marker, _ = style_of(method)
        for stages in methods[method]:
            for points in stages:
                axis.plot(*zip(*points, strict=True), color=colour, alpha=FAINT, linewidth=0.7)
        continued = any(at > 0 and np.array_equal(other[: at + 1], mean) for other, at in means.values())
        axis.plot(*mean[cut:].T, color=colour, **({"linewidth": 5, "alpha": 0.4} if continued else {"linewidth": 1.4}))
        axis.plot(*mean[cut + 1 : -1].T, marker, color=colour, markersize=3.5, zorder=5)
        axis.plot(*mean[-1], marker, color=colour, markersize=7, zorder=5)
        if cut > 0:
            axis.plot(*mean[: cut + 1].T, ":", color=colour, linewidth=1.4, zorder=3)
            axis.plot(*mean[cut], "o", color=colour, markerfacecolor="none", markersize=12, zorder=6)
    return {method: mean for method, (mean, _) in means.items()}


def _paths_key(figure: Any, two_stages: bool) -> None:
    """Say below the panels what the kinds of lines and markers mean."""
    from matplotlib.lines import Line2D

    kinds: list[tuple[str, dict[str, Any]]] = [
        ("intermediate model", {"marker": "o", "linestyle": "", "markersize": 3.5}),
        ("final policy", {"marker": "o", "linestyle": "", "markersize": 7}),
        ("single seed", {"alpha": 2 * FAINT, "linewidth": 0.7}),
    ]
    if two_stages:
        kinds = [
            ("first of two stages", {"linestyle": ":", "linewidth": 1.3}),
            ("second stage begins", {"marker": "o", "linestyle": "", "markersize": 12, "markerfacecolor": "none"}),
            *kinds,
        ]
    handles = [Line2D([], [], color=GREY, label=label, **look) for label, look in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)


def paths(
    curves: Mapping[str, Mapping[str, Sequence[Stages]]], path: Path, xlabel: str, ylabel: str, enlarge: bool = False
) -> None:
    """For each world, the path of each method from the SFT model to its final policy, stage by stage.

    Args:
        curves: world -> method -> the path on each seed.
        path: the file to write.
        xlabel, ylabel: the names of the axes.
        enlarge: give each world a second panel, which enlarges the part where most paths end.
    """
    columns = 2 if enlarge else len(curves)
    figure, panels = make_panels(columns, rows=len(curves) if enlarge else 1)
    ends = []
    for i, (task, methods) in enumerate(curves.items()):
        axes = panels[i] if enlarge else [panels[0][i]]
        for axis in axes:
            means = _draw_paths(axis, methods)
            axis.set(xlabel=xlabel, ylabel=ylabel, title=task if axis is axes[0] else f"{task}, enlarged")
            start = next(iter(means.values()))[0]
            named = [End(m, mean[-1, 0], mean[-1, 1], style_of(m).colour) for m, mean in means.items()]
            ends.append((axis, [*named, End("sft", start[0], start[1], GREY)]))
        lasts = np.asarray([mean[-1] for mean in means.values()])
        furthest = max(0.1, *(float(mean[:, 0].max()) for mean in means.values()))
        axes[0].set_xlim(right=1.25 * furthest)  # a single seed may leave the panel, so that the means can be read
        if enlarge:
            firsts = np.asarray([mean[1] for mean in means.values()])
            margin = 0.08 * (lasts[:, 1].max() - firsts[:, 1].min())
            box = (0.8 * firsts[:, 0].min(), 1.35 * float(np.median(lasts[:, 0])))
            axes[1].set_xlim(*box)
            axes[1].set_ylim(firsts[:, 1].min() - margin, lasts[:, 1].max() + 2 * margin)
            axes[0].indicate_inset(axes[1].viewLim.bounds, edgecolor=GREY, linewidth=0.8)
    _paths_key(figure, any(len(stages) > 1 for m in curves.values() for seeds in m.values() for stages in seeds))
    save(figure, path, ends)


VERDICTS = {"holds": (BLUE, "o"), "fails": (RED, "s"), "open": (GREY, "D")}  # colour and marker


def forest(groups: Mapping[str, Mapping[int, Mapping[str, Contrast]]], path: Path) -> None:
    """A panel for each world: the contrasts of each claim with their intervals, verdicts and single seeds."""
    from matplotlib.lines import Line2D

    longest = max(sum(len(c) + 1 for c in claims.values()) for claims in groups.values())
    figure, (axes,) = make_panels(len(groups), width=4.8, height=0.27 * longest + 1.2)
    for axis, (task, claims) in zip(axes, groups.items(), strict=True):
        names: list[str] = []
        for claim, contrasts in claims.items():
            names.append(f"claim {claim}")
            for name, one in contrasts.items():
                mean, low, high = one.interval
                colour, marker = VERDICTS[one.verdict]
                at = len(names)
                axis.errorbar(
                    mean, at, xerr=[[mean - low], [high - mean]], fmt=marker, color=colour, markersize=6, capsize=2
                )
                axis.scatter(list(one.per_seed.values()), [at + 0.3] * len(one.per_seed), s=5, color=GREY)
                names.append(name)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(names)), names)
        for tick, line, name in zip(axis.get_yticklabels(), axis.yaxis.get_ticklines()[::2], names, strict=True):
            if name.startswith("claim"):
                tick.set_fontweight("bold")
                line.set_visible(False)
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.set(xlabel="difference in gold reward", title=task)
        if axis is not axes[0]:
            axis.sharex(axes[0])
            axis.tick_params(labelleft=False)
    handles = [Line2D([], [], color=c, marker=m, label=f"{v}") for v, (c, m) in VERDICTS.items()]
    handles.append(Line2D([], [], color=GREY, marker="o", markersize=2.5, linestyle="", label="single seed"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    save(figure, path)


def differences(lines: Mapping[str, tuple[float, float, Sequence[float]]], small: float, path: Path) -> None:
    """A line for each name: a mean difference in gold, half its interval, and the difference on each seed.

    Differences of less than `small` are shaded.
    """
    figure, ((axis,),) = make_panels(1, width=7.5, height=0.21 * len(lines) + 0.9)
    axis.axvspan(-small, small, color=GREY, alpha=0.12, linewidth=0)
    axis.axvline(0, color=BLACK, linewidth=0.8)
    for at, (mean, half, seeds) in enumerate(lines.values()):
        colour = RED if mean + half < 0 else BLUE if mean - half > 0 else GREY
        axis.errorbar(mean, at, xerr=half, fmt="o", color=colour, markersize=5, capsize=2)
        axis.scatter(seeds, [at + 0.28] * len(seeds), s=4, color=colour, alpha=0.6)
    axis.set_yticks(range(len(lines)), list(lines))
    axis.set_ylim(len(lines) - 0.4, -0.6)
    ends = [small, -small, *(seed for _, _, seeds in lines.values() for seed in seeds)]
    margin = 0.1 * (max(ends) - min(ends))
    axis.set_xlim(min(ends) - margin, max(ends) + margin)  # an interval from two seeds may be wider than that
    axis.set(xlabel="gold without the detail less gold with it: mean, 95 % interval, single seeds")
    save(figure, path)


def sweep(
    lines: Mapping[str, Mapping[str, Sequence[tuple[float, tuple[float, float, float]]]]], path: Path, xlabel: str
) -> None:
    """A panel for each world: gold with its interval along a setting that is varied, a line for each method."""
    figure, (axes,) = make_panels(len(lines))
    ends = []
    for axis, (task, methods) in zip(axes, lines.items(), strict=True):
        named = []
        for i, (method, points) in enumerate(methods.items()):
            settings = np.asarray([p[0] for p in points])
            mean, low, high = (np.asarray([p[1][k] for p in points]) for k in range(3))
            width = settings.max() - settings.min()
            x = settings + 0.022 * width * (i - (len(methods) - 1) / 2)  # side by side, so that no bar hides another
            colour, marker, dashes = style_of(method)
            error = np.stack((mean - low, high - mean))
            look = {"marker": marker, "markersize": 5, "capsize": 2, "color": colour}
            axis.errorbar(x, mean, error, linestyle=dashes, **look)
            named.append(End(method, x[-1], mean[-1], colour))
        axis.set_xticks(settings, [f"{s:g}" for s in settings])
        axis.set_xlim(right=settings.max() + 0.3 * width)
        axis.set(xlabel=xlabel, ylabel="gold reward", title=task)
        ends.append((axis, named))
    save(figure, path, ends)


def growth(
    lines: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]], ylabels: Sequence[str], path: Path
) -> None:
    """A column for each size that grows, a row for each quantity; lines[size][way][value] has a number for each row."""
    figure, panels = make_panels(len(lines), width=3.6, height=2.8, rows=len(ylabels))
    styles = (STYLES["mpo"], STYLES["dpo"], STYLES["dpo-ppo"])
    ends = []
    for place, (thing, ways) in enumerate(lines.items()):
        for row, label in enumerate(ylabels):
            axis, named = panels[row][place], []
            for (way, points), (colour, marker, dashes) in zip(ways.items(), styles, strict=False):
                ys = [numbers[row] for numbers in points.values()]
                axis.plot(list(points), ys, marker=marker, linestyle=dashes, color=colour, markersize=5)
                named.append(End(way.replace(", ", ",\n"), list(points)[-1], ys[-1], colour))
            sizes = list(points)
            axis.set(xscale="log", yscale="log", xlabel=thing, ylabel=label if place == 0 else "")
            apart = [i for i, size in enumerate(sizes) if i == 0 or size >= 1.4 * sizes[i - 1]]
            axis.set_xticks(sizes, [f"{size:,}" if i in apart else "" for i, size in enumerate(sizes)])
            axis.set_xlim(right=sizes[-1] * (sizes[-1] / sizes[0]) ** 0.4)
            low, high = axis.get_ylim()
            ticks = [
                t for t in (digit * 10.0**power for power in range(-3, 7) for digit in (1, 2, 5)) if low <= t <= high
            ]
            axis.set_yticks(ticks, [f"{t:,g}" for t in ticks])
            axis.minorticks_off()
            ends.append((axis, named))
    save(figure, path, ends)
