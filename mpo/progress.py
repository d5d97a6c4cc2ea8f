"""The one progress bar: redrawn once a second on a terminal, once in 30 in a log."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from mpo import parallel


def progress(items: Sequence[Any], name: str, done: int = 0, leave: bool = True) -> Any:
    """A tqdm bar over `items`, with `done` before them; `leave=False`: side work, no bar if short, none left behind."""
    seconds = 1.0 if sys.stderr.isatty() else 30.0
    hidden = (not leave and len(items) < 20) or not parallel.first()
    total = done + len(items)
    return tqdm(items, name, total, initial=done, mininterval=seconds, leave=leave, disable=hidden)


def note(line: str) -> None:
    """A line that belongs to no output: a warning, say."""
    if parallel.first():
        print(line, file=sys.stderr)
