"""Stage 2: train a tokenizer on the training split, or copy that of a model."""

from __future__ import annotations

from pathlib import Path

from mpo.config import TokenizerConfig
from mpo.data.batches import encode
from mpo.data.rows import read_rows
from mpo.data.tokenizer import load_tokenizer, train_tokenizer
from mpo.model.llama import PRESETS
from mpo.runtime.entry import run
from mpo.runtime.errors import InputError
from mpo.runtime.output import counts_text
from mpo.runtime.stage import Stage
from mpo.tools import hub

NO_LIMIT = 1 << 30  # tokens


def check(config: TokenizerConfig) -> None:
    """Refuse a model that is not there."""
    if config.model not in ("", *PRESETS) and not Path(config.model).is_dir():
        raise InputError(f"--model {config.model}: no such folder{hub.advice('model', config.model)}")


def main(config: TokenizerConfig) -> None:
    """Train or copy; save; print how many tokens prompts and responses have."""
    copied = config.model not in ("", *PRESETS)
    inputs = {"data": config.data} | ({"model": config.model} if copied else {})
    stage = Stage(config, inputs, config.out, config.overwrite)
    rows = read_rows(Path(config.data) / "train.jsonl")
    if copied:
        tokenizer = load_tokenizer(config.model, config.template)
        if config.template == "none":
            tokenizer.record_none()
    else:
        texts = (text for row in rows for text in (row.prompt, row.chosen, row.rejected))
        tokenizer = train_tokenizer(texts, config.vocab, config.seed)
    tokenizer.save(stage.out)
    pairs, counts = encode(rows[:1000], tokenizer, NO_LIMIT, NO_LIMIT)
    prompt = sum(len(p.prompt) for p in pairs) / len(pairs)
    response = sum(len(p.chosen) for p in pairs) / len(pairs)
    origin = f"from {config.model}" if copied else "trained"
    if tokenizer.turns:
        origin += ", with its chat template"
        ends = tokenizer.vocabulary.piece(tokenizer.eos)
        print(f"tokenizer: the chat template ends a turn with {ends}; first rows: {counts_text(counts)}")
    print(f"tokenizer: {tokenizer.size} pieces, {origin}; mean length: prompts {prompt:.0f}, responses {response:.0f}")
    stage.finish(pieces=tokenizer.size, mean_prompt_tokens=prompt, mean_response_tokens=response)


if __name__ == "__main__":
    run(main, TokenizerConfig, check)
