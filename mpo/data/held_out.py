"""Which rows are held out for testing, and which are kept if a flag asks for fewer than there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from mpo.data.rows import Row
from mpo.runtime.errors import InputError
from mpo.runtime.seeding import generator


def hold_out(source: str, rows: Sequence[Row], share: float, seed: int) -> dict[str, list[Row]]:
    """Divide rows at random into {"train": ..., "test": ...}, both in the order of the rows.

    All rows of a prompt are on one side. Each domain gives about the same share of its rows, and the test split has
    at least one row. It has more than `share` of all rows only if even the prompt with the fewest rows has more.

    Raises InputError, with `source` in front, where all rows have the same prompt.
    """
    prompts: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        prompts.setdefault(row.prompt, []).append(i)
    if len(prompts) < 2:
        raise InputError(
            f"{source}: {len(rows)} row{'s'[: len(rows) > 1]} with a single prompt cannot be divided into training and "
            f"test rows; add rows with another prompt, or name a file of test rows (--test_data of prepare_data.py)"
        )
    in_turn = _in_turn(rows, list(prompts.values()), seed, "held out")
    most, test = max(1, round(share * len(rows))), set[int]()
    for group in in_turn:
        if len(test) + len(group) <= min(most, len(rows) - 1):
            test.update(group)
    if not test:
        test.update(sorted(in_turn, key=len)[0])
    return {
        "train": [row for i, row in enumerate(rows) if i not in test],
        "test": [row for i, row in enumerate(rows) if i in test],
    }


def sample(rows: Sequence[Row], most: int, seed: int, purpose: str) -> list[Row]:
    """At most `most` rows, chosen at random and kept in order; all of them if `most` is 0.

    The sample is stratified: each domain gives the same share of its rows, rounded up or down.
    """
    if not most or len(rows) <= most:
        return list(rows)
    in_turn = _in_turn(rows, [[i] for i in range(len(rows))], seed, purpose)
    return [rows[i] for (i,) in sorted(in_turn[:most])]


def _in_turn(rows: Sequence[Row], groups: Sequence[list[int]], seed: int, purpose: str) -> list[list[int]]:
    """Groups of rows in an order by chance in which the first ones have about the same share of each domain's rows.

    All rows of a group have the domain of its first row.
    """
    order = torch.randperm(len(groups), generator=generator(seed, purpose)).tolist()
    sizes, before, places = Counter(row.domain for row in rows), Counter[str](), dict[int, float]()
    for i in order:  # the place of a group in its domain, from 0 to 1
        domain = rows[groups[i][0]].domain
        places[i] = (before[domain] + len(groups[i]) / 2) / sizes[domain]
        before[domain] += len(groups[i])
    return [groups[i] for i in sorted(order, key=lambda i: places[i])]


def without_overlap(splits: dict[str, list[Row]], dropped: Counter[str]) -> dict[str, list[Row]]:
    """Drop the training rows whose prompt is in the test split, too."""
    held_out = {row.prompt for row in splits["test"]}
    train = [row for row in splits["train"] if row.prompt not in held_out]
    dropped["prompt is in the test split"] += len(splits["train"]) - len(train)
    return {"train": train, "test": splits["test"]}
