"""Advantages on GPUs (programs.py): one program a row."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gpu import programs
from kernels.reference import masked_mean, shape_rewards, whiten


def advantages(
    score: Tensor,
    kl: Tensor,
    values: Tensor,
    mask: Tensor,
    kl_coef: float,
    gamma: float,
    lam: float,
    whiten_rewards: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.py."""
    shift, scale = torch.zeros((), device=score.device), torch.ones((), device=score.device)
    if whiten_rewards:
        rewards = shape_rewards(score, kl, mask, kl_coef)
        shift = masked_mean(rewards, mask)
        scale = torch.rsqrt(masked_mean((rewards - shift) ** 2, mask) + 1e-8)
    found, returns = torch.zeros(2, *mask.shape, device=score.device)
    inputs = score.contiguous(), kl.contiguous(), values.contiguous(), mask.sum(1), shift, scale
    programs.backwards[len(mask),](*inputs, found, returns, mask.shape[1], kl_coef, gamma, lam)
    return found, returns, whiten(found, mask)
