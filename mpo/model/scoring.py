"""How every stage scores: the reward model's value at the last token; and the critic's values of states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from mpo.data.batches import Batch, Pair, make_batch, pair_batch
from mpo.data.tokenizer import Tokenizer, check_rows, load_tokenizer
from mpo.model.hf_config import written_here
from mpo.model.llama import ScalarModel, ValueHead
from mpo.runtime import distributed
from mpo.runtime.output import progress

T = TypeVar("T")
Scorer = Callable[[ScalarModel, Batch], Tensor]
"""(reward model, B sequences) -> (B,): `score`, or a function that hands it other ids of the same texts."""


def rm_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer of a reward model, which writes texts in the form that the model was trained on.

    One that train_rm.py wrote has seen responses up to EOS. For any other, a dialogue is all that its chat template
    writes, as apply_chat_template of transformers gives it; without a template, a text and EOS. Raises InputError as
    `load_tokenizer` and `check_rows` do.
    """
    tokenizer = load_tokenizer(folder, to_end=not written_here(Path(folder) / "config.json"))
    check_rows(tokenizer, "--rm", folder)
    return tokenizer


def score(rm: ScalarModel, batch: Batch) -> Tensor:
    """(B,): the reward of each sequence, read at its last token, which is EOS if the response is complete."""
    values: Tensor = rm(batch.ids, batch.packing, wanted=batch.last)
    return values


def scorer_between(writes: Tokenizer, reads: Tokenizer, pairs: Sequence[Pair], judged: Sequence[Pair]) -> Scorer:
    """A function that scores what the policy has written in its ids, in those of the reward model.

    If both tokenizers turn texts into the same ids, it is `score`. Otherwise a response is decoded and encoded again.
    It is complete for the reward model if it ended in the policy's EOS; if not, it ends with its text, without EOS.
    What goes beyond the positions of the reward model is cut off.

    Args:
        writes, reads: the tokenizers of policy and reward model.
        pairs, judged: the same rows, encoded by each; every sequence to be scored begins with one of their prompts.
    """
    if writes.same_as(reads):
        return score
    prompts = {tuple(pair.prompt): same.prompt for pair, same in zip(pairs, judged, strict=True)}

    def rewritten(rm: ScalarModel, batch: Batch) -> Tensor:
        sequences = []
        for prompt, response in batch.sequences:
            ids = reads.response_ids(writes.decode(response), finished=response[-1] == writes.eos) or [reads.eos]
            room = rm.config.max_position_embeddings - len(prompts[tuple(prompt)])
            sequences.append((prompts[tuple(prompt)], ids[: max(1, room)]))
        return score(rm, make_batch(sequences))

    return rewritten


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
