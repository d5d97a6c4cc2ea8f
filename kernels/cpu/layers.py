"""The kernels of the layers (../cpp/elementwise.cpp, attention.cpp), forward and backward; see ../autograd.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import Packing
from .binding import call


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (N, D) divided by its root mean square and multiplied by the weight, and the inverse of that mean (N,)."""
    (N, D), out, inverse = x.shape, torch.empty_like(x), torch.empty(len(x))
    call("rms_norm", x, weight, N, D, eps, torch.get_num_threads(), out, inverse)
    return out, inverse


def rms_norm_backward(x: Tensor, weight: Tensor, inverse: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients in x (N, D) and weight (D,)."""
    dx, d_weight = torch.empty_like(x), torch.zeros_like(weight)
    call("rms_norm_backward", x, weight, inverse, dy, *x.shape, torch.get_num_threads(), dx, d_weight)
    return dx, d_weight


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up: (N, F) each -> (N, F)."""
    out = torch.empty_like(gate)
    call("swiglu", gate, up, gate.numel(), torch.get_num_threads(), out)
    return out


def swiglu_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients in gate and up, (N, F) each."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    call("swiglu_backward", gate, up, dy, gate.numel(), torch.get_num_threads(), d_gate, d_up)
    return d_gate, d_up


def rotation(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """x (N, H, d) rotated by the angles whose cos and sin are (N, d/2); with sign -1, by minus these angles."""
    out = torch.empty_like(x)
    call("rotate", x, cos, sin, *x.shape, torch.get_num_threads(), sign, out)
    return out


def attention_forward(q: Tensor, k: Tensor, v: Tensor, packing: Packing, bf16: bool) -> tuple[Tensor, Tensor]:
    """The output (N, H, d), and the log-sum-exp of each query's scores (N, H)."""
    N, H, _ = q.shape
    out, lse = torch.empty_like(q), torch.empty(N, H)
    call("attention", q, k, v, *_sizes(q, k, packing, bf16), out, lse)
    return out, lse


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dy: Tensor, packing: Packing, bf16: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in q (N, H, d), k and v (N, H_kv, d)."""
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    call("attention_backward", q, k, v, out, lse, dy, *_sizes(q, k, packing, bf16), dq, dk, dv)
    return dq, dk, dv


def _sizes(q: Tensor, k: Tensor, packing: Packing, bf16: bool) -> tuple[Tensor | int, ...]:
    """How the kernels are told of the shapes. Raises ValueError where the packing has another number of tokens."""
    (N, H, d), S = q.shape, len(packing.lengths)
    if int(packing.lengths.sum()) != N:
        raise ValueError(f"a packing of {int(packing.lengths.sum())} tokens, but {N} queries")
    return packing.lengths, packing.parents, N, S, H, k.shape[1], d, int(bf16), torch.get_num_threads()
