"""What every stage does first: device, processes, threads, precision."""

from __future__ import annotations

import torch

from mpo.config import Common, Limits
from mpo.kernels import functions as kernels
from mpo.runtime import allocator, device, distributed
from mpo.runtime.cores import threads
from mpo.runtime.errors import InputError


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
    kernels.use_bf16(precision == "bf16-mixed")
    allocator.configure(frugal=getattr(config, "recompute", False))
