"""A token of each row through all layers (cpp/decode.cpp)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.cpu.binding import call, packed
from kernels.cpu.cache import KVCache
from kernels.reference import LayerWeights


def decoder(
    layers: Sequence[LayerWeights], norm: Tensor, eps: float, cache: KVCache, bf16: bool
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """See reference.py; the weights are packed here, once."""
    kept, rows = [], []
    for i, w in enumerate(layers):
        tensors = [x.contiguous() if x.dim() == 1 else packed(x, bf16) for x in w]
        kept += tensors
        rows.append([x.data_ptr() for x in (*tensors, cache.keys[i], cache.values[i])])
    pointers, (F, D) = torch.tensor(rows), layers[0].gate.shape
    heads = len(layers[0].q) // cache.dim, cache.heads, cache.dim

    def step(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for i in range(len(layers)):  # the cache may have moved (take)
            pointers[i, -2], pointers[i, -1] = cache.keys[i].data_ptr(), cache.values[i].data_ptr()
        out, x, cos, sin = torch.empty_like(x), x.contiguous(), cos.contiguous(), sin.contiguous()
        sizes = len(x), D, *heads, F, eps, cache.length, int(cache.keys.dtype == torch.bfloat16), int(bf16)
        state = cos, sin, cache.slots, cache.lengths
        call("decode", x, pointers, len(layers), norm, *state, *sizes, torch.get_num_threads(), out)
        cache.advance()
        return out

    step.weights = kept  # type: ignore[attr-defined]  # what the pointers point at
    return step
