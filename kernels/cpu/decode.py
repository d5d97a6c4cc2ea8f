"""A token of each row through all layers (cpp/decode.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.cpu.binding import call, packed
from kernels.cpu.cache import KVCache
from kernels.reference import LayerWeights


class Decoder:
    """See reference.decoder; the weights are packed here, once."""

    def __init__(self, layers: Sequence[LayerWeights], norm: Tensor, eps: float, cache: KVCache, bf16: bool):
        self.norm, self.eps, self.cache, self.bf16 = norm.contiguous(), eps, cache, bf16
        self.weights = [[x.contiguous() if x.dim() == 1 else packed(x, bf16) for x in w] for w in layers]
        F, D = layers[0].gate.shape
        self.sizes = D, len(layers[0].q) // cache.dim, cache.heads, cache.dim, F

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, D) -> (B, D)"""
        cache, out = self.cache, torch.empty_like(x)
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        layers = zip(self.weights, cache.keys, cache.values, strict=True)  # of now: the cache may have moved (take)
        pointers = torch.tensor([[t.data_ptr() for t in (*weights, keys, values)] for weights, keys, values in layers])
        sizes = len(x), *self.sizes, self.eps, cache.length, int(cache.keys.dtype == torch.bfloat16), int(self.bf16)
        state = cos, sin, cache.slots, cache.lengths
        call("decode", x, pointers, len(pointers), self.norm, *state, *sizes, torch.get_num_threads(), out)
        cache.advance()
        return out


decoder = Decoder
