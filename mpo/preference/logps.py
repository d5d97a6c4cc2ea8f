"""From pairs and a model to what a preference loss needs: the log-probs of both responses, policy and reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mpo.data.batches import Pair, pair_batch
from mpo.model.llama import Llama
from mpo.model.logprobs import sequence_logps
from mpo.model.scoring import each_batch
from mpo.preference.losses import PairLogps
from mpo.runtime import distributed
from mpo.runtime.errors import InputError

RefLogps = dict[str, tuple[float, float]]
"""Row id -> log-probs of the chosen and the rejected response under the reference."""
TIE = 1e-3  # nats by which the log-probs of one model, computed twice, may differ


def reference_logps(ref: Llama, pairs: list[Pair], batch: int) -> RefLogps:
    """Log-probs of both responses under the reference, computed once for the whole stage."""
    ref.eval()

    def both(part: Sequence[Pair]) -> Tensor:
        return torch.stack(sequence_logps(ref, pair_batch(part)).chunk(2), 1)  # (b, 2)

    logps = each_batch(pairs, batch, "reference", both).tolist()
    return {pair.row.id: (chosen, rejected) for pair, (chosen, rejected) in zip(pairs, logps, strict=True)}


def pair_logps(model: Llama, pairs: list[Pair], cache: RefLogps, mean_log_ratio: float = 0.0) -> PairLogps:
    """Everything a loss may need. Chosen and rejected run in one forward pass; the reference's log-probs are cached."""
    chosen, rejected = sequence_logps(model, pair_batch(pairs)).chunk(2)
    ref_chosen, ref_rejected = zip(*(cache.get(p.row.id, (0.0, 0.0)) for p in pairs), strict=True)

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values)).to(chosen.device)

    return PairLogps(
        chosen=chosen,
        rejected=rejected,
        ref_chosen=column(ref_chosen),
        ref_rejected=column(ref_rejected),
        chosen_len=column(len(p.chosen) for p in pairs),
        rejected_len=column(len(p.rejected) for p in pairs),
        noise=column(math.nan if p.row.noise is None else p.row.noise for p in pairs),
        mean_log_ratio=mean_log_ratio,
    )


def self_check(first: PairLogps) -> None:
    """Before the first step, a model that is its own reference has log-ratios 0 (and DPO's loss is ln 2)."""
    worst = float(torch.maximum(first.s_w.abs(), first.s_l.abs()).max())
    if not worst <= TIE:
        raise InputError(f"self-check: log-ratios of the model to itself reach {worst:.2g} before training, not 0")


class RunningMean:
    """Mean over all complete batches so far, so that it depends on no microbatch or process (for bco_pair)."""

    def __init__(self, batch: int):
        self.batch, self.value, self.count, self.waiting = batch, 0.0, 0, list[float]()

    def add(self, values: Tensor) -> None:
        """Add a microbatch. It counts once its batch is complete."""
        self.waiting += values.tolist()
        if len(self.waiting) * distributed.world_size() == self.batch:
            self.count += self.batch
            total = distributed.all_sum({"values": sum(self.waiting)})["values"]
            self.value += (total - self.batch * self.value) / self.count
            self.waiting.clear()

    def state_dict(self) -> dict[str, Any]:
        """The state between batches, as JSON."""
        return {"value": self.value, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.value, self.count = state["value"], state["count"]
