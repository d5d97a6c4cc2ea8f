"""Kernels for CPUs: the C++ in ../cpp, called through ctypes, with gradients from ../autograd.py."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import autograd
from . import head, layers
from .binding import MULTIPLIES_BF16 as MULTIPLIES_BF16
from .generation import KVCache as KVCache
from .head import sample_tokens as sample_tokens

FEW = 64  # rows; for products of fewer rows, packing the weight does not pay
THIN = 8  # outputs; a product with fewer of them, such as a scalar head, leaves most of a tile unused
HEAD = ("token_logprobs", "policy_reference", "sample_tokens")


def takes(function: str, one: Tensor, other: Tensor) -> bool:
    """True where a kernel takes these tensors: both on the CPU and fp32, or for the head both bf16."""
    if one.device.type != "cpu" or one.dtype != other.dtype:
        return False
    if function == "linear" and (one.numel() < FEW * one.shape[-1] or len(other) < THIN):
        return False
    return one.dtype == torch.float32 or (one.dtype == torch.bfloat16 and function in HEAD)


linear = partial(autograd.linear, head)
rms_norm = partial(autograd.rms_norm, layers)
swiglu = partial(autograd.swiglu, layers)
rotate = partial(autograd.rotate, layers)
attention = partial(autograd.attention, layers)
token_logprobs = partial(autograd.token_logprobs, head)
policy_reference = partial(autograd.policy_reference, head)

__all__ = ["KVCache", "attention", "linear", "policy_reference", "rms_norm", "rotate", "sample_tokens"]
__all__ += ["swiglu", "takes", "token_logprobs"]
