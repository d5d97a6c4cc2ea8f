"""The kernels of the head (../cpp/logprobs.cpp, sampling.cpp). ../autograd.py makes them differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import weight_cache
from .binding import call, packed
from .binding import matmul as matmul


def _bf16(hidden: Tensor) -> int:
    return int(hidden.dtype == torch.bfloat16)


def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """The log-prob of each target, the entropy, and the log-sum-exp of the logits, (N,) each."""
    (N, D), V = hidden.shape, len(weight)
    results = torch.empty(3, N)
    shape = N, D, V, _bf16(hidden), temperature, torch.get_num_threads()
    call("token_logprobs", hidden, weight, targets, *shape, *results)
    return tuple(results)


def comparison(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, ...]:
    """logp, ref_logp, KL, entropy, and the log-sum-exps of both models' logits, (N,) each."""
    (N, D), V = hidden.shape, len(weight)
    results = torch.empty(6, N)
    shape = N, D, ref_hidden.shape[1], V, _bf16(hidden), temperature, torch.get_num_threads()
    call("policy_reference", hidden, weight, ref_hidden, ref_weight, targets, *shape, *results)
    return tuple(results)


def gradient_in_logits(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    temperature: float,
    *statistics: Tensor | None,
) -> Tensor:
    """The gradient of a loss in hidden weight^T, (N, V): p_v (of_p + of_log log(p_v / q_v)) / temperature.

    Without a reference, q and `of_log` are left out.

    Args:
        statistics: lse and ref_lse, the log-sum-exps from the forward pass, then of_p and of_log; (N,) each.
    """
    (N, D), V = hidden.shape, len(weight)
    out = torch.empty(N, V)
    shape = N, D, 0 if ref_hidden is None else ref_hidden.shape[1], V, _bf16(hidden), temperature
    call(
        "gradient_in_logits", hidden, weight, ref_hidden, ref_weight, *shape, torch.get_num_threads(), *statistics, out
    )
    return out


def sample_tokens(hidden: Tensor, weight: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """See reference.py."""
    hidden, weight, uniform = hidden.contiguous(), weight.contiguous(), uniform.float().contiguous()
    (N, D), V = hidden.shape, len(weight)
    tokens, logp = torch.empty(N, dtype=torch.long), torch.empty(N)
    ready = packed(weight, hidden.dtype == torch.bfloat16) if weight_cache.is_active() else None
    shape = N, D, V, _bf16(hidden), float(temperature), torch.get_num_threads()
    call("sample_tokens", hidden, weight, ready, uniform, *shape, tokens, logp)
    return tokens, logp
