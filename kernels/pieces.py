"""How packed tokens make up texts: what takes the place of padding and masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Padded(NamedTuple):
    """Pieces laid out as rectangles, for implementations that need them."""

    own: Tensor  # (S, T): where each piece's tokens stand among all N; 0 past its end
    before: Tensor  # (S, P): where its parent's do
    real: Tensor  # (S, T): True where `own` is a token
    visible: Tensor  # (S, T, P + T): True where a token sees a token of the parent, or of its own piece


class Pieces:
    """N tokens that are S pieces of text, end to end.

    A root is a text's beginning; its children, which follow it, each go on from it. A token sees
    its whole parent, and its own piece up to itself. So a prompt that several responses share stands
    there, and is computed, once; a text of one piece is a root without children.
    """

    def __init__(
        self, lengths: Sequence[int], parents: Sequence[int] | None = None, device: torch.device | None = None
    ):
        """Args: lengths, in tokens; parents, of each piece its root's number, -1 for roots (all, if None); device,
        where the tokens are. What is known of whole pieces stays on the CPU.

        Errors: ValueError where a piece is empty, or follows another root than its own.
        """
        parents = [-1] * len(lengths) if parents is None else parents
        root = -1
        for i, (length, parent) in enumerate(zip(lengths, parents, strict=True)):
            root = i if parent < 0 else root
            if length < 1 or parent not in (-1, root):
                raise ValueError(
                    f"piece {i}: length {length}, parent {parent}; a child follows its root, none is empty"
                )
        self.device = device or torch.device("cpu")
        self._masks = dict[torch.dtype, Tensor]()
        self.lengths = torch.tensor(list(lengths), dtype=torch.long)  # (S,)
        self.parents = torch.tensor(list(parents), dtype=torch.long)  # (S,)

    @cached_property
    def starts(self) -> Tensor:
        """(S,): where each piece begins among the N tokens."""
        return self.lengths.cumsum(0) - self.lengths

    @cached_property
    def past(self) -> Tensor:
        """(S,): the length of each piece's parent, 0 for roots."""
        return torch.where(self.parents >= 0, self.lengths[self.parents], 0)

    @cached_property
    def positions(self) -> Tensor:
        """(N,): where each token stands in its own text, from 0."""
        found = torch.arange(int(self.lengths.sum())) - (self.starts - self.past).repeat_interleave(self.lengths)
        return found.to(self.device)

    @cached_property
    def last(self) -> Tensor:
        """(S,): where each piece's last token stands among the N."""
        return self.starts + self.lengths - 1

    def mask(self, dtype: torch.dtype) -> Tensor:
        """(S, 1, T, P + T): what is added to attention scores of this dtype: 0 where `padded` is visible, else -inf.

        Made once, since every layer keeps it for its backward pass.
        """
        if dtype not in self._masks:
            zero, never = (torch.tensor(x, dtype=dtype).to(self.device) for x in (0.0, -math.inf))
            self._masks[dtype] = torch.where(self.padded.visible[:, None], zero, never)
        return self._masks[dtype]

    @cached_property
    def padded(self) -> Padded:
        """The same as rectangles."""
        parent_starts = torch.where(self.parents >= 0, self.starts[self.parents], 0)
        of_pieces = torch.stack((self.lengths, self.past, self.starts, parent_starts))
        lengths, pasts, starts, parent_starts = of_pieces.to(self.device)[:, :, None]  # (S, 1) each
        own = torch.arange(int(self.lengths.max()), device=self.device)  # (T,)
        past = torch.arange(int(self.past.max()), device=self.device)  # (P,)
        real, seen = own < lengths, past < pasts  # (S, T), (S, P)
        S, T, P = len(self.lengths), len(own), len(past)
        # A pad sees what is before it, too: no row without a key.
        causal = torch.ones(T, T, dtype=torch.bool, device=self.device).tril()
        visible = torch.cat((seen[:, None].expand(S, T, P), causal.expand(S, T, T)), -1)
        return Padded(
            torch.where(real, starts + own, 0),
            torch.where(seen, parent_starts + past, 0),
            real,
            visible,
        )
