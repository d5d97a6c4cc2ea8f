"""The definition of every kernel in plain torch: what a reader reads first.

Logits, softmax and sums are fp32 whatever the dtype of hidden states and weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T."""
    return F.linear(x, weight)


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = (hidden @ weight.T).float() / temperature  # (N, V)
    return logits.log_softmax(-1)


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p(target) and H(p) = -sum_v p_v log p_v."""
    logps = _log_softmax(hidden, weight, temperature)  # (N, V)
    logp = logps.gather(-1, targets[:, None]).squeeze(-1)  # (N,)
    with torch.no_grad():  # entropy is a statistic here, not part of any loss
        entropy = -(logps.exp() * logps).sum(-1)
    return logp, entropy


def policy_reference(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    targets: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p(target), log q(target), KL(p || q) = sum_v p_v (log p_v - log q_v), H(p)."""
    logps = _log_softmax(hidden, weight, temperature)  # (N, V)
    with torch.no_grad():  # the reference stays as it is
        ref_logps = _log_softmax(ref_hidden, ref_weight, temperature)  # (N, V)
    p = logps.exp()
    kl = (p * (logps - ref_logps)).sum(-1)
    with torch.no_grad():
        entropy = -(p * logps).sum(-1)
    pick = targets[:, None]
    return logps.gather(-1, pick).squeeze(-1), ref_logps.gather(-1, pick).squeeze(-1), kl, entropy


def sample_tokens(hidden: Tensor, weight: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The first token whose cumulative probability exceeds `uniform`."""
    logps = _log_softmax(hidden, weight, temperature)  # (N, V)
    cdf = logps.exp().cumsum(-1)  # (N, V), fp32: its last entry is 1 up to rounding
    total = cdf[:, -1:]
    tokens = torch.searchsorted(cdf, uniform[:, None].float() * total, right=True)  # (N, 1)
    tokens = tokens.clamp(max=logps.shape[-1] - 1)
    return tokens.squeeze(-1), logps.gather(-1, tokens).squeeze(-1)
