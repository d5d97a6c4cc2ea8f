"""The equations of PPO for language models, as pure functions (1707.06347, 2203.02155, 2403.17031).

A response token is an action; the state in which it is chosen is everything before it. Tensors are (B, R), with one
column for each response token, and `mask` is True on real tokens. In the order of use:

    penalised_scores  kl_estimate  shape_rewards  td_errors  gae  whiten  policy_losses  value_losses
"""

from __future__ import annotations

import torch
from torch import Tensor

# --- from a score to rewards ----------------------------------------------------------------------


def penalised_scores(scores: Tensor, finished: Tensor, penalty: float) -> Tensor:
    """(B,): the reward model's scores, less `penalty` for each response that does not end in EOS."""
    return scores - penalty * ~finished


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """An estimate of KL(pi || ref) from each sampled token (Schulman 2020, "Approximating KL Divergence").

    k1 = log pi - log ref:  unbiased, but may be negative.
    k2 = k1^2 / 2:          biased, but its gradient is not.
    k3 = e^-k1 - 1 + k1:    unbiased and never negative.
    """
    k1 = logp - ref_logp
    return {"k1": lambda: k1, "k2": lambda: k1**2 / 2, "k3": lambda: torch.exp(-k1) - 1 + k1}[kind]()


def shape_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = -kl_coef * kl_t, plus the score (B,) at the last token of the response. Source: 2203.02155, section 3.5."""
    last = mask.sum(1) - 1  # (B,)
    rewards = -kl_coef * kl * mask
    return rewards.index_put((torch.arange(len(scores), device=scores.device), last), scores, accumulate=True)


# --- from rewards to advantages -------------------------------------------------------------------


def td_errors(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """delta_t = r_t + gamma V_{t+1} - V_t, where the value after the last token is 0. Source: 1506.02438, section 3."""
    values = values * mask
    next_values = torch.cat((values[:, 1:], torch.zeros_like(values[:, :1])), 1)
    return (rewards + gamma * next_values - values) * mask


def gae(deltas: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation: A_t = delta_t + gamma lam A_{t+1}. Source: 1506.02438, section 3.

    With the values V, the critic's targets are the returns A + V.
    """
    advantages = torch.zeros_like(deltas)
    following = torch.zeros_like(deltas[:, 0])  # (B,): A_{t+1}
    for t in reversed(range(deltas.shape[1])):
        following = (deltas[:, t] + gamma * lam * following) * mask[:, t]
        advantages[:, t] = following
    return advantages


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the entries where mask is True; 0 where there are none."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over the mask; zero elsewhere."""
    centred = (x - masked_mean(x, mask)) * mask
    return centred * torch.rsqrt(masked_mean(centred**2, mask) + eps)


# --- the rivals of GAE, which need no critic -------------------------------------------------------


def _groups(rewards: Tensor, group: int) -> Tensor:
    """(B, R) -> (B/group, group): each response's return G, its sum of rewards. Responses to a prompt are adjacent."""
    return rewards.sum(1).view(-1, group)


def _per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    """(B/group, group) -> (B, R): every token has the advantage of its response."""
    return advantages.flatten()[:, None] * mask


def rloo(rewards: Tensor, mask: Tensor, group: int) -> Tensor:
    """Leave-one-out baseline: A_i = G_i - mean of the other responses' G. Source: 2402.14740."""
    G = _groups(rewards, group)
    return _per_token((G - G.mean(1, keepdim=True)) * group / (group - 1), mask)


def grpo(rewards: Tensor, mask: Tensor, group: int) -> Tensor:
    """Relative to the group: A_i = (G_i - mean G) / std G. Source: 2402.03300."""
    G = _groups(rewards, group)
    return _per_token((G - G.mean(1, keepdim=True)) / (G.std(1, keepdim=True) + 1e-4), mask)


def dr_grpo(rewards: Tensor, mask: Tensor, group: int) -> Tensor:
    """GRPO without the division by std: A_i = G_i - mean G. Source: 2503.20783."""
    G = _groups(rewards, group)
    return _per_token(G - G.mean(1, keepdim=True), mask)


def reinforce_pp(rewards: Tensor, mask: Tensor, group: int) -> Tensor:
    """REINFORCE++: the sum of rewards from token t on, whitened over the batch. Source: 2501.03262."""
    to_come = (rewards * mask).flip(1).cumsum(1).flip(1)
    return whiten(to_come, mask)


CRITIC_FREE = {"rloo": rloo, "grpo": grpo, "dr_grpo": dr_grpo, "reinforce++": reinforce_pp}
"""Estimators without a critic: (rewards (B, R), mask (B, R), group) -> advantages (B, R)."""

# --- losses ---------------------------------------------------------------------------------------


def policy_losses(logp: Tensor, old_logp: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate: -min(w A, clamp(w, 1 - clip, 1 + clip) A) with w = pi / pi_old. Source: 1707.06347, eq. 7.

    Returns losses (B, R) and metrics of each token: the ratio w, whether it is outside the range, and an approximate KL
    to the old policy. A token outside the range has no gradient only if A pushes it further out.
    """
    log_ratio = logp - old_logp
    ratio = log_ratio.exp()
    losses = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    with torch.no_grad():
        metrics = {
            "ratio": ratio.detach(),
            "clipped": ((ratio - 1).abs() > clip).float(),
            "kl_old": ratio - 1 - log_ratio,  # Schulman's k3, never negative
        }
    return losses, metrics


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Clipped squared error of each token: 1/2 max((V - G)^2, (V_clipped - G)^2), G the return. Source: 2005.12729."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def token_weights(mask: Tensor, estimator: str, max_new: int) -> Tensor:
    """(B, R): each token's weight in the mean loss of a minibatch.

    grpo: mean over each response's tokens, then over responses (2402.03300). dr_grpo: the sum over all tokens,
    divided by B times the largest possible length (2503.20783). Otherwise: mean over all tokens.
    """
    if estimator == "grpo":
        return mask / mask.sum(1, keepdim=True) / len(mask)
    if estimator == "dr_grpo":
        return mask / (max_new * len(mask))
    return mask / mask.sum()


# --- around the update ----------------------------------------------------------------------------


def next_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, responses: int) -> float:
    """The adaptive controller of 1909.08593, section 2.2, whose error is clipped to +-0.2.

    `kl` and `target` are in nats per response; with target 0 the coefficient stays fixed.
    """
    if target == 0:
        return kl_coef
    error = min(0.2, max(-0.2, kl / target - 1))
    return kl_coef * (1 + error * responses / horizon)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(G - V) / Var(G): 1 for a perfect critic, 0 for one that knows only the mean return."""
    v, g = values[mask], returns[mask]
    return float(1 - (g - v).var(correction=0) / g.var(correction=0).clamp(min=1e-8))
