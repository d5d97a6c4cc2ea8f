"""The figures of a run's page; page_svg.py draws them.

    python -m mpo.tools.page_figures RUN FILE.svg

draws three of them side by side, for a README.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpo.runtime.entry import run_plain
from mpo.runtime.errors import InputError
from mpo.runtime.files import read_json, write_text
from mpo.tools import page_svg
from mpo.tools.page_run import Metrics, StageFiles, finished_eval, of_kind, read_run, read_scores
from mpo.tools.page_svg import (
    AMBER,
    BLUE,
    GREEN,
    INK,
    MUTED,
    PURPLE,
    RED,
    SIZE,
    SKY,
    WIDTH,
    Draw,
    Label,
    side_by_side,
    standalone,
    svg,
    write_labels,
)
from mpo.tools.report import NAMES, judge_of

Floats = NDArray[np.float64]
Interval = Sequence[float]  # value, low, high

POLICY_COLOURS = (BLUE, RED, GREEN, PURPLE, SKY, AMBER)
PART_COLOURS = {"easy": BLUE, "hard": AMBER, "contradicted": RED}
MOST_POINTS = 400  # of a curve; more cannot be seen


# --- helpers ---------------------------------------------------------------------------------------


def column(metrics: Metrics, name: str) -> tuple[Floats, Floats]:
    """The steps, counted from 1, and the finite values of one metric."""
    pairs = [(m.get("step", i) + 1, m[name]) for i, m in enumerate(metrics) if name in m and np.isfinite(m[name])]
    array = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def thinned(values: Floats) -> Floats:
    """Means of equal pieces, so that at most MOST_POINTS are left."""
    pieces = np.array_split(values, min(len(values), MOST_POINTS)) if len(values) else []
    return np.asarray([piece.mean() for piece in pieces])


def smoothed(values: Floats) -> Floats:
    """The running mean over a twentieth of the steps and at least seven, over fewer at both ends."""
    half = max(len(values) // 40, min(3, len(values) // 8))
    total = np.concatenate(([0.0], np.cumsum(values)))
    at = np.arange(len(values))
    low, high = np.maximum(0, at - half), np.minimum(len(values), at + half + 1)
    return np.asarray((total[high] - total[low]) / (high - low))


def name_of(policy: str) -> str:
    """How a figure names a policy."""
    name = NAMES.get(policy, policy)
    return name if len(name) <= 24 else f"{name[:11]}...{name[-10:]}"


def colours_of(policies: Sequence[str]) -> dict[str, str]:
    """A colour for each policy; the baseline, which is the first, and the data set's responses are grey."""
    trained = [p for p in policies[1:] if p != "chosen"]
    colours = {p: POLICY_COLOURS[i % len(POLICY_COLOURS)] for i, p in enumerate(trained)}
    return {p: colours.get(p, MUTED) for p in policies}


# --- learning curves -------------------------------------------------------------------------------


class Curve(NamedTuple):
    """One figure of a stage's learning curves."""

    title: str
    unit: str  # above the vertical axis
    lines: Mapping[str, str]  # metric -> name beside its line, "" for its last value


CURVES: dict[str, tuple[Curve, ...]] = {
    "train_sft": (Curve("Loss", "nats per response token", {"loss": ""}),),
    "train_rm": (
        Curve("Loss", "nats per pair", {"loss": ""}),
        Curve("Accuracy", "share of pairs whose chosen response scores higher", {"accuracy": ""}),
    ),
    "train_dpo": (
        Curve("Loss", "nats per pair", {"loss": ""}),
        Curve("Implicit rewards", "beta log(pi / pi_ref)", {"reward_chosen": "chosen", "reward_rejected": "rejected"}),
        Curve("Accuracy", "share of pairs with a positive margin", {"accuracy": ""}),
    ),
    "train_ppo": (
        Curve("Score by the reward model", "standard deviations of chosen responses", {"score": ""}),
        Curve("KL to the reference", "nats per response", {"kl_exact": ""}),
        Curve("Length", "tokens per response", {"length": ""}),
        Curve("Finished responses", "share that ends in EOS", {"eos_rate": ""}),
        Curve("Entropy", "nats per token", {"entropy": ""}),
        Curve("Critic", "explained variance of the returns", {"explained_variance": ""}),
    ),
}


def learning_curve(stage: StageFiles, curve: Curve) -> str:
    """One learning curve of a stage: every step faint, the running mean in colour, held-out values as a dot."""

    def draw(axes: Any) -> None:
        labels, inside = [], []
        for (metric, name), colour in zip(curve.lines.items(), (BLUE, RED), strict=False):
            steps, values = column(stage.metrics, metric)
            if not len(steps):
                continue
            x, mean = thinned(steps), thinned(smoothed(values))
            axes.plot(x, thinned(values), color=colour, linewidth=0.8, alpha=0.35)
            axes.plot(x, mean, color=colour, marker="o" if len(x) == 1 else "")
            inside += [*np.quantile(values, (0.01, 0.99)), mean.min(), mean.max()]  # a few extreme steps may leave it
            labels.append(Label(f"{name} {mean[-1]:.2f}".strip(), x[-1], mean[-1], colour))
            if held_out := _held_out(stage, metric):
                value, low, high = held_out
                axes.errorbar(x[-1], value, [[value - low], [high - value]], fmt="o", color=INK, markersize=5)
                labels.append(Label(f"held out {value:.2f}", x[-1], value, INK))
                inside += [low, high]
        axes.set(title=curve.unit, xlabel="rollout" if stage.kind == "train_ppo" else "optimiser step")
        margin = 0.08 * (max(inside) - min(inside)) or 0.1 * abs(inside[0]) or 0.1
        axes.set_ylim(min(inside) - margin, max(inside) + margin)
        _leave_room(axes, 0.62 * SIZE * max(len(label.text) for label in labels) + 8)
        write_labels(axes, labels)

    return svg(draw, 190)


def _leave_room(axes: Any, points: float) -> None:
    """Leave room for labels at the right end of the lines, without ticks there."""
    left, right = axes.dataLim.x0, axes.dataLim.x1
    wide = (right - left) or 1.0
    inner = WIDTH - 45 - points
    axes.set_xlim(left - 0.02 * wide, right + wide * points / inner)
    axes.locator_params(axis="x", integer=True, nbins=6)
    axes.set_xticks([t for t in axes.get_xticks() if left - 0.02 * wide <= t <= right])


def _held_out(stage: StageFiles, metric: str) -> Interval | None:
    """The value of a metric on held-out rows, with its interval where there is one."""
    results = stage.results
    if stage.kind == "train_sft" and metric == "loss" and "held_out_loss" in results:
        return [float(results["held_out_loss"])] * 3
    held_out = results.get("held_out", {}) if stage.kind == "train_rm" else {}
    if metric == "accuracy" and held_out:
        return [float(v) for v in held_out["accuracy"]]
    if metric == "loss" and held_out:
        return [float(held_out["log_loss"])] * 3
    return None


# --- figures of results ----------------------------------------------------------------------------


def draw_reward_against_kl(stages: Sequence[StageFiles]) -> Draw:
    """The path of each PPO stage: mean score of a rollout against its KL to the reference."""

    def draw(axes: Any) -> None:
        labels: list[Label] = []
        ink: list[tuple[float, float]] = []
        for i, stage in enumerate(stages):
            colour = POLICY_COLOURS[(i + 1) % len(POLICY_COLOURS)]
            both = [m for m in stage.metrics if np.isfinite(m.get("kl_exact", np.nan) + m.get("score", np.nan))]
            kl, score = (np.asarray([m[name] for m in both]) for name in ("kl_exact", "score"))
            axes.plot(kl, score, "o", color=colour, markersize=3, alpha=0.35, markeredgewidth=0)
            x, y = smoothed(kl), smoothed(score)
            axes.plot(x, y, color=colour)
            axes.plot(x[0], y[0], "o", color=colour, markersize=7, markerfacecolor="none")
            axes.plot(x[-1], y[-1], "o", color=colour, markersize=7)
            labels.append(Label(name_of(stage.name), x[-1], y[-1], colour))
            ink += zip(x, y, strict=True)
        axes.set(title="score by the reward model", xlabel="KL to the reference, nats per response")
        axes.margins(x=0.08, y=0.12)
        write_labels(axes, labels, ink)

    return draw


def draw_policies(results: Mapping[str, Mapping[str, Any]], judge: str) -> Draw:
    """Each policy's held-out reward, by gold or by the reward model, against its KL to the first policy."""

    def draw(axes: Any) -> None:
        labels, colours = [], colours_of(list(results))
        for name, r in results.items():
            value, low, high = r[judge]
            if "kl" in r:
                axes.errorbar(r["kl"][0], value, [[value - low], [high - value]], fmt="o", color=colours[name])
                labels.append(Label(name_of(name), r["kl"][0], value, colours[name]))
            else:  # the responses of the data set
                axes.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        unit = "gold reward" if judge == "gold" else "reward model's score"
        first = name_of(next(iter(results)))
        axes.set(title=unit, xlabel=f"KL to {first}, nats per response")
        axes.margins(x=0.16, y=0.1)
        write_labels(axes, labels)

    return draw


def draw_win_rates(results: Mapping[str, Mapping[str, Any]], judge: str, opponent: str) -> Draw:
    """Each policy's win rate as a dot with its interval; `opponent` is sft (the first policy) or chosen."""

    def draw(axes: Any) -> None:
        colours = colours_of(list(results))
        itself = next(iter(results)) if opponent == "sft" else "chosen"
        shown = [name for name in results if name != itself]
        axes.axvline(50, color=MUTED, linewidth=1)
        ends = [50.0]
        for i, name in enumerate(shown):
            value, low, high = (100 * v for v in results[name][f"{judge}_win_{opponent}"])
            axes.errorbar(value, i, xerr=[[value - low], [high - value]], fmt="o", color=colours[name], markersize=6)
            look = {"textcoords": "offset points", "ha": "center", "color": colours[name]}
            axes.annotate(f"{value:.0f} %", (value, i), (0, 6), **look)
            ends += [low, high]
        margin = 0.08 * (max(ends) - min(ends)) + 1
        axes.set_xlim(max(0, min(ends) - margin), min(100, max(ends) + margin))
        axes.set_yticks(range(len(shown)), [name_of(n) for n in shown])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_ylim(len(shown) - 0.5, -0.75)
        axes.grid(axis="y", visible=False)
        by = "gold reward" if judge == "gold" else "the reward model"
        axes.set(xlabel=f"% of prompts won against {name_of(itself)}, by {by}")

    return draw


def rows_height(count: int) -> float:
    """The height of a figure with a row for each of `count` policies."""
    return 46 + 27 * max(1, count)


def draw_lengths(words: Mapping[str, Sequence[int]]) -> Draw:
    """The lengths of each policy's responses: median, middle half, and from the 5th to the 95th percentile."""

    def draw(axes: Any) -> None:
        colours = colours_of(list(words))
        for i, (name, counts) in enumerate(words.items()):
            low, quarter, median, three, high = np.quantile(np.asarray(counts), (0.05, 0.25, 0.5, 0.75, 0.95))
            axes.plot([low, high], [i, i], color=colours[name], linewidth=1.2)
            axes.plot([quarter, three], [i, i], color=colours[name], linewidth=7, alpha=0.45, solid_capstyle="butt")
            axes.plot(median, i, "o", color=colours[name], markersize=6)
            look = {"textcoords": "offset points", "ha": "center", "color": colours[name]}
            axes.annotate(f"{median:.0f}", (median, i), (0, 6), **look)
        axes.set_yticks(range(len(words)), [name_of(n) for n in words])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_ylim(len(words) - 0.5, -0.75)
        axes.set_xlim(left=0)
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="words per response")

    return draw


def draw_gaps(parts: Mapping[str, ArrayLike], gamma: float | None) -> Draw:
    """The histogram of reward gaps with the split's parts stacked; `gamma`: the threshold, where it is one of gaps."""

    def draw(axes: Any) -> None:
        gaps = {name: np.asarray(values, dtype=np.float64) for name, values in parts.items()}
        everything = np.concatenate([*gaps.values(), [0.0]])
        low, high = np.quantile(everything, (0.001, 0.999))
        edges = np.linspace(low, high, 49) if high > low else np.asarray([low - 0.5, high + 0.5])
        below = np.zeros(len(edges) - 1)
        for name, values in gaps.items():
            counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
            axes.bar(edges[:-1], counts, np.diff(edges), below, align="edge", color=PART_COLOURS.get(name, MUTED))
            below += counts
        for i, (name, values) in enumerate(reversed(gaps.items())):
            look = {"ha": "right", "va": "top", "color": PART_COLOURS.get(name, MUTED), "transform": axes.transAxes}
            axes.text(1, 0.86 - 0.085 * i, f"{name} {len(values):,}", **look)
        top = float(below.max())
        for value, text in ((gamma, f"gamma {gamma:.2f}"), (-gamma, "-gamma")) if gamma is not None else ():
            axes.axvline(value, color=INK, linewidth=1, linestyle=(0, (3, 2)))
            side = {"ha": "left" if value > 0 else "right", "va": "top"}
            axes.annotate(text, (value, 1.09 * top), (3 if value > 0 else -3, 0), textcoords="offset points", **side)
        axes.set_ylim(0, 1.1 * top or 1)
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
        axes.set(title="pairs", xlabel="gap r(chosen) - r(rejected), in standard deviations")

    return draw


# --- the picture of a README -----------------------------------------------------------------------


def readme_picture(run: Path) -> str:
    """Three figures of a run side by side. Raises InputError where the run lacks one of them."""
    stages = read_run(run)
    evaluation, ppo = finished_eval(stages), [s for s in of_kind(stages, "train_ppo") if s.metrics]
    splits = [s for s in of_kind(stages, "split_data") if s.manifest]
    if not (evaluation and ppo and splits):
        raise InputError(f"{run}: the picture needs a finished split, PPO stage and evaluation")
    results = read_json(evaluation.folder / "results.json")["policies"]
    gamma = float(splits[0].results["gamma"])
    draws = [draw_gaps(read_scores(splits[0]), gamma), draw_reward_against_kl(ppo)]
    draws.append(draw_win_rates(results, judge_of(results), "sft"))
    return standalone(side_by_side(draws, 3 * 300, 230), 3 * 300, 230)


def main(argv: list[str]) -> None:
    """Draw the picture of the run argv[0] into the file argv[1]."""
    if len(argv) != 2 or any(word.startswith("-") for word in argv):
        usage = "usage: python -m mpo.tools.page_figures RUN FILE.svg"
        if argv not in (["-h"], ["--help"]):
            raise InputError(usage)
        print(usage)
        sys.exit(0)
    if not page_svg.available():
        raise InputError("figures need matplotlib; install it with: pip install matplotlib, or make .venv/.figures")
    write_text(Path(argv[1]), readme_picture(Path(argv[0])))
    print(argv[1])


if __name__ == "__main__":
    run_plain(main)
