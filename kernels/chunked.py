"""The head in plain torch, a few rows at a time: the fallback where no compiled kernel takes the tensors.

At most CHUNK logits exist at once, or one row of them. The backward pass computes them again (1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import reference

CHUNK = 2**22  # logits: 16 MB in fp32


def takes(function: str, hidden: Tensor, weight: Tensor) -> bool:
    """True where there are too many logits to hold at once."""
    return len(hidden) * len(weight) > CHUNK


def _by_rows(
    function: Callable[..., tuple[Tensor, ...]], rows: tuple[Tensor, ...], *weights: Tensor
) -> tuple[Tensor, ...]:
    """Call function(*rows, *weights) on a few of the N rows at a time, and concatenate its results."""
    size = max(1, CHUNK // len(weights[0]))
    parts = []
    for chunk in zip(*(tensor.split(size) for tensor in rows), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(function, *chunk, *weights, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(function(*chunk, *weights))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """See reference.py."""

    def part(h: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return reference.token_logprobs(h, w, t, temperature)

    return _by_rows(part, (hidden, targets), weight)


def policy_reference(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, ...]:
    """See reference.py."""

    def part(h: Tensor, rh: Tensor, t: Tensor, w: Tensor, rw: Tensor) -> tuple[Tensor, ...]:
        return reference.policy_reference(h, w, rh, rw, t, temperature)

    return _by_rows(part, (hidden, ref_hidden, targets), weight, ref_weight)


def sample_tokens(hidden: Tensor, weight: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """See reference.py."""

    def part(h: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return reference.sample_tokens(h, w, u, temperature)

    return _by_rows(part, (hidden, uniform), weight)
