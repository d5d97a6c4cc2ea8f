"""Numbers as text: tables, intervals, percentages."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well as plain text and is Markdown too."""
    grid = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in grid) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, grid[1:])])


def interval(value: Sequence[float], digits: int = 2, scale: float = 1.0) -> str:
    """ "0.61 [0.56, 0.66]" """
    mean, low, high = (f"{scale * v:.{digits}f}" for v in value)
    return f"{mean} [{low}, {high}]"


def percent(value: Sequence[float]) -> str:
    """An interval in per cent."""
    return interval(value, 0, 100)
