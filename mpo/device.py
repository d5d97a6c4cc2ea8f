"""Where models compute, and what their weights are held in: one rule for every stage, and flags that override it.

Models and batches are here. Rows, token lists, random numbers and what is gathered of all rows are on the CPU, so that
they are the same on every device. Every process has a device of its own: the CPU, or its own GPU.
"""

from __future__ import annotations

import os

import torch

from mpo.errors import InputError

_here, _dtype = torch.device("cpu"), torch.float32


def here() -> torch.device:
    """The device of this process."""
    return _here


def dtype() -> torch.dtype:
    """Of the weights of a transformer's layers, embedding and head; adapters and scalar heads are always fp32."""
    return _dtype


def start(wanted: str = "auto", dtype: str = "float32", deterministic: bool = False) -> None:
    """Choose both. "auto": CUDA (NVIDIA, AMD), else mps (Apple), else the CPU; or the name of a device.

    `deterministic`: what torch computes there is to be the same bytes each time.
    Errors: InputError for a device that is not there.
    """
    global _here, _dtype
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    if deterministic != torch.are_deterministic_algorithms_enabled():  # asking imports torch's compiler: seconds
        torch.use_deterministic_algorithms(deterministic)
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if wanted == "cuda":  # this process's own
        wanted = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        found = torch.device(wanted)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        reason = str(e).splitlines()[0][:120]
        raise InputError(f"--device {wanted}: not here ({reason}); take auto, cpu, cuda, cuda:1 or mps") from None
    if found.type == "cuda":
        torch.cuda.set_device(found)
    _here, _dtype = found, getattr(torch, dtype)
