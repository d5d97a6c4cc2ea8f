"""One way to score: the reward model's value at the last real token, used by every stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from mpo import parallel
from mpo.data.batches import Batch, Pair, pair_batch
from mpo.model import ScalarModel
from mpo.progress import progress

T = TypeVar("T")


def score(rm: ScalarModel, batch: Batch) -> Tensor:
    """(B,): the reward of each whole sequence, read at its last token (EOS where complete)."""
    values: Tensor = rm(batch.ids, batch.pieces)  # (N,)
    return values[batch.last]


def score_pairs(rm: ScalarModel, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Rewards of the chosen and of the rejected responses, each (B,)."""
    chosen, rejected = score(rm, pair_batch(pairs)).chunk(2)
    return chosen, rejected


@torch.no_grad()
def each_batch(rows: Sequence[T], batch: int, name: str, look: Callable[[Sequence[T]], Tensor]) -> Tensor:
    """look() at all rows, a batch at a time, which several processes share: (b rows) -> (b, ...) gives (rows, ...),
    on the CPU.
    """
    parts = []
    for start in progress(range(0, len(rows), batch), name, leave=False):
        part = rows[start : start + batch]
        parts.append(parallel.gather(look([part[i] for i in parallel.share(len(part))]), len(part)).cpu())
    return torch.cat(parts)


def score_all(rm: ScalarModel, pairs: Sequence[Pair], batch: int) -> tuple[Tensor, Tensor]:
    """`score_pairs` over many pairs, in batches."""
    rm.eval()
    both = each_batch(pairs, batch, "score", lambda part: torch.stack(score_pairs(rm, part), 1))
    return both[:, 0], both[:, 1]
