"""The head's kernels (cpp/head.cpp) as torch functions, and their backward passes.

Backward works on a few columns of the vocabulary at a time. The compiled part computes their logits
again and turns them into gradients; two matrix products take these on to hidden states and weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.constant import are_constant
from kernels.cpu.library import call, matmul, packed

COLUMNS = 2**21  # gradients of logits held at a time: 8 MB


def _checked(targets: Tensor, vocabulary: int) -> Tensor:
    """Targets as the compiled code reads them. Errors: IndexError where one is no column of the weight."""
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
        raise IndexError(f"targets must be in [0, {vocabulary}), found {int(targets.min())} to {int(targets.max())}")
    return targets.long().contiguous()


def _gradients(
    sides: tuple[Tensor | None, ...],
    statistics: tuple[Tensor | None, ...],
    of_target: Tensor,
    targets: Tensor,
    temperature: float,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients in hidden (N, D) and weight (V, D), from what the loss's gradient is in the logits."""
    hidden, weight, ref_hidden, ref_weight = sides
    assert hidden is not None
    assert weight is not None
    (N, D), V = hidden.shape, len(weight)
    RD = ref_hidden.shape[1] if ref_hidden is not None else 0
    d_hidden = torch.zeros(N, D) if needs[0] else None
    d_weight = torch.zeros(V, D) if needs[1] else None
    wide = hidden.float()
    columns = max(512, COLUMNS // max(N, 1) // 512 * 512)
    for first in range(0, V, columns) if N else ():
        part = weight[first : first + columns]
        ref_part = ref_weight[first : first + columns] if ref_weight is not None else None
        out = torch.empty(N, len(part))
        bf16, threads = int(hidden.dtype == torch.bfloat16), torch.get_num_threads()
        shape = N, D, RD, len(part), bf16, temperature, threads
        call("gradient_in_logits", hidden, part, ref_hidden, ref_part, *shape, *statistics, out)
        rows = ((targets >= first) & (targets < first + len(part))).nonzero().squeeze(1)
        out[rows, targets[rows] - first] += of_target[rows] / temperature
        if d_hidden is not None:
            d_hidden += matmul(out, part.float(), bool(bf16))
        if d_weight is not None:
            d_weight[first : first + columns] = matmul(out.t(), wide, bool(bf16))
    return (
        None if d_hidden is None else d_hidden.to(hidden.dtype),
        None if d_weight is None else d_weight.to(weight.dtype),
    )


class _TokenLogprobs(torch.autograd.Function):
    """d log p(t) / dz_v = 1[v = t] - p_v"""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        (N, D), V = hidden.shape, len(weight)
        logp, entropy, lse = torch.empty(3, N)
        bf16, threads = int(hidden.dtype == torch.bfloat16), torch.get_num_threads()
        shape = N, D, V, bf16, temperature, threads
        call("token_logprobs", hidden, weight, targets, *shape, logp, entropy, lse)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, lse = ctx.saved_tensors
        g = grads[0].float().contiguous()
        statistics = lse, None, -g, None
        sides = hidden, weight, None, None
        found = _gradients(sides, statistics, g, targets, ctx.temperature, ctx.needs_input_grad[:2])
        return (*found, None, None)


class _PolicyReference(torch.autograd.Function):
    """d KL / dz_v = p_v (log p_v - log q_v - KL)"""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        targets: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (N, D), V, RD = hidden.shape, len(weight), ref_hidden.shape[1]
        logp, ref_logp, kl, entropy, lse, ref_lse = results = torch.empty(6, N)
        bf16, threads = int(hidden.dtype == torch.bfloat16), torch.get_num_threads()
        shape = N, D, RD, V, bf16, temperature, threads
        call("policy_reference", hidden, weight, ref_hidden, ref_weight, targets, *shape, *results)
        ctx.save_for_backward(hidden, weight, ref_hidden, ref_weight, targets, lse, ref_lse, kl)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(ref_logp, entropy)
        return logp, ref_logp, kl, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *sides, targets, lse, ref_lse, kl = ctx.saved_tensors
        g, g_kl = grads[0].float().contiguous(), grads[2].float().contiguous()
        statistics = lse, ref_lse, -g - g_kl * kl, g_kl
        found = _gradients(tuple(sides), statistics, g, targets, ctx.temperature, ctx.needs_input_grad[:2])
        return (*found, None, None, None, None)


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """See reference.py."""
    targets = _checked(targets, len(weight))
    return _TokenLogprobs.apply(hidden.contiguous(), weight.contiguous(), targets, float(temperature))


def policy_reference(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See reference.py; the reference in another dtype is brought to the policy's."""
    targets = _checked(targets, len(weight))
    sides = (x.contiguous() for x in (hidden, weight, ref_hidden.to(hidden.dtype), ref_weight.to(weight.dtype)))
    return _PolicyReference.apply(*sides, targets, float(temperature))


def sample_tokens(hidden: Tensor, weight: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """See reference.py."""
    hidden, weight, uniform = hidden.contiguous(), weight.contiguous(), uniform.float().contiguous()
    (N, D), V = hidden.shape, len(weight)
    tokens, logp = torch.empty(N, dtype=torch.long), torch.empty(N)
    bf16, threads = int(hidden.dtype == torch.bfloat16), torch.get_num_threads()
    ready = packed(weight, bool(bf16)) if are_constant() else None
    call("sample_tokens", hidden, weight, ready, uniform, N, D, V, bf16, float(temperature), threads, tokens, logp)
    return tokens, logp
