"""A linear layer as a torch function with gradients, on what an implementation multiplies with."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function


class _Linear(Function):
    """y = x W^T; dx = dy W; dW = dy^T x"""

    @staticmethod
    def forward(ctx: Any, impl: Any, x: Tensor, weight: Tensor, bf16: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.impl, ctx.bf16 = impl, bf16
        product: Tensor = impl.matmul(x, weight.t(), bf16)
        return product

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, weight) = grads, ctx.saved_tensors
        _, needs_x, needs_weight, _ = ctx.needs_input_grad
        dy = dy.contiguous()  # it may be expanded from one number
        dx = ctx.impl.matmul(dy, weight, ctx.bf16) if needs_x else None
        return None, dx, ctx.impl.matmul(dy.t(), x, ctx.bf16) if needs_weight else None, None


def linear(impl: Any, x: Tensor, weight: Tensor, bf16: bool) -> Tensor:
    """See reference.py; `impl` has a `matmul` (cpu/head.py, gpu/head.py)."""
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    product: Tensor = _Linear.apply(impl, rows, weight, bf16)
    return product.view(*x.shape[:-1], weight.shape[0])
