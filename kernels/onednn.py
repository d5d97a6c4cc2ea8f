"""Matrix products of linear layers by oneDNN instead of the BLAS that torch was built with.

torch multiplies fp32 matrices on a CPU by MKL, which on processors of other makers than its own
takes the AVX2 path: with AVX-512 units half of the machine lies idle. oneDNN, which torch carries
too, uses them. The products are fp32 throughout; only the order of the sums differs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
    raise ImportError("oneDNN with AVX-512 is not to be had here")
_product = torch.ops.mkldnn._linear_pointwise  # a private operator of torch: AttributeError without it


def _matmul_t(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) times b (N, K) transposed -> (M, N)."""
    return _product(a, b, None, "none", [], "")


class _Linear(torch.autograd.Function):
    """y = x W^T; dx = dy W; dW = dy^T x: three products, each of them oneDNN's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _matmul_t(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (dy,), (x, weight) = grads, ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        dy = dy.contiguous()
        return (
            _matmul_t(dy, weight.t()) if needs_x else None,
            _matmul_t(dy.t(), x.t()) if needs_weight else None,
        )


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether this implementation is for these tensors: fp32 on a CPU, and not empty."""
    return x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K) times weight (N, K) transposed -> (..., N)."""
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    product = _Linear.apply(rows, weight) if torch.is_grad_enabled() else _matmul_t(rows, weight)
    return product.view(*x.shape[:-1], weight.shape[0])
