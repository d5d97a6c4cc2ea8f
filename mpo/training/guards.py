"""Checks that stop a stage before it ruins its weights, and warnings of a collapse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpo.runtime import distributed
from mpo.runtime.errors import RunError
from mpo.runtime.files import write_json
from mpo.runtime.stage import Stage


class NotFinite(Exception):
    """A number that is NaN or infinite, with the rows of the batch that it came from."""

    def __init__(self, what: str, rows: Sequence[int]):
        super().__init__(what)
        self.what, self.rows = what, list(rows)


def not_finite(values: Tensor, rows: Sequence[int]) -> list[int]:
    """Those of `rows` with a value that is not finite; values (b, ...), one entry a row."""
    good = torch.isfinite(values.detach()).reshape(len(values), -1).all(1)
    return [rows[i] for i in (~good).nonzero().flatten().tolist()]


def agree_finite(what: str, bad: Sequence[int]) -> None:
    """Raise NotFinite in every process if any of them has bad rows, so that no process waits for another."""
    if distributed.all_max([len(bad)])[0]:
        raise NotFinite(what, sorted({row for rows in distributed.all_gather_object(list(bad)) for row in rows}))


def failure(
    stage: Stage, step: int, error: NotFinite, rows: Sequence[Mapping[str, Any]], save: Path | None
) -> RunError:
    """Write failure.json (the step, what was wrong, the rows as they were computed); returns the error to raise.

    Args:
        rows: {"id", token ids, ...} of the batch.
        save: the weights before the step, from which the same command repeats it; None where there are none.
    """
    blamed = [rows[i]["id"] for i in error.rows]
    about = {"step": step, "what": error.what, "rows_to_blame": blamed, "save": str(save or ""), "batch": list(rows)}
    write_json(stage.out / "failure.json", about)
    shown = ", ".join(map(str, blamed[:3])) + (f" and {len(blamed) - 3} more" if len(blamed) > 3 else "")
    rows_of = f"rows {shown}" if blamed else "of the whole batch"
    if save:
        kept = f"no step was taken. {save} has the weights before it, so that the same command shows it again"
    else:
        kept = "it was not saved, and the same command goes on from the last save"
    return RunError(
        f"{stage.name}: step {step}: {error.what} is not finite ({rows_of}); {kept}; {stage.out / 'failure.json'} has "
        "the batch. Lower --lr, or look at these rows"
    )
