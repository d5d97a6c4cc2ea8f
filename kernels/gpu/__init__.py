"""Kernels for NVIDIA GPUs in Triton. What they lack (layers, generation's cache) is torch's there."""

from __future__ import annotations

from torch import Tensor

from kernels import head as _autograd
from kernels.gpu import head as _programs
from kernels.gpu.head import advantages as advantages
from kernels.gpu.head import sample_tokens as sample_tokens


def takes(function: str, one: Tensor, other: Tensor) -> bool:
    """Whether the tensors are on a GPU and alike."""
    return one.is_cuda and other.is_cuda and one.dtype == other.dtype


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """See reference.py."""
    return _autograd.token_logprobs(_programs, hidden, weight, targets, temperature)


def policy_reference(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, ...]:
    """See reference.py."""
    return _autograd.policy_reference(_programs, hidden, weight, ref_hidden, ref_weight, targets, temperature)
