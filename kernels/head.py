"""Log-probs and KL as torch functions with gradients, on what a compiled implementation provides.

An implementation is a module with `logprobs`, `comparison`, `gradient_in_logits` and `matmul`
(kernels/cpu/head.py, kernels/gpu/head.py). Backward works on a few columns of the vocabulary at a time: their logits
are computed again and turned into gradients, and two products take these on to hidden states and weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

COLUMNS = 2**21  # gradients of logits held at a time: 8 MB


def _checked(targets: Tensor, vocabulary: int) -> Tensor:
    """Targets as the kernels read them. Errors: IndexError where one is no column of the weight."""
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
        raise IndexError(f"targets must be in [0, {vocabulary}), found {int(targets.min())} to {int(targets.max())}")
    return targets.long().contiguous()


def _gradients(
    ctx: Any,
    sides: tuple[Tensor | None, ...],
    statistics: tuple[Tensor | None, ...],
    of_target: Tensor,
    targets: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients in hidden (N, D) and weight (V, D), from what the loss's gradient is in the logits."""
    hidden, weight, ref_hidden, ref_weight = sides
    assert hidden is not None
    assert weight is not None
    needs_hidden, needs_weight = ctx.needs_input_grad[1:3]
    N, V, bf16 = len(hidden), len(weight), hidden.dtype == torch.bfloat16
    wide = hidden.float()
    d_hidden = torch.zeros_like(wide) if needs_hidden else None
    d_weight = torch.zeros(weight.shape, device=weight.device) if needs_weight else None
    columns = max(512, COLUMNS // max(N, 1) // 512 * 512)
    for first in range(0, V, columns) if N else ():
        part = weight[first : first + columns]
        ref_part = ref_weight[first : first + columns] if ref_weight is not None else None
        out = ctx.impl.gradient_in_logits(hidden, part, ref_hidden, ref_part, ctx.temperature, *statistics)
        rows = ((targets >= first) & (targets < first + len(part))).nonzero().squeeze(1)
        out[rows, targets[rows] - first] += of_target[rows] / ctx.temperature
        if d_hidden is not None:
            d_hidden += ctx.impl.matmul(out, part.float(), bf16)
        if d_weight is not None:
            d_weight[first : first + columns] = ctx.impl.matmul(out.t(), wide, bf16)
    return (
        None if d_hidden is None else d_hidden.to(hidden.dtype),
        None if d_weight is None else d_weight.to(weight.dtype),
    )


class _TokenLogprobs(torch.autograd.Function):
    """d log p(t) / dz_v = 1[v = t] - p_v"""

    @staticmethod
    def forward(
        ctx: Any, impl: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        logp, entropy, lse = impl.logprobs(hidden, weight, targets, temperature)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.impl, ctx.temperature = impl, temperature
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, lse = ctx.saved_tensors
        g = grads[0].float().contiguous()
        found = _gradients(ctx, (hidden, weight, None, None), (lse, None, -g, None), g, targets)
        return (None, *found, None, None)


class _PolicyReference(torch.autograd.Function):
    """d KL / dz_v = p_v (log p_v - log q_v - KL)"""

    @staticmethod
    def forward(
        ctx: Any,
        impl: Any,
        hidden: Tensor,
        weight: Tensor,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        targets: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        results = impl.comparison(hidden, weight, ref_hidden, ref_weight, targets, temperature)
        logp, ref_logp, kl, entropy, lse, ref_lse = results
        ctx.save_for_backward(hidden, weight, ref_hidden, ref_weight, targets, lse, ref_lse, kl)
        ctx.impl, ctx.temperature = impl, temperature
        ctx.mark_non_differentiable(ref_logp, entropy)
        return logp, ref_logp, kl, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *sides, targets, lse, ref_lse, kl = ctx.saved_tensors
        g, g_kl = grads[0].float().contiguous(), grads[2].float().contiguous()
        found = _gradients(ctx, tuple(sides), (lse, ref_lse, -g - g_kl * kl, g_kl), g, targets)
        return (None, *found, None, None, None, None)


def token_logprobs(
    impl: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """See reference.py."""
    targets = _checked(targets, len(weight))
    result: tuple[Tensor, Tensor] = _TokenLogprobs.apply(
        impl, hidden.contiguous(), weight.contiguous(), targets, float(temperature)
    )
    return result


def policy_reference(
    impl: Any,
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    targets: Tensor,
    temperature: float,
) -> tuple[Tensor, ...]:
    """See reference.py; the reference in another dtype is brought to the policy's."""
    targets = _checked(targets, len(weight))
    sides = (x.contiguous() for x in (hidden, weight, ref_hidden.to(hidden.dtype), ref_weight.to(weight.dtype)))
    result: tuple[Tensor, ...] = _PolicyReference.apply(impl, *sides, targets, float(temperature))
    return result
