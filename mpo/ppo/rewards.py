"""From a rollout to what its tokens have earned: penalised score, KL, reward, delta, advantage, return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mpo.config import PPOConfig
from mpo.ppo.equations import CRITIC_FREE, gae, kl_estimate, penalised_scores, shape_rewards, td_errors, whiten
from mpo.ppo.rollout import Rollout


@dataclass(frozen=True)
class Credit:
    """How the scores of a rollout are credited to its tokens. Every tensor is kept, so that it can be looked at."""

    penalised_scores: Tensor  # (B,): the reward model's score, less the penalty of a response without EOS
    kl: Tensor  # (B, R): the estimate of each token's KL that is charged (--kl_estimator)
    rewards: Tensor  # (B, R)
    deltas: Tensor | None  # (B, R): TD errors; None without a critic
    advantages: Tensor  # (B, R): what the estimator gives
    returns: Tensor | None  # (B, R): the critic's targets; None without a critic
    loss_advantages: Tensor  # (B, R): what the policy's loss uses: GAE's advantages whitened, all others as they are


def assign_credit(rollout: Rollout, kl_coef: float, config: PPOConfig) -> Credit:
    """Score -> penalised score -> rewards -> advantages, as the flags say (equations.py)."""
    mask = rollout.mask
    scores = penalised_scores(rollout.scores, rollout.finished, config.missing_eos_penalty)  # (B,)
    exact = config.kl_estimator == "exact"
    kl = rollout.kl_exact if exact else kl_estimate(rollout.logp, rollout.ref_logp, config.kl_estimator)  # (B, R)
    price = kl_coef if config.kl_in == "reward" else 0.0  # with --kl_in loss, update.py charges the KL
    rewards = shape_rewards(scores, kl, mask, price)  # (B, R)
    if rollout.values is None:
        advantages = CRITIC_FREE[config.advantage](rewards, mask, config.group)  # (B, R)
        return Credit(scores, kl, rewards, None, advantages, None, advantages)
    deltas = td_errors(rewards, rollout.values, mask, config.gamma)  # (B, R)
    advantages = gae(deltas, mask, config.gamma, config.lam)  # (B, R)
    returns = (advantages + rollout.values) * mask  # (B, R)
    return Credit(scores, kl, rewards, deltas, advantages, returns, whiten(advantages, mask))
