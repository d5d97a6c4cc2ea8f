"""Advantages (cpp/advantages.cpp) as a torch function."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.binding import call


def advantages(
    score: Tensor,
    kl: Tensor,
    values: Tensor,
    mask: Tensor,
    kl_coef: float,
    gamma: float,
    lam: float,
    whiten_rewards: bool,
) -> tuple[Tensor, ...]:
    """See reference.py."""
    inputs = score.contiguous(), kl.contiguous(), values.contiguous(), mask.sum(1)
    results = torch.zeros(3, *mask.shape)
    numbers = float(kl_coef), float(gamma), float(lam), int(whiten_rewards)
    call("advantages", *inputs, *mask.shape, *numbers, *results)
    return tuple(results)
