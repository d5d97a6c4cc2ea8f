"""The mathematics of PPO for language models as pure functions (1707.06347, 2403.17031).

Tensors are (B, R): one column per response token, `mask` True on real ones. A response token
is an action; the state it was chosen in is everything before it. Shaped rewards, GAE and whitening
are a kernel: kernels.advantages; their equations are in kernels/reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference import masked_mean as masked_mean
from kernels.reference import shape_rewards as shape_rewards
from kernels.reference import whiten as whiten


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(pi || ref) from the sampled token (Schulman 2020, "Approximating KL").

    k1 = log pi - log ref: unbiased, may be negative. k2 = k1^2 / 2: biased, its gradient is not.
    k3 = exp(-k1) - 1 + k1: unbiased and never negative.
    """
    k1 = logp - ref_logp
    return {"k1": lambda: k1, "k2": lambda: k1**2 / 2, "k3": lambda: torch.exp(-k1) - 1 + k1}[kind]()


# --- advantages without a critic ----------------------------------------------------------------


def _groups(rewards: Tensor, group: int) -> Tensor:
    """(B, R) -> (B/group, group): what each response earned in all; rows of a prompt stand together."""
    return rewards.sum(1).view(-1, group)


def _per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    """(B/group, group) -> (B, R): every token of a response has the response's advantage."""
    return advantages.flatten()[:, None] * mask


def rloo(rewards: Tensor, mask: Tensor, group: int) -> Tensor:
    """Leave-one-out baseline: A_i = R_i - mean of the other responses' R. Source: 2402.14740."""
    R = _groups(rewards, group)
    return _per_token((R - R.mean(1, keepdim=True)) * group / (group - 1), mask)


def grpo(rewards: Tensor, mask: Tensor, group: int) -> Tensor:
    """Relative to the group: A_i = (R_i - mean R) / std R. Source: 2402.03300."""
    R = _groups(rewards, group)
    return _per_token((R - R.mean(1, keepdim=True)) / (R.std(1, keepdim=True) + 1e-4), mask)


def dr_grpo(rewards: Tensor, mask: Tensor, group: int) -> Tensor:
    """GRPO without the division by std: A_i = R_i - mean R. Source: 2503.20783."""
    R = _groups(rewards, group)
    return _per_token(R - R.mean(1, keepdim=True), mask)


def reinforce_pp(rewards: Tensor, mask: Tensor, group: int) -> Tensor:
    """REINFORCE++: the reward to come, whitened over the batch. Source: 2501.03262.

    A_t = sum of rewards from t on: the score less the price of the KL still to come.
    """
    to_come = (rewards * mask).flip(1).cumsum(1).flip(1)
    return whiten(to_come, mask)


GROUP_ESTIMATORS = {"rloo": rloo, "grpo": grpo, "dr_grpo": dr_grpo, "reinforce++": reinforce_pp}
"""The rivals of GAE that need no critic: (rewards, mask, group) -> advantages, (B, R)."""


def token_weights(mask: Tensor, estimator: str, most: int) -> Tensor:
    """(B, R) weights, by which the losses of a minibatch are summed; they make its average.

    grpo: the mean of each response, then over responses (2402.03300). dr_grpo: the sum over
    responses' tokens over B times the longest possible response (2503.20783). Else: over all tokens.
    """
    if estimator == "grpo":
        return mask / mask.sum(1, keepdim=True) / len(mask)
    if estimator == "dr_grpo":
        return mask / (most * len(mask))
    return mask / mask.sum()


# --- losses ---------------------------------------------------------------------------------------


def policy_losses(logp: Tensor, old_logp: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate per token (1707.06347, eq. 7): -min(w A, clamp(w, 1 - clip, 1 + clip) A).

    Returns losses (B, R) and per-token metrics: ratio, whether clipped, approximate KL to old.
    """
    log_ratio = logp - old_logp
    ratio = log_ratio.exp()
    losses = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    with torch.no_grad():
        metrics = {
            "ratio": ratio.detach(),
            "clipped": ((ratio - 1).abs() > clip).float(),
            "kl_old": ratio - 1 - log_ratio,  # k3 of Schulman's estimators, >= 0
        }
    return losses, metrics


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Clipped squared error per token: 1/2 max((V - R)^2, (V_clip - R)^2) (2005.12729)."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


def next_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, responses: int) -> float:
    """The adaptive controller of 1909.08593, section 2.2: the error is clipped to +-0.2.

    `kl` and `target` are nats per response; target 0 keeps the coefficient fixed.
    """
    if target == 0:
        return kl_coef
    error = min(0.2, max(-0.2, kl / target - 1))
    return kl_coef * (1 + error * responses / horizon)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 for a perfect critic, 0 for one that knows only the mean."""
    v, r = values[mask], returns[mask]
    return float(1 - (r - v).var(correction=0) / r.var(correction=0).clamp(min=1e-8))
