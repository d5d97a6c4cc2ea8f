"""From rows to token ids within the length limits, and from these to packed batches. Masks come from lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpo.data.dialogue import ASSISTANT, HUMAN, form_of
from mpo.data.rows import Row, Unusable
from mpo.data.tokenizer import Tokenizer
from mpo.kernels.packing import Packing
from mpo.runtime import device
from mpo.runtime.errors import InputError
from mpo.runtime.output import counts_text
from mpo.runtime.seeding import generator


@dataclass(frozen=True)
class Pair:
    """A row as token ids: the prompt starts with BOS, and both responses end in EOS."""

    row: Row
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class Batch:
    """B sequences, each a prompt and a response, packed into N tokens, M of them response tokens; no padding."""

    sequences: Sequence[tuple[list[int], list[int]]]
    ids: Tensor  # (N,) int64
    packing: Packing  # which tokens belong together: each prompt is followed by its responses
    response_mask: Tensor  # (B, R): True on the tokens of each response; column 0 is its first token
    response_tokens: Tensor  # (M,): positions of these tokens in `ids`, response by response
    predictors: Tensor  # (M,): position of the token before each of them, whose hidden state predicts it
    last: Tensor  # (B,): position of each sequence's last token

    def rows(self, index: Sequence[int]) -> Batch:
        """A batch of the sequences with these indices."""
        return make_batch([self.sequences[i] for i in index])

    def unpack(self, values: Tensor) -> Tensor:
        """Values of the response tokens (M,) as (B, R), 0 where the mask is False. Gradients pass through."""
        zeros = torch.zeros(self.response_mask.shape, dtype=values.dtype, device=values.device)
        return zeros.masked_scatter(self.response_mask, values)


def make_batch(sequences: Sequence[tuple[list[int], list[int]]], share: bool = True) -> Batch:
    """Pack sequences, each (prompt ids, response ids), into a batch on the current device.

    With `share`, a prompt that several sequences have is stored and computed only once.
    """
    families: dict[tuple[int, ...], list[int]] = {}  # prompt -> the sequences that start with it
    for i, (prompt, _) in enumerate(sequences):
        families.setdefault(tuple(prompt) if share else (i,), []).append(i)
    texts, parents, roots, children = list[list[int]](), list[int](), [0] * len(sequences), [0] * len(sequences)
    for family in families.values():
        root = len(texts)
        texts.append(sequences[family[0]][0])
        parents.append(-1)
        for i in family:
            roots[i], children[i] = root, len(texts)
            texts.append(sequences[i][1])
            parents.append(root)
    here = device.current()
    packing = Packing([len(text) for text in texts], parents, here)
    lengths, starts = packing.lengths[children], packing.starts[children]  # (B,) each, of the responses
    steps = torch.arange(int(lengths.max()))  # (R,)
    mask = steps < lengths[:, None]  # (B, R)
    tokens = starts[:, None] + steps  # (B, R)
    before = torch.where(steps > 0, tokens - 1, packing.last[roots][:, None])
    ids = torch.tensor([token for text in texts for token in text])
    parts = ids, mask, tokens[mask], before[mask], packing.last[children]
    ids, mask, tokens, before, last = (part.to(here) for part in parts)
    return Batch(sequences, ids, packing, mask, tokens, before, last)


def pair_batch(pairs: Sequence[Pair]) -> Batch:
    """A batch of 2B sequences with B prompts: first all chosen, then all rejected. One forward pass scores both."""
    chosen = [(p.prompt, p.chosen) for p in pairs]
    return make_batch(chosen + [(p.prompt, p.rejected) for p in pairs])


def fit_prompt(prompt: str, tokenizer: Tokenizer, most: int) -> tuple[list[int], int]:
    """Remove the oldest turns of a prompt until it has at most `most` tokens. A system message in front is kept.

    Returns the ids and the number of turns removed, or ([], 0) if the last turn alone is too long: the row must then
    be dropped.
    """
    ids, cut = tokenizer.prompt_ids(prompt), 0
    system = "" if prompt.startswith(ASSISTANT) else prompt[: max(0, prompt.find(HUMAN))]
    while len(ids) > most:
        later = prompt.find(HUMAN, len(system) + 1)
        if later < 0 or form_of(prompt) != "dialogue":
            return [], 0
        prompt, cut = system + prompt[later:], cut + 1
        ids = tokenizer.prompt_ids(prompt)
    return ids, cut


def encode(
    rows: Sequence[Row], tokenizer: Tokenizer, max_prompt: int, max_response: int, prompts_alone: bool = False
) -> tuple[list[Pair], dict[str, int]]:
    """Tokenise rows. A prompt that is too long loses its oldest turns; a row that still does not fit is dropped.

    A response is never cut. It would lose its EOS, and the model would learn not to stop. With `prompts_alone`, a row
    may have no responses.

    Returns the pairs, and how many rows were kept, cut and dropped, by reason. Raises InputError where no row is left,
    and for a row whose prompt and response a chat template joins in another way than they are joined here.
    """
    pairs, counts = [], Counter[str]()
    for row in rows:
        try:
            prompt, cut = fit_prompt(row.prompt, tokenizer, max_prompt)
            alone = prompts_alone and not (row.chosen or row.rejected)
            chosen, rejected = tokenizer.response_ids(row.chosen), tokenizer.response_ids(row.rejected)
            if not alone:
                _check_whole(row, tokenizer)
        except Unusable as e:
            counts[f"dropped: {e}"] += 1
            continue
        if not prompt:
            counts[f"dropped: prompt longer than {max_prompt} tokens"] += 1
        elif max(len(chosen), len(rejected)) > max_response:
            counts[f"dropped: a response longer than {max_response} tokens"] += 1
        elif (
            len(chosen) < 2
            or len(rejected) < 2
            or (tokenizer.turns and not (row.chosen.strip() and row.rejected.strip()))
        ) and not alone:
            counts["dropped: empty response"] += 1
        else:
            counts["cut: oldest turns of a long dialogue"] += cut > 0
            pairs.append(Pair(row, prompt, chosen, rejected))
    counts["kept"] = len(pairs)
    if not pairs:
        raise InputError(f"none of {len(rows)} rows fits ({counts_text(counts)}); raise --max_prompt or --max_response")
    return pairs, {k: v for k, v in counts.items() if v}


def encode_for_each(
    rows: Sequence[Row],
    tokenizers: Sequence[Tokenizer],
    max_prompt: int,
    max_response: int,
    prompts_alone: bool = False,
) -> tuple[list[list[Pair]], dict[str, int]]:
    """`encode` by each of several tokenizers: the same rows in the same order, namely those that fit for all of them.

    Returns the pairs of each tokenizer, and how many rows were kept, cut (by the last tokenizer) and dropped (by any).
    """
    encoded, counts = list[list[Pair]](), Counter[str]()
    for i, tokenizer in enumerate(tokenizers):
        if alike := [j for j in range(i) if tokenizers[j].same_as(tokenizer)]:
            encoded.append(encoded[alike[0]])
            continue
        pairs, of_pairs = encode(rows, tokenizer, max_prompt, max_response, prompts_alone)
        rows = [pair.row for pair in pairs]
        encoded.append(pairs)
        dropped = {name: n + counts[name] for name, n in of_pairs.items() if name.startswith("dropped")}
        counts |= Counter(of_pairs | dropped)  # the larger of two counts, of which the old one is part of the new one
    left = {row.id for row in rows}
    return [[pair for pair in pairs if pair.row.id in left] for pairs in encoded], dict(counts) | {"kept": len(rows)}


def _check_whole(row: Row, tokenizer: Tokenizer) -> None:
    """Raise InputError where the ids of the prompt and of a response do not begin those of the whole conversation."""
    for name, response in (("chosen", row.chosen), ("rejected", row.rejected)):
        if tokenizer.turns and not tokenizer.turns.agrees(row.prompt, response):
            raise InputError(
                f"{row.where or f'row {row.id}'}: in the form of the chat template, the prompt's ids and those of "
                f"{name!r} are not the ids of both together; remove the row, or do without the template "
                "(--template none of train_tokenizer.py)"
            )


def shuffled_batches(pairs: Sequence[Pair], batch: int, seed: int, epoch: int) -> Iterator[list[Pair]]:
    """One epoch: the rows in random order, in full batches. The last rows are left out if they do not fill a batch."""
    order = torch.randperm(len(pairs), generator=generator(seed, "order", epoch)).tolist()
    for start in range(0, len(pairs) - batch + 1, batch):
        yield [pairs[i] for i in order[start : start + batch]]


def too_few(pairs: int, batch: int, counts: Mapping[str, int]) -> InputError:
    """The refusal of fewer rows than a batch needs. It names what `encode` has dropped, if the rest would have done."""
    dropped = {k.removeprefix("dropped: "): n for k, n in counts.items() if k.startswith("dropped: ")}
    rows = pairs + sum(dropped.values())
    mend = "lower --batch or add rows"
    if rows < batch:
        return InputError(f"{pairs} rows do not fill one batch of {batch}; {mend}")
    reasons = sorted(dropped, key=lambda reason: -dropped[reason])
    flags = {"a response longer": "raise --max_response, ", "prompt longer": "raise --max_prompt, "}
    mend = "".join(raise_it for start, raise_it in flags.items() if reasons[0].startswith(start)) + mend
    why = ", ".join(f"{reason}: {dropped[reason]}" for reason in reasons)
    left = f"{pairs} rows do not fill one batch of {batch}"
    return InputError(f"{left}: {rows - pairs} of {rows} rows were dropped ({why}); {mend}")


def training_batches(
    pairs: Sequence[Pair], batch: int, epochs: float, seed: int, steps: int = 0, counts: Mapping[str, int] | None = None
) -> list[list[Pair]]:
    """All batches of a stage, in order: `steps` of them or, if that is 0, those of `epochs` (which may be a fraction).

    Raises InputError where there are fewer rows than one batch needs; `counts`, from `encode`, says why there are few.
    """
    if len(pairs) < batch:
        raise too_few(len(pairs), batch, counts or {})

    def forever() -> Iterator[list[Pair]]:
        epoch = 0
        while True:
            yield from shuffled_batches(pairs, batch, seed, epoch)
            epoch += 1

    per_epoch = sum(1 for _ in shuffled_batches(pairs, batch, seed, 0))
    endless = forever()
    return [next(endless) for _ in range(steps or max(1, round(per_epoch * epochs)))]


def left_out(pairs: Sequence[Pair], batch: int) -> dict[str, int]:
    """How many rows each epoch leaves out because they do not fill a batch. They are different rows each time."""
    rest = len(pairs) % batch
    return {"left out of each epoch: no full batch": rest} if rest else {}
