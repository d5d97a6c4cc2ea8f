"""What every stage does first: device, processes, threads, precision."""

from __future__ import annotations

import ctypes

import torch

from mpo.config import Common, Limits
from mpo.kernels import functions as kernels
from mpo.runtime import device, distributed
from mpo.runtime.cores import threads
from mpo.runtime.errors import InputError
from mpo.runtime.output import note


def setup_torch(config: Common) -> None:
    """Set the device, processes, threads and precision that the flags ask for.

    Denormal numbers are flushed to zero, since they slow small models down a hundredfold.
    """
    if kernels.default not in (None, *kernels.IMPLEMENTATIONS):
        raise InputError(f"MPO_KERNELS={kernels.default}: expected one of {', '.join(kernels.IMPLEMENTATIONS)} here")
    precision = getattr(config, "precision", "fp32")
    if isinstance(config, Limits):
        weights = torch.bfloat16 if precision == "bf16" else torch.float32
        device.start(config.device, weights, config.deterministic)
    distributed.start(getattr(config, "shard", False))
    torch.set_num_threads(threads(config.threads))
    torch.set_flush_denormal(True)
    use_bf16(precision == "bf16-mixed")
    if not getattr(config, "recompute", False):  # recompute is for those who need the memory back
        keep_freed_memory()


def use_bf16(mixed: bool) -> None:
    """Round to bf16 what `--precision bf16-mixed` asks for, except products where that would make them slower."""
    products = kernels.multiplies_bf16(device.current())
    kernels.use_bf16(mixed, products)
    if mixed and not products:
        note(
            "bf16-mixed: this processor has no products of bf16 numbers (avx512_bf16), so products stay in fp32; only "
            "the cache of generation is bf16"
        )


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of freed tensors instead of returning it to the system.

    By default each large tensor is a mapping of its own, whose pages the kernel clears when they are first touched.
    That takes much of a small model's step.
    """
    mmap_max, trim_threshold = -4, -1  # mallopt's names for them (malloc.h)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
