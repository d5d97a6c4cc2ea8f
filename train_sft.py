"""Stage 2: supervised fine-tuning on the chosen responses, from scratch or from a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mpo import device, parallel
from mpo.checkpoint import load_model, save_model
from mpo.config import SFTConfig
from mpo.data.batches import Pair, encode, make_batch
from mpo.data.rows import read_rows
from mpo.errors import InputError
from mpo.logprobs import response_logprobs, sequence_logps
from mpo.lora import adapters_of
from mpo.model import PRESETS, Llama, hold_in, initialise
from mpo.program import run
from mpo.randomness import generator
from mpo.scoring import each_batch
from mpo.stage import Stage
from mpo.tokenizer import Tokenizer, load_tokenizer
from mpo.training import batches_of, setup_torch, short_rest, train


def starting_model(config: SFTConfig, tokenizer: Tokenizer) -> Llama:
    """A preset with random weights, or the model of a folder."""
    if config.model in PRESETS:
        if config.lora_rank:
            raise InputError("--lora_rank: adapters need a trained base; name a folder with --model")
        ids: dict[str, Any] = {
            "bos_token_id": tokenizer.bos,
            "eos_token_id": tokenizer.eos,
            "pad_token_id": tokenizer.pad,
        }
        with device.here():
            model = Llama(replace(PRESETS[config.model], vocab_size=tokenizer.size, **ids))
        initialise(model, generator(config.seed, "init"))
        hold_in(model, device.dtype())
        return parallel.shard(model)
    model = load_model(config.model, adapters_of(config, config.model))
    if model.config.vocab_size < tokenizer.size:
        raise InputError(
            f"--tokenizer {config.tokenizer}: has {tokenizer.size} pieces, the model of "
            f"{config.model} only {model.config.vocab_size}; use the model's own tokenizer"
        )
    return model


def sequence(pair: Pair, loss_on: str) -> tuple[list[int], list[int]]:
    """What is given and what is learnt: with "all", everything behind BOS is learnt."""
    if loss_on == "response":
        return pair.prompt, pair.chosen
    return pair.prompt[:1], pair.prompt[1:] + pair.chosen


def held_out_loss(model: Llama, pairs: list[Pair], batch: int) -> float:
    """Mean negative log-prob of the chosen responses' tokens."""
    model.eval()

    def logps(part: Sequence[Pair]) -> Tensor:
        return sequence_logps(model, make_batch([(p.prompt, p.chosen) for p in part]))

    total = each_batch(pairs, batch, "held out", logps).double().sum()
    return -float(total) / sum(len(p.chosen) for p in pairs)


def main(config: SFTConfig) -> None:
    """Load, train, measure, save."""
    setup_torch(config)
    if config.model not in PRESETS and not Path(config.model).is_dir():
        raise InputError(f"--model {config.model}: neither a folder nor a preset ({', '.join(PRESETS)})")
    inputs = {"data": config.data, "tokenizer": config.tokenizer}
    inputs |= {} if config.model in PRESETS else {"model": config.model}
    stage = Stage(config, inputs, config.out, config.overwrite)
    tokenizer = load_tokenizer(config.tokenizer)
    model = starting_model(config, tokenizer)
    splits, counts = {}, {}
    for split in ("train", "test"):
        rows = read_rows(Path(config.data) / f"{split}.jsonl")
        splits[split], counts[split] = encode(rows, tokenizer, config.max_prompt, config.max_response)
        counts[split] |= short_rest(splits[split], config.batch) if split == "train" else {}
        print(f"sft: {split} rows {counts[split]}")

    def losses_of(pairs: list[Pair]) -> tuple[Tensor, dict[str, Tensor]]:
        batch = make_batch([sequence(p, config.loss_on) for p in pairs])
        return -response_logprobs(model, batch).logp.sum(1), {}

    def tokens(pair: Pair) -> float:
        return len(sequence(pair, config.loss_on)[1])

    batches = batches_of(splits["train"], config.batch, config.epochs, config.seed)
    last = train(model, batches, losses_of, tokens, config, stage)
    loss = held_out_loss(model, splits["test"], config.batch)
    print(f"sft: held-out loss {loss:.3f} nats per response token")
    save_model(stage.out, model)
    tokenizer.save(stage.out)
    size = sum(p.numel() for p in model.parameters())
    stage.finish(steps=len(batches), parameters=size, train_loss=last["loss"], held_out_loss=loss, rows=counts)


if __name__ == "__main__":
    run(main, SFTConfig)
