"""Stage 6: preference optimisation on pairs; in MPO, on the easy ones, with the SFT model as reference."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mpo.config import DPOConfig
from mpo.data.batches import Pair, encode, left_out, training_batches
from mpo.data.rows import read_rows
from mpo.data.tokenizer import shared_tokenizer
from mpo.model.checkpoint import load_model, save_model
from mpo.model.lengths import check_lengths, sequences_of
from mpo.model.lora import adapters_of
from mpo.preference.logps import RefLogps, RunningMean, pair_logps, reference_logps, self_check
from mpo.preference.losses import pair_metrics
from mpo.preference.objective import parse_objective
from mpo.runtime import distributed
from mpo.runtime.entry import run
from mpo.runtime.errors import InputError
from mpo.runtime.flags import exact_div
from mpo.runtime.output import counts_text
from mpo.runtime.setup import setup_torch
from mpo.runtime.stage import Stage
from mpo.tools import memory
from mpo.training.loop import train


def check(config: DPOConfig) -> None:
    """Refuse flags that contradict each other."""
    objective = parse_objective(config.loss, config.beta)
    exact_div(config.batch, config.microbatch or 1, "--batch", "--microbatch")
    adapters_of(config, config.model)
    if objective.whole_batch and config.microbatch not in (0, config.batch):
        raise InputError(f"--loss {config.loss}: compares the pairs of a batch; set --microbatch to --batch")
    if objective.reference_free and config.ref:
        raise InputError(f"--loss {config.loss}: needs no reference; leave out --ref {config.ref}")


def main(config: DPOConfig) -> None:
    """Load, cache the reference's log-probs, train, save."""
    setup_torch(config)
    objective = parse_objective(config.loss, config.beta)
    if objective.whole_batch and distributed.world_size() > 1:
        raise InputError(f"--loss {config.loss}: compares the pairs of a batch; run it in one process")
    inputs = {"data": config.data, "model": config.model} | ({"ref": config.ref} if config.ref else {})
    stage = Stage(config, inputs, config.out, config.overwrite)
    models = [("--model", config.model)] + ([("--ref", config.ref)] if config.ref else [])
    tokenizer, model = shared_tokenizer(models), load_model(config.model, adapters_of(config, config.model))
    config = replace(config, microbatch=config.batch) if objective.whole_batch else config
    config = memory.with_microbatch(config, model.config)
    pairs, counts = encode(read_rows(config.data), tokenizer, config.max_prompt, config.max_response)
    if any(p.row.noise is not None for p in pairs) and not objective.uses_noise:
        raise InputError(f"{config.data}: its rows carry label noise, which --loss {config.loss} ignores; take cdpo")
    if sure := [p.row.id for p in pairs if p.row.noise == 0 and "exo_pair" in objective.names]:
        raise InputError(f"{config.data}: row {sure[0]} has a noise of 0, for which --loss exo_pair is infinite")
    check_lengths(models, sequences_of(pairs))
    counts |= left_out(pairs, config.batch)
    print(f"{stage.name}: rows: {counts_text(counts)}")
    batches = training_batches(pairs, config.batch, config.epochs, config.seed, config.steps, counts)
    cache: RefLogps = {}
    if not objective.reference_free:
        # Without --ref, the untrained model is the reference. A separate one is freed once its log-probs are cached.
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

    last = train(model, batches, losses_of, lambda pair: 1.0, config, stage, config.keep, log_ratios, tokenizer)
    print(f"{stage.name}: {len(batches)} steps, loss {last['loss']:.3f}, margin {last['reward_margin']:.3f}")
    save_model(stage.out, model, tokenizer)
    start = float(objective.losses(first).mean())
    stage.finish(steps=len(batches), first_loss=start, last=last, rows=counts)


if __name__ == "__main__":
    run(main, DPOConfig, check, memory.show)
