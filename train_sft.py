"""Stage 3: supervised fine-tuning on the chosen responses, from scratch or from a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mpo.config import SFTConfig
from mpo.data.batches import Pair, encode, left_out, make_batch, training_batches
from mpo.data.rows import read_rows
from mpo.data.tokenizer import Tokenizer, shared_tokenizer
from mpo.model.checkpoint import load_model, save_model
from mpo.model.lengths import check_lengths
from mpo.model.llama import PRESETS, Llama, cast_weights, initialise
from mpo.model.logprobs import response_logprobs, sequence_logps
from mpo.model.lora import adapters_of
from mpo.model.scoring import each_batch
from mpo.runtime import device, distributed
from mpo.runtime.entry import run
from mpo.runtime.errors import InputError
from mpo.runtime.flags import exact_div
from mpo.runtime.output import counts_text
from mpo.runtime.seeding import generator
from mpo.runtime.setup import setup_torch
from mpo.runtime.stage import Stage
from mpo.tools import hub, memory
from mpo.training.loop import train


def starting_model(config: SFTConfig, tokenizer: Tokenizer) -> Llama:
    """The model that --model names: a preset with random weights, or the one in a folder.

    A preset takes rows as long as the flags allow. Raises InputError for a folder that cannot be read.
    """
    if config.model in PRESETS:
        ids: dict[str, Any] = {
            "bos_token_id": tokenizer.bos,
            "eos_token_id": tokenizer.eos,
            "pad_token_id": tokenizer.pad,
        }
        shape = PRESETS[config.model]
        longest = max(shape.max_position_embeddings, config.max_prompt + config.max_response)
        with device.current():
            model = Llama(replace(shape, vocab_size=tokenizer.size, max_position_embeddings=longest, **ids))
        initialise(model, generator(config.seed, "init"))
        cast_weights(model, device.weight_dtype())
        return distributed.shard(model)
    return load_model(config.model, adapters_of(config, config.model))


def held_out_loss(model: Llama, pairs: list[Pair], batch: int) -> float:
    """Mean loss in nats over all tokens of the chosen responses."""
    model.eval()

    def logps(part: Sequence[Pair]) -> Tensor:
        return sequence_logps(model, make_batch([(p.prompt, p.chosen) for p in part]))

    total = each_batch(pairs, batch, "held out", logps).double().sum()
    return -float(total) / sum(len(p.chosen) for p in pairs)


def check(config: SFTConfig) -> None:
    """Refuse flags that contradict each other."""
    exact_div(config.batch, config.microbatch or 1, "--batch", "--microbatch")
    adapters_of(config, config.model)
    if config.model in PRESETS and config.lora_rank:
        raise InputError("--lora_rank: adapters need a trained base; name a folder with --model")
    if config.model not in PRESETS and not Path(config.model).is_dir():
        known = f"neither a folder nor a preset ({', '.join(PRESETS)})"
        raise InputError(f"--model {config.model}: {known}{hub.advice('model', config.model)}")


def main(config: SFTConfig) -> None:
    """Load, train, measure, save."""
    setup_torch(config)
    inputs = {"data": config.data, "tokenizer": config.tokenizer}
    models = [] if config.model in PRESETS else [("--model", config.model)]
    inputs |= {"model": config.model} if models else {}
    stage = Stage(config, inputs, config.out, config.overwrite)
    tokenizer = shared_tokenizer([("--tokenizer", config.tokenizer), *models])
    model = starting_model(config, tokenizer)
    config = memory.with_microbatch(config, model.config)
    splits, counts = {}, {}
    for split in ("train", "test"):
        rows = read_rows(Path(config.data) / f"{split}.jsonl")
        splits[split], counts[split] = encode(rows, tokenizer, config.max_prompt, config.max_response)
        counts[split] |= left_out(splits[split], config.batch) if split == "train" else {}
        check_lengths(models, ((len(p.prompt), len(p.chosen)) for p in splits[split]))
        print(f"sft: {split} rows: {counts_text(counts[split])}")

    def losses_of(pairs: list[Pair]) -> tuple[Tensor, dict[str, Tensor]]:
        batch = make_batch([(p.prompt, p.chosen) for p in pairs])
        return -response_logprobs(model, batch).logp.sum(1), {}

    batches = training_batches(splits["train"], config.batch, config.epochs, config.seed, counts=counts["train"])
    last = train(model, batches, losses_of, lambda pair: len(pair.chosen), config, stage)
    loss = held_out_loss(model, splits["test"], config.batch)
    print(f"sft: held-out loss {loss:.3f} nats per response token")
    save_model(stage.out, model, tokenizer)
    size = sum(p.numel() for p in model.parameters())
    stage.finish(steps=len(batches), parameters=size, train_loss=last["loss"], held_out_loss=loss, rows=counts)


if __name__ == "__main__":
    run(main, SFTConfig, check, memory.show)
