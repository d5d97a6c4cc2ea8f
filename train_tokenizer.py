"""Stage 2: train a tokenizer on the training split, or copy that of a model."""

from __future__ import annotations

from pathlib import Path

from mpo.config import TokenizerConfig
from mpo.data.rows import read_rows
from mpo.data.tokenizer import load_tokenizer, train_tokenizer
from mpo.model.llama import PRESETS
from mpo.runtime.entry import run
from mpo.runtime.stage import Stage


def main(config: TokenizerConfig) -> None:
    """Train or copy; save; print how many tokens prompts and responses have."""
    copied = config.model not in ("", *PRESETS)
    inputs = {"data": config.data} | ({"model": config.model} if copied else {})
    stage = Stage(config, inputs, config.out, config.overwrite)
    rows = read_rows(Path(config.data) / "train.jsonl")
    if copied:
        tokenizer = load_tokenizer(config.model)
    else:
        texts = (text for row in rows for text in (row.prompt, row.chosen, row.rejected))
        tokenizer = train_tokenizer(texts, config.vocab, config.seed)
    tokenizer.save(stage.out)
    sample = rows[:1000]
    prompt = sum(len(tokenizer.prompt_ids(r.prompt)) for r in sample) / len(sample)
    response = sum(len(tokenizer.response_ids(r.chosen)) for r in sample) / len(sample)
    origin = f"from {config.model}" if copied else "trained"
    print(f"tokenizer: {tokenizer.size} pieces, {origin}; mean length: prompts {prompt:.0f}, responses {response:.0f}")
    stage.finish(pieces=tokenizer.size, mean_prompt_tokens=prompt, mean_response_tokens=response)


if __name__ == "__main__":
    run(main, TokenizerConfig)
