"""Batched generation with a KV cache.

Prompts are packed end to end, equal prompts are computed once, and each row of the cache has its own length, so that
nothing is padded. A row that has sampled EOS leaves the batch at once.
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
    with distributed.unsharded(model), kernels.constant_weights():
        results = _generate(model.eval(), [prompts[i] for i in local], sampling, uniforms[local].to(device.current()))
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


def _generate(
    model: Llama, prompts: Sequence[list[int]], sampling: Sampling, uniforms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and their log-probs, (B, max_new) each, and the length of each response, (B,)."""
    B, max_new, eos, place = len(prompts), sampling.max_new, sampling.eos, device.current()
    number: dict[tuple[int, ...], int] = {}  # distinct prompt -> its number
    of_row = torch.tensor([number.setdefault(tuple(p), len(number)) for p in prompts]).to(place)
    cache = model.kv_cache(len(number), max(map(len, number)) + max_new)
    hidden = torch.cat([_prefill(model, part, cache) for part in _prefill_groups(list(number))])
    if len(number) < B:
        hidden = hidden[of_row]  # (B, D)
        cache.take(of_row)

    decode = model.model.decoder(cache)
    tokens = torch.full((B, max_new), eos, device=place)
    logps = torch.zeros(B, max_new, device=place)
    lengths = torch.full((B,), max_new, device=place)
    rows = torch.arange(B, device=place)  # of the responses that are not finished
    for step in range(max_new):
        token, logp = next_tokens(hidden, model.lm_head.weight, uniforms[rows, step], sampling.temperature)
        tokens[rows, step], logps[rows, step] = token, logp
        ended = token == eos
        if ended.any():
            lengths[rows[ended]] = step + 1
            going_on = (~ended).nonzero().squeeze(1)
            rows, token = rows[going_on], token[going_on]
            cache.take(going_on)
        if not len(rows) or step == max_new - 1:
            break
        hidden = decode(token)
    return tokens, logps, lengths
