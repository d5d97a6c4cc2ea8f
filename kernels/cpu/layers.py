"""A transformer's layers (cpp/matmul.cpp, elementwise.cpp, attention.cpp) as torch functions, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from kernels.cpu.binding import call
from kernels.pieces import Pieces


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        (N, D), out = x.shape, torch.empty_like(x)
        inverse = torch.empty(N)
        call("rms_norm", x, weight, N, D, eps, torch.get_num_threads(), out, inverse)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        dy, dx, d_weight = grads[0].contiguous(), torch.empty_like(x), torch.zeros_like(weight)
        call("rms_norm_backward", x, weight, inverse, dy, *x.shape, torch.get_num_threads(), dx, d_weight)
        return dx, d_weight, None


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        call("swiglu", gate, up, gate.numel(), torch.get_num_threads(), out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dy, d_gate, d_up = grads[0].contiguous(), torch.empty_like(gate), torch.empty_like(up)
        call("swiglu_backward", gate, up, dy, gate.numel(), torch.get_num_threads(), d_gate, d_up)
        return d_gate, d_up


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
        ctx.save_for_backward(cos, sin)
        out = torch.empty_like(x)
        call("rotate", x, cos, sin, *x.shape, torch.get_num_threads(), sign, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _Rotate.apply(grads[0].contiguous(), *ctx.saved_tensors, -1.0), None, None, None


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, bf16: bool) -> Tensor:
        N, H, _ = q.shape
        out, lse = torch.empty_like(q), torch.empty(N, H)
        call("attention", q, k, v, *_shape(q, k, pieces, bf16), out, lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pieces, ctx.bf16 = pieces, bf16
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        sizes = _shape(q, k, ctx.pieces, ctx.bf16)
        call("attention_backward", q, k, v, out, lse, grads[0].contiguous(), *sizes, dq, dk, dv)
        return dq, dk, dv, None, None


def _shape(q: Tensor, k: Tensor, pieces: Pieces, bf16: bool) -> tuple[Tensor | int, ...]:
    (N, H, d), S = q.shape, len(pieces.lengths)
    if int(pieces.lengths.sum()) != N:
        raise ValueError(f"pieces of {int(pieces.lengths.sum())} tokens, but {N} queries")
    return pieces.lengths, pieces.parents, N, S, H, k.shape[1], d, int(bf16), torch.get_num_threads()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See reference.py."""
    result: Tensor = _RMSNorm.apply(x.contiguous(), weight, eps)
    return result


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See reference.py."""
    result: Tensor = _SwiGLU.apply(gate.contiguous(), up.contiguous())
    return result


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See reference.py."""
    result: Tensor = _Rotate.apply(x.contiguous(), cos.contiguous(), sin.contiguous(), 1.0)
    return result


def attention(q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, bf16: bool) -> Tensor:
    """See reference.py."""
    result: Tensor = _Attention.apply(q.contiguous(), k.contiguous(), v.contiguous(), pieces, bf16)
    return result
