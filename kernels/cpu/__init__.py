"""Compiled kernels for CPUs: C++ (../cpp), and the torch functions around it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernels import head as _autograd
from kernels import products as _products
from kernels.cpu import head as _compiled
from kernels.cpu.advantages import advantages as advantages
from kernels.cpu.cache import KVCache as KVCache
from kernels.cpu.decode import decoder as decoder
from kernels.cpu.head import sample_tokens as sample_tokens
from kernels.cpu.layers import attention as attention
from kernels.cpu.layers import rms_norm as rms_norm
from kernels.cpu.layers import rotate as rotate
from kernels.cpu.layers import swiglu as swiglu

FEW = 64  # rows from which a product is worth packing its weight for
HEAD = ("token_logprobs", "policy_reference", "sample_tokens")


def takes(function: str, one: Tensor, other: Tensor) -> bool:
    """Whether the compiled kernels are for these tensors: on a CPU and alike; fp32, or bf16 at the head."""
    if one.device.type != "cpu" or one.dtype != other.dtype:
        return False
    if function == "linear" and one.numel() < FEW * one.shape[-1]:
        return False
    return one.dtype == torch.float32 or (one.dtype == torch.bfloat16 and function in HEAD)


linear = partial(_products.linear, _compiled)
token_logprobs = partial(_autograd.token_logprobs, _compiled)
policy_reference = partial(_autograd.policy_reference, _compiled)
