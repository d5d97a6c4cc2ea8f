"""The device on which tests of the kernels and of the stages compute: the CPU, or the one that MPO_TEST_DEVICE names.

    MPO_TEST_DEVICE=cuda python -m pytest tests/kernels tests/runtime/test_device.py

`make gpu-check` runs them so. All other tests use the CPU, whatever the machine has (tests/conftest.py).
"""

from __future__ import annotations

import os
from typing import Any

import torch

from mpo.kernels import functions

DEVICE = os.environ.get("MPO_TEST_DEVICE", "")
ON_GPU = DEVICE not in ("", "cpu")


def move(x: Any, place: str) -> Any:
    """The same with all tensors on this device, also those in a tuple, a list or a Packing. Gradients pass through."""
    if isinstance(x, torch.Tensor):
        return x.to(place)
    if isinstance(x, functions.Packing):
        return functions.Packing(x.lengths.tolist(), x.parents.tolist(), torch.device(place))
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(move(part, place) for part in x))
    return type(x)(move(part, place) for part in x) if isinstance(x, tuple | list) else x


class Moved:
    """The public functions of the kernels, for tensors on the CPU, which are moved to the device; results come back."""

    def __getattr__(self, name: str) -> Any:
        """A function of kernels/functions.py that computes on the device; anything else as it is."""
        function = getattr(functions, name)
        if not callable(function) or isinstance(function, type):
            return function

        def moved(*args: Any, **kwargs: Any) -> Any:
            arguments = {key: move(value, DEVICE) for key, value in kwargs.items()}
            return move(function(*move(args, DEVICE), **arguments), "cpu")

        return moved


kernels: Any = Moved() if DEVICE else functions
