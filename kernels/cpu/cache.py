"""The KV cache of generation (cpp/cache.h): rows keep their slots, so that leaving costs nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.binding import call
from kernels.pieces import Pieces

BLOCK = 16  # a row's room is a multiple of this, which every processor's vector length divides


class KVCache:
    """See reference.py."""

    def __init__(
        self, layers: int, rows: int, length: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device
    ):
        self.heads, self.dim, self.length = heads, dim, -(-length // BLOCK) * BLOCK
        self.keys, self.values = torch.zeros(2, layers, rows, heads, self.length, dim, dtype=dtype, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)  # (B,)
        self.slots = torch.arange(rows)  # (B,): where each row lies in keys and values
        self.filled = 0

    def fill(self, layer: int, k: Tensor, v: Tensor, pieces: Pieces) -> None:
        """See reference.py."""
        sizes = (
            len(pieces.lengths),
            self.heads,
            self.length,
            self.dim,
            int(self.keys.dtype == torch.bfloat16),
            torch.get_num_threads(),
        )
        k, v = k.contiguous(), v.contiguous()
        keys, values = self.keys[layer, self.filled :], self.values[layer, self.filled :]
        call("cache_fill", keys, values, k, v, pieces.lengths, *sizes)

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
        """See reference.py; copies only where a row is taken more than once."""
        self.slots, self.lengths = self.slots[rows], self.lengths[rows]
        if len(self.slots.unique()) < len(self.slots):
            self.keys, self.values = self.keys[:, self.slots], self.values[:, self.slots]
            self.slots = torch.arange(len(self.slots))
