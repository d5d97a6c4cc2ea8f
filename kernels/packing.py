"""Packing: how N tokens, laid end to end, make up texts. It takes the place of padding and attention masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Padded(NamedTuple):
    """The same segments as rectangles, for implementations that need them."""

    own_index: Tensor  # (S, T): where each segment's tokens stand among all N; 0 past its end
    parent_index: Tensor  # (S, P): where its parent's tokens stand
    token_mask: Tensor  # (S, T): True where `own_index` is a token
    visible: Tensor  # (S, T, P + T): True where a token attends to a token of the parent, or of its own segment


class Packing:
    """N tokens as S segments of text.

    A root segment begins a text. Its children follow it, and each of them continues it separately. A token
    attends to the whole of its parent, and to its own segment up to itself. So a prompt that several responses
    share is stored and computed once; a text of one segment is a root without children.
    """

    def __init__(
        self, lengths: Sequence[int], parents: Sequence[int] | None = None, device: torch.device | None = None
    ):
        """Describe the segments. What is known of whole segments stays on the CPU.

        Args:
            lengths: tokens of each segment.
            parents: for each segment the number of its root, or -1 if it is a root itself (the default for all).
            device: where the tokens are.

        Raises:
            ValueError: a segment is empty, or its parent is not the root that it follows.
        """
        parents = [-1] * len(lengths) if parents is None else parents
        root = -1
        for i, (length, parent) in enumerate(zip(lengths, parents, strict=True)):
            root = i if parent < 0 else root
            if length < 1 or parent not in (-1, root):
                raise ValueError(
                    f"segment {i}: length {length}, parent {parent}; no segment may be empty, and a child must follow "
                    "its root"
                )
        self.device = device or torch.device("cpu")
        self._masks = dict[tuple[torch.dtype, int | None], Tensor]()
        self.lengths = torch.tensor(list(lengths), dtype=torch.long)  # (S,)
        self.parents = torch.tensor(list(parents), dtype=torch.long)  # (S,)

    @cached_property
    def starts(self) -> Tensor:
        """(S,): position of each segment's first token among the N."""
        return self.lengths.cumsum(0) - self.lengths

    @cached_property
    def last(self) -> Tensor:
        """(S,): position of each segment's last token among the N."""
        return self.starts + self.lengths - 1

    @cached_property
    def parent_lengths(self) -> Tensor:
        """(S,): the length of each segment's parent, 0 for roots."""
        return torch.where(self.parents >= 0, self.lengths[self.parents], 0)

    @cached_property
    def positions(self) -> Tensor:
        """(N,): the position of each token in its own text, from 0, as rotary embeddings need it."""
        text_starts = self.starts - self.parent_lengths  # (S,)
        positions = torch.arange(int(self.lengths.sum())) - text_starts.repeat_interleave(self.lengths)
        return positions.to(self.device)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest text: a segment with its parent."""
        return int((self.parent_lengths + self.lengths).max())

    def hiding(self, window: int | None) -> int | None:
        """The window if it hides any token of these texts, else None."""
        return window if window is not None and window < self.longest else None

    def mask(self, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """(S, 1, T, P + T): what is added to attention scores: 0 where `padded` is visible, else -inf.

        With a window, a token attends to itself and the window - 1 tokens before it. Made once for each dtype and
        window, since every layer keeps it for its backward pass.
        """
        if (dtype, window) not in self._masks:
            zero, never = (torch.tensor(x, dtype=dtype).to(self.device) for x in (0.0, -math.inf))
            visible = self.padded.visible if window is None else self.padded.visible & self._within(window)
            self._masks[dtype, window] = torch.where(visible[:, None], zero, never)
        return self._masks[dtype, window]

    def _within(self, window: int) -> Tensor:
        """(S, T, P + T): True where a key is fewer than `window` tokens before the query."""
        T, P = self.padded.own_index.shape[1], self.padded.parent_index.shape[1]
        queries = torch.arange(T, device=self.device)[None, :, None]  # positions in the segment
        keys = torch.arange(T, device=self.device)[None, None].expand(len(self.lengths), 1, T)
        of_parent = torch.arange(P, device=self.device) - self.parent_lengths.to(self.device)[:, None, None]  # negative
        return queries - torch.cat((of_parent, keys), -1) < window

    @cached_property
    def padded(self) -> Padded:
        """The segments as rectangles."""
        parent_starts = torch.where(self.parents >= 0, self.starts[self.parents], 0)
        of_segments = torch.stack((self.lengths, self.parent_lengths, self.starts, parent_starts))
        lengths, parent_lengths, starts, parent_starts = of_segments.to(self.device)[:, :, None]  # (S, 1) each
        own = torch.arange(int(self.lengths.max()), device=self.device)  # (T,)
        before = torch.arange(int(self.parent_lengths.max()), device=self.device)  # (P,)
        is_token, in_parent = own < lengths, before < parent_lengths  # (S, T), (S, P)
        S, T, P = len(self.lengths), len(own), len(before)
        # A pad position attends to what is before it too, so that no row of the softmax is without a key.
        causal = torch.ones(T, T, dtype=torch.bool, device=self.device).tril()
        visible = torch.cat((in_parent[:, None].expand(S, T, P), causal.expand(S, T, T)), -1)
        return Padded(
            torch.where(is_token, starts + own, 0),
            torch.where(in_parent, parent_starts + before, 0),
            is_token,
            visible,
        )
