"""Kernels for NVIDIA GPUs in Triton. What they lack (layers, generation's cache) is torch's there."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from kernels import head as _autograd
from kernels.gpu import head as _programs
from kernels.gpu.advantages import advantages as advantages
from kernels.gpu.head import sample_tokens as sample_tokens


def takes(function: str, one: Tensor, other: Tensor) -> bool:
    """Whether the tensors are on a GPU and alike."""
    return one.is_cuda and other.is_cuda and one.dtype == other.dtype


token_logprobs = partial(_autograd.token_logprobs, _programs)
policy_reference = partial(_autograd.policy_reference, _programs)
