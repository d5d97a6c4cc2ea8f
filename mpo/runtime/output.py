"""What is printed: progress bars, remarks, tables, and numbers with their intervals."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from tqdm import tqdm

from mpo.runtime import distributed


def accept_every_character() -> None:
    """Let the terminal's encoding stop no program: what it cannot show or read becomes a replacement character."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def flush() -> None:
    """Write out what was printed. Raises OSError where that fails: a full disk, or nobody who reads it."""
    if sys.stdout:  # None if it was closed before the program started
        sys.stdout.flush()


def drop_unread() -> None:
    """Drop what was printed but cannot be written, or the interpreter would complain about it at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:
                stream.flush()
        except OSError:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def progress(items: Sequence[Any], name: str, done: int = 0, leave: bool = True) -> Any:
    """A tqdm bar over `items`, after `done` earlier ones; redrawn every second, or in a log every 30 seconds.

    `leave=False` is for side work: the bar appears after five seconds, and disappears at the end.
    """
    seconds, hidden = 1.0 if sys.stderr.isatty() else 30.0, not distributed.is_main()
    delay, total = 0 if leave else 5, done + len(items)
    return tqdm(items, name, total, initial=done, mininterval=seconds, leave=leave, disable=hidden, delay=delay)


def note(line: str) -> None:
    """Print a warning or remark to stderr, from the main process only."""
    if distributed.is_main():
        print(line, file=sys.stderr)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well as plain text and is valid Markdown."""
    grid = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in grid) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, grid[1:])])


def fitting_table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int = 100) -> str:
    """The same in several blocks of columns where it would be wider than `width`; each begins with the first column.

    Names in the first column that are longer than a third of the width lose their middle.
    """
    most = width // 3
    rows = [[_without_middle(row[0], most), *row[1:]] for row in rows]
    widths = [max(len(row[i]) for row in [header, *rows]) + 3 for i in range(len(header))]
    blocks: list[list[int]] = [[]]
    for i in range(1, len(header)):
        if blocks[-1] and 1 + widths[0] + sum(widths[j] for j in blocks[-1]) + widths[i] > width:
            blocks.append([])
        blocks[-1].append(i)
    return "\n\n".join(
        table([header[j] for j in (0, *block)], [[row[j] for j in (0, *block)] for row in rows]) for block in blocks
    )


def _without_middle(text: str, most: int) -> str:
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[: most - 3 - half]}...{text[-half:]}"


def counts_text(counts: Mapping[str, int]) -> str:
    """Counts of rows by what became of them, as text: "133 kept; 5 left out of each epoch: no full batch"."""
    kept_first = sorted(counts, key=lambda name: name != "kept")
    return "; ".join(f"{counts[name]} {name}" for name in kept_first if counts[name])


def interval(value: Sequence[float], digits: int = 2, scale: float = 1.0) -> str:
    """(value, low, high) as text: "0.61 [0.56, 0.66]"."""
    mean, low, high = (f"{scale * v:.{digits}f}" for v in value)
    return f"{mean} [{low}, {high}]"


def percent(value: Sequence[float]) -> str:
    """(value, low, high) in per cent: "61 [56, 66]"."""
    return interval(value, 0, 100)
