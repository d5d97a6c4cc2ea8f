"""Generation: the KV cache (../cpp/cache.h), and one more token of each text (../cpp/decode.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..packing import Packing
from ..reference import LayerWeights
from .binding import call, packed

POINTERS = 16  # of a layer, as decode.cpp reads them: LayerWeights, keys, values; 0 for a bias or norm that is None
BLOCK = 16  # the cache has room for a multiple of so many tokens a row; the length of a vector must divide it


class KVCache:
    """See reference.py. Each row has a slot of the cache and keeps it, so that nothing is copied when a row leaves."""

    def __init__(
        self, layers: int, rows: int, length: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device
    ):
        self.heads, self.dim, self.length = heads, dim, -(-length // BLOCK) * BLOCK
        self.keys, self.values = torch.zeros(2, layers, rows, heads, self.length, dim, dtype=dtype, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)  # (B,)
        self.slots = torch.arange(rows)  # (B,): the slot of each row in keys and values
        self.filled, self.room = 0, length

    def fill(self, layer: int, k: Tensor, v: Tensor, packing: Packing) -> None:
        """See reference.py."""
        S, bf16 = len(packing.lengths), int(self.keys.dtype == torch.bfloat16)
        sizes = S, self.heads, self.length, self.dim, bf16, torch.get_num_threads()
        k, v = k.contiguous(), v.contiguous()
        keys, values = self.keys[layer, self.filled :], self.values[layer, self.filled :]
        call("cache_fill", keys, values, k, v, packing.lengths, *sizes)

    def begin(self, lengths: Tensor) -> None:
        """See reference.py."""
        self.lengths[self.filled : self.filled + len(lengths)] = lengths
        self.filled += len(lengths)
        assert self.filled <= len(self.lengths)

    def advance(self) -> None:
        """See reference.py."""
        self.lengths = self.lengths + 1
        assert int(self.lengths.max()) <= self.length

    def take(self, rows: Tensor) -> None:
        """See reference.py. The cache is copied only where a row occurs more than once."""
        self.slots, self.lengths = self.slots[rows], self.lengths[rows]
        if len(self.slots.unique()) < len(self.slots):
            self.keys, self.values = self.keys[:, self.slots], self.values[:, self.slots]
            self.slots = torch.arange(len(self.slots))

    def decoder(self, layers: Sequence[LayerWeights], norm: Tensor, eps: float, bf16: bool) -> Decoder:
        """See reference.py."""
        return Decoder(layers, norm, eps, self, bf16)


class Decoder:
    """See reference.KVCache.decoder. The weights are packed once, when the object is made."""

    def __init__(self, layers: Sequence[LayerWeights], norm: Tensor, eps: float, cache: KVCache, bf16: bool):
        self.norm, self.eps, self.cache, self.bf16 = norm.contiguous(), eps, cache, bf16
        self.weights = [[_as_read(x, bf16) for x in w] for w in layers]
        F, D = layers[0].gate.shape
        self.sizes = D, len(layers[0].q) // cache.dim, cache.heads, cache.dim, F

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Embeddings x (B, D), cos and sin (B, d/2) -> hidden states (B, D)."""
        cache, out = self.cache, torch.empty_like(x)
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        # The addresses are looked up in each step, since `take` may have moved the cache.
        layers = zip(self.weights, cache.keys, cache.values, strict=True)
        pointers = torch.tensor(
            [[0 if t is None else t.data_ptr() for t in (*weights, keys, values)] for weights, keys, values in layers]
        )
        sizes = len(x), *self.sizes, self.eps, cache.length, int(cache.keys.dtype == torch.bfloat16), int(self.bf16)
        state = cos, sin, cache.slots, cache.lengths
        assert pointers.shape[1] == POINTERS
        call("decode", x, pointers, len(pointers), self.norm, *state, *sizes, torch.get_num_threads(), out)
        cache.advance()
        return out


def _as_read(weight: Tensor | None, bf16: bool) -> Tensor | None:
    """A weight in the order in which decode.cpp reads it: vectors as they are, matrices packed."""
    if weight is None:
        return None
    return weight.contiguous() if weight.dim() == 1 else packed(weight, bf16)
