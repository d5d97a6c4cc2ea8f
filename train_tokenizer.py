"""Stage 1: a tokenizer, trained on the training split or taken from a model."""

from __future__ import annotations

from pathlib import Path

from mpo.config import TokenizerConfig
from mpo.data.rows import read_rows
from mpo.data.tokenizer import load_tokenizer, train_tokenizer
from mpo.model.llama import PRESETS
from mpo.runtime.entry import run
from mpo.runtime.stage import Stage


def main(config: TokenizerConfig) -> None:
    """Train or copy, and say how many tokens a row costs."""
    taken = config.model not in ("", *PRESETS)
    inputs = {"data": config.data} | ({"model": config.model} if taken else {})
    stage = Stage(config, inputs, config.out, config.overwrite)
    rows = read_rows(Path(config.data) / "train.jsonl")
    if taken:
        tokenizer = load_tokenizer(config.model)
    else:
        texts = (text for row in rows for text in (row.prompt, row.chosen, row.rejected))
        tokenizer = train_tokenizer(texts, config.vocab, config.seed)
    tokenizer.save(stage.out)
    sample = rows[:1000]
    prompt = sum(len(tokenizer.prompt_ids(r.prompt)) for r in sample) / len(sample)
    response = sum(len(tokenizer.response_ids(r.chosen)) for r in sample) / len(sample)
    origin = f"from {config.model}" if taken else "trained"
    print(f"tokenizer: {tokenizer.size} pieces, {origin}; a prompt is {prompt:.0f} tokens, a response {response:.0f}")
    stage.finish(pieces=tokenizer.size, mean_prompt_tokens=prompt, mean_response_tokens=response)


if __name__ == "__main__":
    run(main, TokenizerConfig)
