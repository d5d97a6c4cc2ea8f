"""Batched generation with a KV cache.

Prompts are packed end to end, equal prompts are computed once, and each row of the cache has its own length, so that
nothing is padded. A row that has sampled EOS leaves the batch at once.

A policy that is sharded among processes is gathered once, for all tokens; or, where it is too large for that, layer by
layer for each token. Then all processes go through the layers equally often, also those whose rows are finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpo.kernels import functions as kernels
from mpo.kernels.functions import KVCache, Packing
from mpo.model.llama import Llama
from mpo.runtime import device, distributed

PREFILL = 2**14  # prompt tokens computed at once, so that memory does not grow with the number of rows


@dataclass(frozen=True)
class Sampling:
    """How to sample. The temperature divides the logits here and in every later log-prob alike.

    There is no top-k or top-p: the distribution that was sampled is the one that is scored.
    """

    max_new: int  # largest number of response tokens, EOS included
    temperature: float  # 0: always take the likeliest token
    eos: int
    # How memory is used (tools/memory.py chooses); it changes responses by no more than rounding.
    whole: bool = True  # gather all of a sharded policy at once, not one layer after the other
    rows: int = 0  # sampled at a time in each process, since a row's keys and values take memory; 0: all


@dataclass(frozen=True)
class Samples:
    """What was generated for B prompts."""

    responses: list[list[int]]  # token ids, with EOS where it was sampled
    logps: list[list[float]]  # of each of those tokens, under the distribution they were drawn from
    finished: list[bool]  # True where the response ends in EOS


def next_tokens(hidden: Tensor, weight: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw one token for each row, or take the likeliest at temperature 0; returns it and its log-prob, (B,) each."""
    if temperature > 0:
        return kernels.sample_tokens(hidden, weight, uniform, temperature)
    logps = (hidden @ weight.T).float().log_softmax(-1)
    best = logps.max(-1)
    return best.indices, best.values


@torch.no_grad()
def generate(
    model: Llama,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    generator: torch.Generator,
) -> Samples:
    """Sample one response to each prompt (a list of ids with BOS). Several processes divide the prompts."""
    uniforms = torch.rand(len(prompts), sampling.max_new, generator=generator)  # so that no row depends on the others
    local = distributed.local_rows(len(prompts))
    parts = []
    with distributed.unsharded(model.eval(), layers=sampling.whole), kernels.constant_weights():
        for begin in range(0, len(local), sampling.rows or len(local)):
            part = local[begin : begin + (sampling.rows or len(local))]
            parts.append(_generate(model, [prompts[i] for i in part], sampling, uniforms[part].to(device.current())))
    results = (torch.cat(column) for column in zip(*parts, strict=True))
    tokens, logps, lengths = (distributed.all_gather(part, len(prompts)) for part in results)
    return Samples(
        [t[:n] for t, n in zip(tokens.tolist(), lengths.tolist(), strict=True)],
        [x[:n] for x, n in zip(logps.tolist(), lengths.tolist(), strict=True)],
        (tokens.gather(1, lengths[:, None] - 1)[:, 0] == sampling.eos).tolist(),
    )


def _prefill_groups(prompts: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Groups of prompts with PREFILL tokens in all, or one prompt that has more."""
    part, tokens = list[tuple[int, ...]](), 0
    for prompt in prompts:
        if part and tokens + len(prompt) > PREFILL:
            yield part
            part, tokens = [], 0
        part, tokens = [*part, prompt], tokens + len(prompt)
    yield part


def _prefill(model: Llama, prompts: Sequence[tuple[int, ...]], cache: KVCache) -> Tensor:
    """Put S prompts into the cache; returns the hidden state of each prompt's last token, (S, D)."""
    packing = Packing([len(p) for p in prompts], device=device.current())
    ids = torch.tensor([token for p in prompts for token in p]).to(device.current())
    hidden: Tensor = model(ids, packing, cache, packing.last.to(device.current()))
    return hidden


def _begin(model: Llama, prompts: Sequence[list[int]], sampling: Sampling) -> tuple[KVCache, Tensor]:
    """A cache that holds B prompts, and the hidden state of each prompt's last token, (B, D)."""
    number: dict[tuple[int, ...], int] = {}  # distinct prompt -> its number
    of_row = torch.tensor([number.setdefault(tuple(p), len(number)) for p in prompts]).to(device.current())
    cache = model.kv_cache(len(number), max(map(len, number)) + sampling.max_new, sampling.whole)
    groups = list(_prefill_groups(list(number)))
    idle = 0 if sampling.whole else int(distributed.all_max([len(groups)])[0]) - len(groups)
    hidden = torch.cat([_prefill(model, part, cache) for part in groups])
    for _ in range(idle):
        model.model.take_part()
    if len(number) < len(prompts):
        hidden = hidden[of_row]  # (B, D)
        cache.take(of_row)
    return cache, hidden


def _generate(
    model: Llama, prompts: Sequence[list[int]], sampling: Sampling, uniforms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and their log-probs, (B, max_new) each, and the length of each response, (B,)."""
    B, max_new, eos, place = len(prompts), sampling.max_new, sampling.eos, device.current()
    cache, hidden = _begin(model, prompts, sampling)
    decode = model.model.decoder(cache, sampling.whole)
    tokens = torch.full((B, max_new), eos, device=place)
    logps = torch.zeros(B, max_new, device=place)
    lengths = torch.full((B,), max_new, device=place)
    rows = torch.arange(B, device=place)  # of the responses that are not finished
    for step in range(max_new):
        if len(rows):
            token, logp = next_tokens(hidden, model.lm_head.weight, uniforms[rows, step], sampling.temperature)
            tokens[rows, step], logps[rows, step] = token, logp
            ended = token == eos
            if ended.any():
                lengths[rows[ended]] = step + 1
                going_on = (~ended).nonzero().squeeze(1)
                rows, token = rows[going_on], token[going_on]
                cache.take(going_on)
        if step == max_new - 1 or not _any_rows(len(rows), sampling):
            break
        if len(rows):
            hidden = decode(token)
        else:
            model.model.take_part()
    return tokens, logps, lengths


def _any_rows(here: int, sampling: Sampling) -> bool:
    """Whether rows are left, in this process or, where all processes have to go through the layers, in any of them."""
    return here > 0 if sampling.whole else distributed.all_max([here])[0] > 0
