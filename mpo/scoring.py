"""One way to score: the reward model's value at the last real token, used by every stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpo.data.batches import Batch, Pair, pair_batch
from mpo.model import ScalarModel
from mpo.progress import progress


def score(rm: ScalarModel, batch: Batch) -> Tensor:
    """(B,): the reward of each whole sequence, read at its last token (EOS where complete)."""
    values: Tensor = rm(batch.ids, batch.pieces)  # (N,)
    return values[batch.last]


def score_pairs(rm: ScalarModel, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Rewards of the chosen and of the rejected responses, each (B,)."""
    chosen, rejected = score(rm, pair_batch(pairs)).chunk(2)
    return chosen, rejected


@torch.no_grad()
def score_all(rm: ScalarModel, pairs: Sequence[Pair], batch: int) -> tuple[Tensor, Tensor]:
    """`score_pairs` over many pairs, in batches."""
    rm.eval()
    starts = progress(range(0, len(pairs), batch), "score", leave=False)
    parts = [score_pairs(rm, pairs[start : start + batch]) for start in starts]
    chosen, rejected = (torch.cat(side) for side in zip(*parts, strict=True))
    return chosen, rejected
