"""Batched generation with a KV cache.

Prompts are packed end to end, equal ones are computed once, and every row's cache has a length of
its own, so that nothing is padded. Rows that have said EOS leave the batch at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from kernels import Pieces
from kernels.reference import KVCache
from mpo import device, parallel
from mpo.model import Llama

PREFILL = 2**14  # prompts' tokens that are computed at once: what this takes does not grow with the rows


@dataclass(frozen=True)
class Sampling:
    """How to sample: one temperature divides the logits here and in every later log-prob.

    No top-k or top-p, so that what was sampled is what is scored.
    """

    max_new: int  # tokens of a response at most, EOS included
    temperature: float  # 0: always the likeliest token
    eos: int


@dataclass(frozen=True)
class Samples:
    """What was generated for B prompts."""

    responses: list[list[int]]  # token ids with EOS where one was said
    logps: list[list[float]]  # of each of those tokens, under the distribution they were drawn from
    finished: list[bool]  # True where the response ends in EOS


def next_tokens(hidden: Tensor, weight: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw one token a row, or take the likeliest at temperature 0; with its log-prob. All (B,)."""
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
    """Sample one response for each prompt (lists of ids with BOS); several processes share them."""
    uniforms = torch.rand(len(prompts), sampling.max_new, generator=generator)  # a row's do not depend on the others
    mine = parallel.share(len(prompts))
    with parallel.whole_weights(model), kernels.constant_weights():
        found = _generate(model.eval(), [prompts[i] for i in mine], sampling, uniforms[mine].to(device.here()))
    tokens, logps, lengths = (parallel.gather(part, len(prompts)) for part in found)
    return Samples(
        [t[:n] for t, n in zip(tokens.tolist(), lengths.tolist(), strict=True)],
        [x[:n] for x, n in zip(logps.tolist(), lengths.tolist(), strict=True)],
        (tokens.gather(1, lengths[:, None] - 1)[:, 0] == sampling.eos).tolist(),
    )


def _some_at_a_time(prompts: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """As many prompts as have PREFILL tokens, or one that has more."""
    part, tokens = list[tuple[int, ...]](), 0
    for prompt in prompts:
        if part and tokens + len(prompt) > PREFILL:
            yield part
            part, tokens = [], 0
        part, tokens = [*part, prompt], tokens + len(prompt)
    yield part


def _begin(model: Llama, prompts: Sequence[tuple[int, ...]], cache: KVCache) -> Tensor:
    """Prompts into the cache; the hidden state of each one's last token, (S, D)."""
    pieces = Pieces([len(p) for p in prompts], device=device.here())
    ids = torch.tensor([token for p in prompts for token in p]).to(device.here())
    return model(ids, pieces, cache).index_select(0, pieces.last.to(device.here()))


def _generate(
    model: Llama, prompts: Sequence[list[int]], sampling: Sampling, uniforms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and their log-probs, (B, max_new) each, and how many of a row count, (B,)."""
    B, max_new, eos, here = len(prompts), sampling.max_new, sampling.eos, device.here()
    number: dict[tuple[int, ...], int] = {}  # of each prompt among the different ones
    of_row = torch.tensor([number.setdefault(tuple(p), len(number)) for p in prompts]).to(here)
    cache = model.kv_cache(len(number), max(map(len, number)) + max_new)
    hidden = torch.cat([_begin(model, part, cache) for part in _some_at_a_time(list(number))])
    if len(number) < B:
        hidden = hidden[of_row]  # (B, D)
        cache.take(of_row)

    decode = model.model.decoder(cache)
    tokens = torch.full((B, max_new), eos, device=here)
    logps = torch.zeros(B, max_new, device=here)
    lengths = torch.full((B,), max_new, device=here)
    rows = torch.arange(B, device=here)  # those that still grow
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
