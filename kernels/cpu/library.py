"""The compiled library, and how tensors are passed to it."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from kernels.build import library

_library = ctypes.CDLL(str(library()))  # OSError where it has not been built


def call(function: str, *arguments: Tensor | int | float | None) -> None:
    """Pass tensors as pointers; the caller keeps them alive, contiguous and of the right dtype."""

    def c(x: Tensor | int | float | None) -> Any:
        if x is None:
            return ctypes.c_void_p(None)
        if isinstance(x, Tensor):
            return ctypes.c_void_p(x.data_ptr())
        return ctypes.c_float(x) if isinstance(x, float) else ctypes.c_int64(x)

    getattr(_library, function)(*map(c, arguments))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) times (K, N) in fp32, of any strides."""
    (M, K), N = a.shape, b.shape[1]
    c = torch.empty(M, N)
    call("matmul", a, b, c, M, N, K, *a.stride(), *b.stride(), torch.get_num_threads())
    return c
