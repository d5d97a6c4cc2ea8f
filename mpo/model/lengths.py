"""The longest sequence that each model of a stage can take, compared with the longest that it will see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mpo.data.batches import Pair
from mpo.model.hf_config import config_from_json
from mpo.runtime.errors import InputError


def check_lengths(
    folders: Sequence[tuple[str, str]], sequences: Iterable[tuple[int, int]], response: str = "--max_response"
) -> None:
    """Raise InputError, with the numbers, if a sequence is longer than a model was made for.

    Nothing else would report it: beyond the positions that it was trained on, a model only becomes worse.

    Args:
        folders: (flag, folder) of every model that sees the sequences.
        sequences: tokens of each prompt, and of its response.
        response: the flag that limits the tokens of a response.
    """
    prompt, rest = max(sequences, key=sum, default=(0, 0))
    for flag, folder in folders:
        most = config_from_json(Path(folder) / "config.json").max_position_embeddings
        if prompt + rest > most:
            raise InputError(
                f"{flag} {folder}: takes at most {most} tokens (max_position_embeddings in config.json), but the "
                f"longest sequence has {prompt + rest}, {prompt} of the prompt and {rest} of the response; lower "
                f"--max_prompt or {response} until they add up to {most}"
            )


def sequences_of(pairs: Iterable[Pair]) -> Iterator[tuple[int, int]]:
    """Tokens of prompt and response, for both responses of each pair."""
    for pair in pairs:
        yield len(pair.prompt), len(pair.chosen)
        yield len(pair.prompt), len(pair.rejected)
