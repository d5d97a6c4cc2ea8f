"""Drawing for the page of a run: SVG that takes its colours from the page (light or dark); needs matplotlib.

Each figure is about as wide as a phone, so that its text can be read there, and names its lines directly. The same data
gives the same bytes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Draw = Callable[[Any], None]  # draws on the axes that it gets

# Light colours (Okabe and Ito, which colour-blind readers can tell apart) -> CSS variables, which page.html defines.
INK, MUTED, GRID = "#24292f", "#6a737d", "#dfe3e8"
BLUE, RED, GREEN, PURPLE, SKY, AMBER = "#0072b2", "#c8500a", "#00875f", "#a5528a", "#3d9bd6", "#b07c00"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", BLUE: "blue", RED: "red", GREEN: "green"}
VARIABLES |= {PURPLE: "purple", SKY: "sky", AMBER: "amber"}

WIDTH, HEIGHT, SIZE = 350, 220, 10  # of a figure and its text, in points; a page shows one as about one pixel
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mpo",
    "svg.image_inline": True,
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": SIZE,
    "axes.titlesize": SIZE,
    "axes.titlelocation": "left",
    "axes.titlecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 1.8,
}


class Label(NamedTuple):
    """A name that is written beside a point, usually the last one of a line."""

    text: str
    x: float
    y: float
    colour: str


def available() -> bool:
    """Whether figures can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def svg(draw: Draw, height: float = HEIGHT, columns: int = 1) -> str:
    """What `draw` draws, as an SVG element without anything outside it. `columns`: as many times as wide."""
    return side_by_side([draw], WIDTH * columns, height)


def side_by_side(draws: Sequence[Draw], width: float, height: float) -> str:
    """What each of several functions draws, beside each other, as one SVG element."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()  # whatever a matplotlibrc on this machine says
        mpl.rcParams.update(STYLE)
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        FigureCanvasSVG(figure)
        for axes, draw in zip(figure.subplots(1, len(draws), squeeze=False)[0], draws, strict=True):
            draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style type.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # the page's own
    return re.sub(r"\n\s*", "\n", text).strip()


def with_variables(drawing: str, title: str) -> str:
    """A drawing for the page: colours by CSS variables, and only ids that are used, which no other title has."""
    for colour, name in VARIABLES.items():
        drawing = drawing.replace(colour, f"var(--{name})")
    used = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', drawing))
    prefix = "f" + hashlib.sha256((title + drawing).encode("utf-8", "replace")).hexdigest()[:8]
    drawing = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", drawing)
    drawing = drawing.replace("url(#", f"url(#{prefix}-").replace('xlink:href="#', f'href="#{prefix}-')
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', drawing, count=1)


def standalone(drawing: str, width: float, height: float) -> str:
    """A drawing as a file of its own: on white, since the page that will show it is not known."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{width:g}" '
    head += f'height="{height:g}" viewBox="0 0 {width:g} {height:g}" font-family="system-ui, sans-serif">\n'
    head += '<rect width="100%" height="100%" rx="6" fill="#ffffff"/>'
    return re.sub(r"<svg [^>]*>", lambda _: head, drawing, count=1) + "\n"


def write_labels(axes: Any, labels: Sequence[Label], ink: Sequence[tuple[float, float]] = ()) -> None:
    """Write each name beside its point, where it covers no other name and as little as possible of `ink`."""
    figure = axes.figure
    figure.draw_without_rendering()  # settles the layout, so that names can be placed
    scale = 72 / figure.dpi
    frame = axes.get_window_extent()
    points = axes.transData.transform([(x, y) for x, y in (*((b.x, b.y) for b in labels), *ink)]) * scale
    taken: list[tuple[float, float, float, float]] = []
    for label, (x, y) in zip(labels, points, strict=False):
        w, h = 0.58 * SIZE * len(label.text), 1.25 * SIZE
        best: tuple[float, float, float] = (np.inf, 0.0, 0.0)
        for turn, (dx, dy) in enumerate((*((6, y) for y in (0, 8, -8, 16, -16, 24)), (-w - 6, 0), (-w / 2, 13))):
            box = (x + dx - 1, y + dy - h / 2, x + dx + w, y + dy + h / 2)
            hit = sum(box[0] < b[2] and box[2] > b[0] and box[1] < b[3] and box[3] > b[1] for b in taken)
            covered = ((points > box[:2]) & (points < box[2:])).all(1).sum()
            outside = box[0] < frame.x0 * scale or box[2] > figure.bbox.x1 * scale or box[1] < frame.y0 * scale
            outside = outside or box[3] > frame.y1 * scale + 4
            best = min(best, (1e3 * hit + 1e3 * outside + 10 * covered + turn, dx, dy))
        _, right, up = best
        taken.append((x + right, y + up - h / 2, x + right + w, y + up + h / 2))
        look = {"color": label.colour, "ha": "left", "va": "center", "annotation_clip": False}
        note = axes.annotate(label.text, (label.x, label.y), (right, up), textcoords="offset points", **look)
        note.set_in_layout(False)
