"""Kernels for NVIDIA GPUs: the head in Triton (programs.py), products in bf16. For the rest torch's own are used."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import autograd
from . import head
from .head import sample_tokens as sample_tokens


def takes(function: str, one: Tensor, other: Tensor) -> bool:
    """Whether a kernel takes these tensors: on a GPU, of one dtype."""
    if function == "linear" and one.dtype != torch.float32:
        return False  # torch's own product serves every other dtype
    return one.is_cuda and other.is_cuda and one.dtype == other.dtype


linear = partial(autograd.linear, head)
token_logprobs = partial(autograd.token_logprobs, head)
policy_reference = partial(autograd.policy_reference, head)

__all__ = ["linear", "policy_reference", "sample_tokens", "takes", "token_logprobs"]
