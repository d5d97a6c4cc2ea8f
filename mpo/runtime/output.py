"""The progress bar. On a terminal it is redrawn once a second, in a log once in 30 seconds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from mpo.runtime import distributed


def progress(items: Sequence[Any], name: str, done: int = 0, leave: bool = True) -> Any:
    """A tqdm bar over `items`, after `done` earlier ones.

    `leave=False` is for side work: the bar disappears at the end, and there is none for fewer than 20 items.
    """
    seconds = 1.0 if sys.stderr.isatty() else 30.0
    hidden = (not leave and len(items) < 20) or not distributed.is_main()
    total = done + len(items)
    return tqdm(items, name, total, initial=done, mininterval=seconds, leave=leave, disable=hidden)


def note(line: str) -> None:
    """Print a warning or remark to stderr, from the main process only."""
    if distributed.is_main():
        print(line, file=sys.stderr)
