"""Kernels for NVIDIA GPUs: the head and advantages in Triton, products in bf16. What is lacking is torch's there."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernels import head as _autograd
from kernels import products as _products
from kernels.gpu import head as _programs
from kernels.gpu.advantages import advantages as advantages
from kernels.gpu.head import sample_tokens as sample_tokens


def takes(function: str, one: Tensor, other: Tensor) -> bool:
    """Whether the tensors are on a GPU and alike."""
    if function == "linear" and one.dtype != torch.float32:
        return False  # torch's own product does it all
    return one.is_cuda and other.is_cuda and one.dtype == other.dtype


linear = partial(_products.linear, _programs)
token_logprobs = partial(_autograd.token_logprobs, _programs)
policy_reference = partial(_autograd.policy_reference, _programs)
