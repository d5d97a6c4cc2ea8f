"""Stage 5: preference optimisation on pairs; in MPO, on the easy ones with the SFT model as reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mpo import parallel
from mpo.checkpoint import load_model, save_model
from mpo.config import DPOConfig
from mpo.data.batches import Pair, encode, pair_batch
from mpo.data.rows import read_rows
from mpo.errors import InputError
from mpo.logprobs import sequence_logps
from mpo.lora import adapters_of
from mpo.losses import PairLogps, pair_metrics
from mpo.model import Llama
from mpo.objective import parse_objective
from mpo.program import run
from mpo.scoring import each_batch
from mpo.stage import Stage
from mpo.tokenizer import load_tokenizer
from mpo.training import batches_of, setup_torch, short_rest, train

RefLogps = dict[str, tuple[float, float]]
TIE = 1e-3  # nats by which the log-probs of one model, computed twice, may differ


def reference_logps(ref: Llama, pairs: list[Pair], batch: int) -> RefLogps:
    """Log-probs of both responses under the reference, once, by row id."""
    ref.eval()

    def both(part: Sequence[Pair]) -> Tensor:
        return torch.stack(sequence_logps(ref, pair_batch(part)).chunk(2), 1)  # (b, 2)

    found = each_batch(pairs, batch, "reference", both).tolist()
    return {pair.row.id: (chosen, rejected) for pair, (chosen, rejected) in zip(pairs, found, strict=True)}


def pair_logps(model: Llama, pairs: list[Pair], cache: RefLogps, mean_log_ratio: float = 0.0) -> PairLogps:
    """Everything a loss may ask for: chosen and rejected in one forward, the reference's cached."""
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


class RunningMean:
    """Mean over all whole batches so far, so that it depends on no microbatch or process (for bco_pair)."""

    def __init__(self, batch: int):
        self.batch, self.value, self.count, self.waiting = batch, 0.0, 0, list[float]()

    def add(self, values: Tensor) -> None:
        """Add a microbatch; it counts once its batch is complete."""
        self.waiting += values.tolist()
        if len(self.waiting) * parallel.count() == self.batch:
            self.count += self.batch
            total = parallel.sums({"values": sum(self.waiting)})["values"]
            self.value += (total - self.batch * self.value) / self.count
            self.waiting.clear()

    def state(self) -> dict[str, Any]:
        """Between batches, as JSON."""
        return {"value": self.value, "count": self.count}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.value, self.count = state["value"], state["count"]


def self_check(first: PairLogps) -> None:
    """Before the first step a model that is its own reference has log-ratios 0 (and DPO's loss is ln 2)."""
    worst = float(torch.maximum(first.s_w.abs(), first.s_l.abs()).max())
    if not worst <= TIE:
        raise InputError(f"self-check: log-ratios of the model to itself reach {worst:.2g} before training, not 0")


def main(config: DPOConfig) -> None:
    """Load, cache the reference, train, save."""
    setup_torch(config)
    objective = parse_objective(config.loss, config.beta)
    if objective.whole_batch and (config.microbatch != config.batch or parallel.count() > 1):
        raise InputError(
            f"--loss {config.loss}: compares the pairs of a batch; set --microbatch to --batch, in one process"
        )
    if objective.reference_free and config.ref:
        raise InputError(f"--loss {config.loss}: needs no reference; leave out --ref {config.ref}")
    inputs = {"data": config.data, "model": config.model} | ({"ref": config.ref} if config.ref else {})
    stage = Stage(config, inputs, config.out, config.overwrite)
    tokenizer, model = load_tokenizer(config.model), load_model(config.model, adapters_of(config, config.model))
    pairs, counts = encode(read_rows(config.data), tokenizer, config.max_prompt, config.max_response)
    if len({p.row.id for p in pairs}) < len(pairs):
        raise InputError(f"{config.data}: two rows share an id; ids must be unique")
    if any(p.row.noise is not None for p in pairs) and not objective.uses_noise:
        raise InputError(f"{config.data}: its rows carry label noise, which --loss {config.loss} ignores; take cdpo")
    counts |= short_rest(pairs, config.batch)
    print(f"{stage.name}: rows {counts}")
    cache: RefLogps = {}
    if not objective.reference_free:
        # A model that has not learnt yet is its own reference; another one is forgotten when it has been asked.
        cache = reference_logps(load_model(config.ref) if config.ref else model, pairs, config.batch)

    with torch.no_grad():
        first = pair_logps(model, pairs[: config.microbatch], cache)
    if not config.ref and cache:
        self_check(first)
    log_ratios = RunningMean(config.batch)

    def losses_of(part: list[Pair]) -> tuple[Tensor, dict[str, Tensor]]:
        logps = pair_logps(model, part, cache, log_ratios.value)
        log_ratios.add((logps.s_w + logps.s_l).detach() / 2)
        return objective.losses(logps), pair_metrics(logps, config.beta)

    batches = batches_of(pairs, config.batch, config.epochs, config.seed, config.steps)
    last = train(model, batches, losses_of, lambda pair: 1.0, config, stage, config.keep, log_ratios)
    print(f"{stage.name}: {len(batches)} steps, loss {last['loss']:.3f}, margin {last['reward_margin']:.3f}")
    save_model(stage.out, model)
    tokenizer.save(stage.out)
    start = float(objective.losses(first).mean())
    stage.finish(steps=len(batches), first_loss=start, last=last, rows=counts)


if __name__ == "__main__":
    run(main, DPOConfig)
