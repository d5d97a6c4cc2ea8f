"""Weights that do not change for a while, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

_kept: dict[tuple[str, int], tuple[Tensor, Tensor]] | None = None  # None outside the context


@contextmanager
def constant_weights() -> Iterator[None]:
    """Within it no weight changes: what kernels make of one (packed, rounded) is made once and kept.

    For generation, whose steps are short against the time it takes to rearrange a weight.
    """
    global _kept
    before, _kept = _kept, {} if _kept is None else _kept
    try:
        yield
    finally:
        _kept = before


def derived(kind: str, weight: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """make(weight), kept within `constant_weights`."""
    if _kept is None:
        return make(weight)
    key = kind, weight.data_ptr()
    if key not in _kept:
        _kept[key] = weight, make(weight)  # the weight too, so that its address stays taken
    return _kept[key][1]


def are_constant() -> bool:
    """Whether this is within `constant_weights`."""
    return _kept is not None
