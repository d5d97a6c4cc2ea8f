"""How every stage scores: the reward model's value at the last token; and the critic's values of states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from mpo.data.batches import Batch, Pair, make_batch, pair_batch
from mpo.model.llama import ScalarModel, ValueHead
from mpo.runtime import distributed
from mpo.runtime.output import progress

T = TypeVar("T")


def score(rm: ScalarModel, batch: Batch) -> Tensor:
    """(B,): the reward of each sequence, read at its last token, which is EOS if the response is complete."""
    values: Tensor = rm(batch.ids, batch.packing, wanted=batch.last)
    return values


def score_pairs(rm: ScalarModel, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Rewards of the chosen and of the rejected responses, each (B,)."""
    chosen, rejected = score(rm, pair_batch(pairs)).chunk(2)
    return chosen, rejected


def state_values(critic: ScalarModel | ValueHead, batch: Batch, hidden: Tensor) -> Tensor:
    """(B, R): the critic's value of the state in which each response token was chosen.

    A value head reads the policy's hidden states of these states (M, D); a critic of its own computes its own.
    """
    if isinstance(critic, ValueHead):
        return batch.unpack(critic(hidden))
    return batch.unpack(critic(batch.ids, batch.packing, wanted=batch.predictors))


@torch.no_grad()
def each_batch(rows: Sequence[T], batch: int, name: str, look: Callable[[Sequence[T]], Tensor]) -> Tensor:
    """Apply look(b rows) -> (b, ...) to all rows, a batch at a time, divided among processes; on the CPU."""
    parts = []
    for start in progress(range(0, len(rows), batch), name, leave=False):
        part = rows[start : start + batch]
        local = look([part[i] for i in distributed.local_rows(len(part))])
        parts.append(distributed.all_gather(local, len(part)).cpu())
    return torch.cat(parts)


def score_chosen(rm: ScalarModel, pairs: Sequence[Pair], batch: int) -> Tensor:
    """Rewards of the chosen responses alone, (N,)."""
    rm.eval()
    return each_batch(pairs, batch, "score", lambda part: score(rm, make_batch([(p.prompt, p.chosen) for p in part])))


def score_all(rm: ScalarModel, pairs: Sequence[Pair], batch: int) -> tuple[Tensor, Tensor]:
    """`score_pairs` over many pairs, in batches."""
    rm.eval()
    both = each_batch(pairs, batch, "score", lambda part: torch.stack(score_pairs(rm, part), 1))
    return both[:, 0], both[:, 1]
