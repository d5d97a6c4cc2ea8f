"""The device of this process, and the dtype of its models' weights: one rule for every stage.

Models and batches are on the device. Rows, token lists, random numbers and everything gathered over all rows are on
the CPU, so that they are the same on every device. Each process has one device: the CPU, or a GPU of its own.
"""

from __future__ import annotations

import os

import torch

from mpo.runtime.errors import InputError

_device, _weight_dtype = torch.device("cpu"), torch.float32


def current() -> torch.device:
    """The device of this process."""
    return _device


def weight_dtype() -> torch.dtype:
    """The dtype of a transformer's layers, embedding and head. Adapters and scalar heads are always fp32."""
    return _weight_dtype


def start(wanted: str = "auto", dtype: torch.dtype = torch.float32, deterministic: bool = False) -> None:
    """Choose the device and the dtype.

    Args:
        wanted: the name of a device, or "auto": CUDA (NVIDIA, AMD), else mps (Apple), else the CPU.
        dtype: of the weights.
        deterministic: the device must compute the same bytes each time.

    Raises:
        InputError: the device does not exist here.
    """
    global _device, _weight_dtype
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    if deterministic != torch.are_deterministic_algorithms_enabled():  # setting it imports torch's compiler: seconds
        torch.use_deterministic_algorithms(deterministic)
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if wanted == "cuda":  # of several, the one that belongs to this process
        wanted = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        chosen = torch.device(wanted)
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        reason = str(e).splitlines()[0].split(". ")[0][:120]
        raise InputError(f"--device {wanted}: not here ({reason}); take auto, cpu, cuda, cuda:1 or mps") from None
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    _device, _weight_dtype = chosen, dtype
