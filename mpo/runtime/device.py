"""The device of this process, and the dtype of its models' weights: one rule for every stage.

Models and batches are on the device. Rows, token lists, random numbers and everything gathered over all rows are on
the CPU, so that they are the same on every device. Each process has one device: the CPU, or a GPU of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mpo.runtime.errors import InputError

_device, _weight_dtype = torch.device("cpu"), torch.float32


def current() -> torch.device:
    """The device of this process."""
    return _device


def weight_dtype() -> torch.dtype:
    """The dtype of a transformer's layers, embedding and head. Adapters and scalar heads are always fp32."""
    return _weight_dtype


def start(
    wanted: str = "auto", dtype: torch.dtype = torch.float32, deterministic: bool = False, rounded: bool = False
) -> None:
    """Choose the device and the dtype.

    Args:
        wanted: the name of a device, or "auto": CUDA (NVIDIA, AMD), else mps (Apple), else the CPU.
        dtype: of the weights.
        deterministic: the device must compute the same bytes each time.
        rounded: matrix products are to round their operands to bf16 (--precision bf16-mixed).

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
        if torch.cuda.is_available() and os.environ.get("LOCAL_RANK", "0") == wanted.removeprefix("cuda:") != "0":
            raise InputError(f"--device cuda: {_too_few_gpus()}") from None
        reason = str(e).splitlines()[0].split(". ")[0][:120]
        raise InputError(f"--device {wanted}: not here ({reason}); take auto, cpu, cuda, cuda:1 or mps") from None
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.cuda.reset_peak_memory_stats()
        _set_precision(rounded)
    _device, _weight_dtype = chosen, dtype


@contextmanager
def restored() -> Iterator[None]:
    """At the end of this context, give back the device, the dtype and the precision that were there before it."""
    global _device, _weight_dtype
    before, products = (_device, _weight_dtype), torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        _device, _weight_dtype = before
        torch.set_float32_matmul_precision(products)
        if deterministic != torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(deterministic)


def _too_few_gpus() -> str:
    processes, gpus = os.environ.get("LOCAL_WORLD_SIZE", "several"), torch.cuda.device_count()
    return f"{processes} processes need a GPU each, and the GPUs here are {gpus}; start fewer, or take --device cpu"


def _set_precision(rounded: bool) -> None:
    """Set how a GPU multiplies fp32 matrices, whatever the environment says; some images for GPUs switch TF32 on.

    TF32 rounds operands to 11 significant bits, which is too coarse for log-probs of fp32 models. Operands that are
    already rounded to bf16's 8 bits lose nothing by it, and are multiplied several times as fast. Sums are fp32.
    """
    torch.set_float32_matmul_precision("high" if rounded else "highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def synchronise() -> None:
    """Wait until the device has done all that it was asked to do, before a clock is read."""
    if _device.type == "cuda":
        torch.cuda.synchronize(_device)


def peak_memory_mb() -> float | None:
    """The most memory of tensors on a CUDA device since `start`, in MB; None on other devices."""
    return round(torch.cuda.max_memory_allocated(_device) / 2**20, 1) if _device.type == "cuda" else None
