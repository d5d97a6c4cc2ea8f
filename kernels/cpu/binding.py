"""The compiled library, and how tensors are passed to its functions."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ..build import library
from ..weight_cache import derived

PANEL = 32  # a multiple of the columns of a tile, whatever the processor (PANEL in cpp/vectors.h)
_library = ctypes.CDLL(str(library()))  # OSError where it has not been built
LANES: int = _library.lanes()  # numbers in a vector
MULTIPLIES_BF16 = bool(_library.multiplies_bf16())  # whether the processor has an instruction for products of bf16
# A product in fp32 is torch's own where it has fewer rows of results or fewer terms to a sum than SMALLEST, or fewer
# multiplications than LEAST in all: measured, for long vectors and for short ones.
SMALLEST, LEAST = (16, 5 * 2**17) if LANES == 16 else (32, 3 * 2**19)


Argument = Tensor | int | float | None
_types: dict[str, list[Any]] = {}


def call(function: str, *arguments: Argument) -> None:
    """Call a compiled function, with tensors passed as pointers.

    Nothing is checked: the caller must see to it that tensors are alive, contiguous and of the right dtype.
    """
    compiled = getattr(_library, function)
    if function not in _types:  # types are declared once, since generation makes thousands of calls a second
        kinds = {int: ctypes.c_int64, float: ctypes.c_float}
        _types[function] = compiled.argtypes = [kinds.get(type(x), ctypes.c_void_p) for x in arguments]
    compiled(*[x.data_ptr() if isinstance(x, Tensor) else x for x in arguments])


def matmul(a: Tensor, b: Tensor, bf16: bool = False) -> Tensor:
    """a (M, K) times b (K, N) -> (M, N). All are fp32; a and b may have any strides.

    With `bf16`, a and b are rounded to bf16 first, and products are still summed in fp32.

    Thin and small products, such as those of an adapter, are torch's own in fp32. The rule knows nothing but shapes,
    so that the same product is always computed in the same way.
    """
    (M, K), N = a.shape, b.shape[1]
    if not bf16 and (min(M, K) < SMALLEST or M * N * K < LEAST):
        return torch.mm(a, b)
    c = torch.empty(M, N)
    call("matmul", a, b, c, M, N, K, *a.stride(), *b.stride(), int(bf16), torch.get_num_threads())
    return c


def packed(weight: Tensor, bf16: bool) -> Tensor:
    """A weight (N, K) in the order in which products read it; cached within `constant_weights`."""

    def pack(w: Tensor) -> Tensor:
        (N, K), words = w.shape, (w.shape[1] + 1) // 2 if bf16 else w.shape[1]
        out = torch.empty(-(-N // PANEL) * PANEL * words)
        call(
            "pack_weight", w.contiguous(), N, K, int(w.dtype == torch.bfloat16), int(bf16), torch.get_num_threads(), out
        )
        return out

    return derived(f"packed, bf16: {bf16}", weight, pack)
