"""A cache of what the kernels derive from weights, such as packed or rounded copies, while no weight changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

_cache: dict[tuple[str, int], tuple[Tensor, Tensor]] | None = None  # None outside the context


@contextmanager
def constant_weights() -> Iterator[None]:
    """Within this context no weight may change, and whatever a kernel derives from a weight is made once and kept.

    For generation: its steps are short compared with the time that rearranging the weights takes.
    """
    global _cache
    before, _cache = _cache, {} if _cache is None else _cache
    try:
        yield
    finally:
        _cache = before


def derived(kind: str, weight: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """make(weight), which is cached within `constant_weights`. `kind` names what is derived."""
    if _cache is None:
        return make(weight)
    key = kind, weight.data_ptr()
    if key not in _cache:
        _cache[key] = weight, make(weight)  # holding the weight keeps its address from being reused
    return _cache[key][1]


def is_active() -> bool:
    """True within `constant_weights`."""
    return _cache is not None
