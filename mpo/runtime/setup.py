"""What every stage does first: device, processes, threads, precision."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mpo.config import Common, Limits
from mpo.kernels import functions as kernels
from mpo.kernels.build import triton_lacks
from mpo.runtime import allocator, device, distributed
from mpo.runtime.cores import threads
from mpo.runtime.errors import InputError
from mpo.runtime.output import note

_told = list[bool]()  # not empty once a processor without products of bf16 numbers has been mentioned


def setup_torch(config: Common) -> None:
    """Set the device, processes, threads and precision that the flags ask for.

    Denormal numbers are flushed to zero, since they slow small models down a hundredfold.
    """
    kernels.compile_once()
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


@contextmanager
def restored() -> Iterator[None]:
    """At the end of this context, undo what `setup_torch` has changed in a program that goes on, such as a notebook.

    Only the way in which memory is allocated stays (allocator.py): freed memory is kept for the next tensors.
    """
    threads_before, denormals, rounding = torch.get_num_threads(), keeps_denormals(), kernels.rounding()
    with device.restored():
        try:
            yield
        finally:
            torch.set_num_threads(threads_before)
            torch.set_flush_denormal(not denormals)
            kernels.use_bf16(*rounding)


@contextmanager
def computing(place: str, precision: str) -> Iterator[None]:
    """Within this context, compute as a stage does with --device and --precision; with the threads that are set."""
    mixed = precision == "bf16-mixed"
    with restored():
        kernels.compile_once()
        device.start(place, torch.bfloat16 if precision == "bf16" else torch.float32, rounded=mixed)
        torch.set_flush_denormal(True)
        use_bf16(mixed)
        yield


def keeps_denormals() -> bool:
    """Whether this process computes with numbers as small as 1e-40; torch does not tell otherwise."""
    return float(torch.tensor(1e-40) / 2) > 0


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
    if mixed and not products and not _told:
        _told.append(True)  # a program that is no stage comes here many times
        note(
            "bf16-mixed: this processor has no products of bf16 numbers (avx512_bf16), so products stay in fp32; only "
            "the cache of generation is bf16"
        )
