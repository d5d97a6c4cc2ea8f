"""Panels of a figure, and the placing of each line's name beside its end."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DPI = 110
FAINT = 0.2  # opacity of single seeds, which names may cover


class End(NamedTuple):
    """A point of a line, usually the last, that the line's name is written beside."""

    name: str
    x: float
    y: float
    colour: str


def make_panels(columns: int, width: float = 4.6, height: float = 3.6, rows: int = 1) -> tuple[Any, Any]:
    """A figure, and its panels (rows, columns)."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    style = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 10}
    plt.rcParams.update(style | {"legend.frameon": False, "figure.constrained_layout.use": True, "figure.dpi": DPI})
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)


def save(figure: Any, path: Path, ends: Sequence[tuple[Any, Sequence[End]]] = ()) -> None:
    """Write the names of each panel's lines, then the figure."""
    import matplotlib.pyplot as plt

    figure.draw_without_rendering()  # settles the layout, so that names can be placed by the pixel
    figure.set_layout_engine("none")
    for axis, ends_of_panel in ends:
        _name_lines(axis, ends_of_panel)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _ink(axis: Any) -> NDArray[np.float64]:
    """(N, 2): the pixels, a few apart, of all lines and error bars of a panel but the faint ones."""
    lines = [np.asarray(line.get_xydata()) for line in axis.lines if line.get_alpha() != FAINT]
    for bars in axis.collections:
        lines += bars.get_segments() if hasattr(bars, "get_segments") else []
    dense = [np.empty((0, 2))]
    for line in lines:
        at = axis.transData.transform(line)
        dense.append(at)
        for a, b in itertools.pairwise(at):
            dense.append(a + (b - a) * np.linspace(0, 1, 2 + int(np.hypot(*(b - a)) / 3))[:, None])
    return np.concatenate(dense)


def _name_lines(axis: Any, ends: Sequence[End]) -> None:
    """Write each name as close to its end as it can be without covering a line or another name."""
    from matplotlib.colors import to_rgb
    from matplotlib.patheffects import withStroke

    ink, frame = _ink(axis), axis.get_window_extent()
    low, high = np.asarray((frame.x0, frame.y0)), np.asarray((frame.x1 + 8, frame.y1 + 8))
    taken: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []  # corners of the names so far
    around = np.linspace(0, 2 * np.pi, 24, endpoint=False)  # to the right first
    points = axis.transData.transform([(end.x, end.y) for end in ends])

    def cost(away: float, corner: NDArray[np.float64], opposite: NDArray[np.float64], others: Any) -> float:
        outside = (corner < low).any() or (opposite > high).any()
        on_name = any((corner < b).all() and (opposite > a).all() for a, b in taken)
        covered = ((ink > corner) & (ink < opposite)).all(1).sum()
        mistakable = ((others > corner - 8) & (others < opposite + 8)).all(1).any()  # for the name of another line
        return away + 10 * covered + 100 * mistakable + 1e4 * (outside or on_name)

    for end, at in zip(ends, points, strict=True):
        if not frame.contains(*at):
            continue
        look = {"ha": "center", "va": "center", "multialignment": "left", "fontsize": 8}
        others = points[np.abs(points - at).max(1) > 1]
        trial = axis.text(end.x, end.y, end.name, **look)
        extent = trial.get_window_extent()
        trial.remove()
        size = np.asarray((extent.width + 4, extent.height + 2))
        places: list[tuple[float, int, float, NDArray[np.float64]]] = []
        for away in (9.0, 13.0, 18.0, 26.0, 36.0, 48.0, 60.0):
            for angle in around:
                move = np.asarray((np.cos(angle), np.sin(angle))) * (size / 2 + away)
                total = cost(away, at + move - size / 2, at + move + size / 2, others)
                places.append((total, len(places), away, move))
        _, _, away, move = min(places)
        taken.append((at + move - size / 2, at + move + size / 2))
        colour = [0.7 * c for c in to_rgb(end.colour)]  # dark enough to be read as text
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3}
        axis.annotate(
            end.name,
            (end.x, end.y),
            72 / DPI * move,
            textcoords="offset points",
            color=colour,
            path_effects=[withStroke(linewidth=2, foreground="white")],
            arrowprops=arrow if away > 13 else None,
            annotation_clip=False,
            **look,
        )
