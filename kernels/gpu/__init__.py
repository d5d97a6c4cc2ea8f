"""Kernels for NVIDIA GPUs: the head in Triton (programs.py), and products in bf16. The rest is torch's own."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import autograd
from ..build import triton_lacks

if lack := triton_lacks():
    raise ImportError(lack)

from . import head
from .head import sample_tokens as sample_tokens


def takes(function: str, one: Tensor, other: Tensor) -> bool:
    """True where a kernel takes these tensors: both on a GPU and of one dtype."""
    if function == "linear" and one.dtype != torch.float32:
        return False  # torch's own product serves every other dtype
    return one.is_cuda and other.is_cuda and one.dtype == other.dtype


linear = partial(autograd.linear, head)
token_logprobs = partial(autograd.token_logprobs, head)
policy_reference = partial(autograd.policy_reference, head)

__all__ = ["linear", "policy_reference", "sample_tokens", "takes", "token_logprobs"]
