"""Gradients for compiled kernels: one torch.autograd.Function each, on top of the kernels of an implementation.

`impl` is a module with the forward and backward kernels: cpu/head.py, cpu/layers.py or gpu/head.py.

The head's backward pass works on a few columns of the vocabulary at a time: it computes their logits again, turns
them into gradients, and multiplies these with the weight and with the hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .packing import Packing

HEAD_COLUMNS = 2**21  # gradients of logits held at a time: 8 MB in fp32
Gradients = tuple[Tensor | None, ...]


# --- the layers ---------------------------------------------------------------------------------


class Linear(Function):
    """y = x W^T; dx = dy W; dW = dy^T x"""

    @staticmethod
    def forward(ctx: Any, impl: Any, x: Tensor, weight: Tensor, bf16: bool) -> Tensor:
        """x (M, K), weight (N, K) -> (M, N)"""
        _, needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.impl, ctx.bf16 = impl, bf16
        product: Tensor = impl.matmul(x, weight.t(), bf16)
        return product

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        """From dy (M, N)."""
        (dy,), (x, weight) = grads, ctx.saved_tensors
        _, needs_x, needs_weight, _ = ctx.needs_input_grad
        dy = dy.contiguous()  # it may be expanded from one number
        dx = ctx.impl.matmul(dy, weight, ctx.bf16) if needs_x else None
        return None, dx, ctx.impl.matmul(dy.t(), x, ctx.bf16) if needs_weight else None, None


class RMSNorm(Function):
    """y = x / rms(x) * w, with 1 / rms(x) kept for the backward pass"""

    @staticmethod
    def forward(ctx: Any, impl: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x (N, D) -> (N, D)"""
        out, inverse = impl.rms_norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.impl = impl
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        """From dy (N, D)."""
        dx, d_weight = ctx.impl.rms_norm_backward(*ctx.saved_tensors, grads[0].contiguous())
        return None, dx, d_weight, None


class SwiGLU(Function):
    """y = silu(gate) * up"""

    @staticmethod
    def forward(ctx: Any, impl: Any, gate: Tensor, up: Tensor) -> Tensor:
        """(N, F) each -> (N, F)"""
        ctx.save_for_backward(gate, up)
        ctx.impl = impl
        return impl.swiglu_forward(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        """From dy (N, F)."""
        d_gate, d_up = ctx.impl.swiglu_backward(*ctx.saved_tensors, grads[0].contiguous())
        return None, d_gate, d_up


class Rotate(Function):
    """Rotation by an angle; its gradient is the rotation by minus that angle"""

    @staticmethod
    def forward(ctx: Any, impl: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (N, H, d) -> (N, H, d)"""
        ctx.save_for_backward(cos, sin)
        ctx.impl = impl
        return impl.rotation(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        """From dy (N, H, d)."""
        return None, ctx.impl.rotation(grads[0].contiguous(), *ctx.saved_tensors, -1.0), None, None


class Attention(Function):
    """Scores are computed again in the backward pass, from each query's log-sum-exp (2205.14135)"""

    @staticmethod
    def forward(ctx: Any, impl: Any, q: Tensor, k: Tensor, v: Tensor, packing: Packing, bf16: bool) -> Tensor:
        """q (N, H, d); k, v (N, H_kv, d) -> (N, H, d)"""
        out, lse = impl.attention_forward(q, k, v, packing, bf16)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.impl, ctx.packing, ctx.bf16 = impl, packing, bf16
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        """From dy (N, H, d)."""
        dq, dk, dv = ctx.impl.attention_backward(*ctx.saved_tensors, grads[0].contiguous(), ctx.packing, ctx.bf16)
        return None, dq, dk, dv, None, None


# --- the head -----------------------------------------------------------------------------------


class TokenLogprobs(Function):
    """d log p(t) / dz_v = 1[v = t] - p_v"""

    @staticmethod
    def forward(
        ctx: Any, impl: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """hidden (N, D), weight (V, D), targets (N,) -> log-probs and entropies, (N,) each"""
        logp, entropy, lse = impl.logprobs(hidden, weight, targets, temperature)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.impl, ctx.temperature = impl, temperature
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        """From d logp (N,)."""
        hidden, weight, targets, lse = ctx.saved_tensors
        g = grads[0].float().contiguous()
        d_hidden, d_weight = _head_gradients(ctx, (hidden, weight, None, None), (lse, None, -g, None), g, targets)
        return None, d_hidden, d_weight, None, None


class PolicyReference(Function):
    """d KL / dz_v = p_v (log p_v - log q_v - KL), besides the gradient of log p(t) as above"""

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
        """hidden, ref_hidden (N, D), weights (V, D), targets (N,) -> logp, ref_logp, kl, entropy, (N,) each"""
        results = impl.comparison(hidden, weight, ref_hidden, ref_weight, targets, temperature)
        logp, ref_logp, kl, entropy, lse, ref_lse = results
        ctx.save_for_backward(hidden, weight, ref_hidden, ref_weight, targets, lse, ref_lse, kl)
        ctx.impl, ctx.temperature = impl, temperature
        ctx.mark_non_differentiable(ref_logp, entropy)
        return logp, ref_logp, kl, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        """From d logp and d kl, (N,) each."""
        *sides, targets, lse, ref_lse, kl = ctx.saved_tensors
        g, g_kl = grads[0].float().contiguous(), grads[2].float().contiguous()
        statistics = lse, ref_lse, -g - g_kl * kl, g_kl
        d_hidden, d_weight = _head_gradients(ctx, tuple(sides), statistics, g, targets)
        return None, d_hidden, d_weight, None, None, None, None


def _head_gradients(
    ctx: Any,
    sides: tuple[Tensor | None, ...],
    statistics: tuple[Tensor | None, ...],
    of_target: Tensor,
    targets: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients in hidden (N, D) and weight (V, D).

    Args:
        sides: hidden, weight, ref_hidden, ref_weight; the last two may be None.
        statistics: what the gradient in every logit is computed from (`gradient_in_logits` of the implementation).
        of_target: (N,), what is added to the gradient in each target's logit.
    """
    hidden, weight, ref_hidden, ref_weight = sides
    assert hidden is not None
    assert weight is not None
    needs_hidden, needs_weight = ctx.needs_input_grad[1:3]
    N, V, bf16 = len(hidden), len(weight), hidden.dtype == torch.bfloat16
    wide = hidden.float()
    d_hidden = torch.zeros_like(wide) if needs_hidden else None
    d_weight = torch.zeros(weight.shape, device=weight.device) if needs_weight else None
    columns = max(512, HEAD_COLUMNS // max(N, 1) // 512 * 512)
    for first in range(0, V, columns) if N else ():
        part = weight[first : first + columns]
        ref_part = ref_weight[first : first + columns] if ref_weight is not None else None
        d_logits = ctx.impl.gradient_in_logits(hidden, part, ref_hidden, ref_part, ctx.temperature, *statistics)
        rows = ((targets >= first) & (targets < first + len(part))).nonzero().squeeze(1)
        d_logits[rows, targets[rows] - first] += of_target[rows] / ctx.temperature
        if d_hidden is not None:
            d_hidden += ctx.impl.matmul(d_logits, part.float(), bf16)
        if d_weight is not None:
            d_weight[first : first + columns] = ctx.impl.matmul(d_logits.t(), wide, bf16)
    return (
        None if d_hidden is None else d_hidden.to(hidden.dtype),
        None if d_weight is None else d_weight.to(weight.dtype),
    )


# --- the public functions, for an implementation to bind with functools.partial ------------------


def linear(impl: Any, x: Tensor, weight: Tensor, bf16: bool) -> Tensor:
    """See reference.py."""
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    product: Tensor = Linear.apply(impl, rows, weight, bf16)
    return product.view(*x.shape[:-1], weight.shape[0])


def rms_norm(impl: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See reference.py."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()  # (N, D)
    result: Tensor = RMSNorm.apply(impl, rows, weight, eps)
    return result.view(x.shape)


def swiglu(impl: Any, gate: Tensor, up: Tensor) -> Tensor:
    """See reference.py."""
    result: Tensor = SwiGLU.apply(impl, gate.contiguous(), up.contiguous())
    return result


def rotate(impl: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See reference.py."""
    result: Tensor = Rotate.apply(impl, x.contiguous(), cos.contiguous(), sin.contiguous())
    return result


def attention(impl: Any, q: Tensor, k: Tensor, v: Tensor, packing: Packing, bf16: bool) -> Tensor:
    """See reference.py."""
    result: Tensor = Attention.apply(impl, q.contiguous(), k.contiguous(), v.contiguous(), packing, bf16)
    return result


def token_logprobs(
    impl: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """See reference.py."""
    targets = _checked(targets, len(weight))
    result: tuple[Tensor, Tensor] = TokenLogprobs.apply(
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
    """See reference.py; a reference of another dtype is converted to the policy's."""
    targets = _checked(targets, len(weight))
    sides = (x.contiguous() for x in (hidden, weight, ref_hidden.to(hidden.dtype), ref_weight.to(weight.dtype)))
    result: tuple[Tensor, ...] = PolicyReference.apply(impl, *sides, targets, float(temperature))
    return result


def _checked(targets: Tensor, vocabulary: int) -> Tensor:
    """Targets as the kernels read them. Raises IndexError for a target outside the vocabulary."""
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
        raise IndexError(f"targets must be in [0, {vocabulary}), found {int(targets.min())} to {int(targets.max())}")
    return targets.long().contiguous()
