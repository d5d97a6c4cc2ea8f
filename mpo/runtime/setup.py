"""What every stage does first: device, processes, threads, precision."""

from __future__ import annotations

import os
import shutil
import sys

import torch

from mpo.config import Common, Limits
from mpo.kernels import functions as kernels
from mpo.kernels.build import triton_lacks
from mpo.runtime import allocator, device, distributed
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
        device.start(config.device, weights, config.deterministic, precision == "bf16-mixed")
    if getattr(config, "compile", False):
        check_compiler()
    distributed.start(getattr(config, "shard", False))
    torch.set_num_threads(threads(config.threads))
    torch.set_flush_denormal(True)
    use_bf16(precision == "bf16-mixed")
    allocator.configure(frugal=getattr(config, "recompute", False))


def check_compiler() -> None:
    """Refuse --compile true where torch.compile would not find the compiler that it needs."""
    if device.current().type == "cpu":
        name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # torch's own rule
        lack = "" if shutil.which(name) else f"torch.compile needs a C++ compiler, and {name} is not here (or set CXX)"
    else:
        lack = triton_lacks() if device.current().type == "cuda" else ""
    if lack:
        raise InputError(f"--compile true: {lack}; without --compile, nothing is lost but speed")


def use_bf16(mixed: bool) -> None:
    """Round to bf16 what `--precision bf16-mixed` asks for, except products where that would make them slower."""
    products = kernels.multiplies_bf16(device.current())
    kernels.use_bf16(mixed, products)
    if mixed and not products:
        note(
            "bf16-mixed: this processor has no products of bf16 numbers (avx512_bf16), so products stay in fp32; only "
            "the cache of generation is bf16"
        )
