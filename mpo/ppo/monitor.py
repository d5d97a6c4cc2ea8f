"""What to watch during PPO: metrics of a rollout, and signs of collapse (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mpo.ppo.equations import explained_variance, kl_estimate, masked_mean
from mpo.ppo.rewards import Credit
from mpo.ppo.rollout import Rollout


def rollout_metrics(rollout: Rollout, credit: Credit) -> dict[str, float]:
    """Scores, KL, form of the responses, and how well the critic does, over the whole rollout."""
    mask = rollout.mask
    k1, k3 = (kl_estimate(rollout.logp, rollout.ref_logp, kind) for kind in ("k1", "k3"))  # 0 where masked
    length = mask.sum(1).float()
    both = torch.stack((rollout.scores, length))
    correlation = torch.corrcoef(both)[0, 1] if float(both.std(1).min()) > 0 else torch.tensor(0.0)
    metrics = {
        "score": float(rollout.scores.mean()),
        "score_std": float(rollout.scores.std()),
        "kl_k1": float(k1.sum(1).mean()),
        "kl_k3": float(k3.sum(1).mean()),
        "kl_exact": float(rollout.kl_exact.sum(1).mean()),
        "entropy": float(masked_mean(rollout.entropy, mask)),
        "length": float(length.mean()),
        "eos_rate": float(rollout.finished.float().mean()),
        "score_length_correlation": float(correlation),
        "advantage_std": float(credit.advantages[mask].std()),
    }
    if rollout.values is not None and credit.returns is not None:
        metrics["explained_variance"] = explained_variance(rollout.values, credit.returns, mask)
        metrics["return"] = float(masked_mean(credit.returns, mask))
    return metrics


def collapses(now: Mapping[str, float], first: Mapping[str, float]) -> dict[str, str]:
    """Signs that PPO is collapsing, by name, each with its usual cause.

    `now` and `first` are the metrics of this rollout and of the first one.
    """
    signs = dict[str, str]()
    if now["kl_exact"] > 10 + first["kl_exact"]:
        signs["kl"] = (
            f"{now['kl_exact']:.1f} nats per response from the reference: the policy is exploiting the reward model; "
            "raise --kl_coef, lower --lr, or take fewer --iterations"
        )
    if now["eos_rate"] < 0.5 * first["eos_rate"] and first["eos_rate"] > 0.1:  # a rate from few responses says little
        signs["eos_rate"] = (
            f"{now['eos_rate']:.0%} of the responses end, {first['eos_rate']:.0%} did at first: unfinished ones score "
            "too well; raise --missing_eos_penalty or --max_new"
        )
    if now["length"] < first["length"] / 3 or now["length"] > 3 * first["length"]:
        signs["length"] = (
            f"{now['length']:.0f} tokens per response, {first['length']:.0f} at first: the reward model rewards "
            "length (score_length_correlation); raise --kl_coef or look at the reward model's training pairs"
        )
    if now["entropy"] < 0.1 * first["entropy"]:
        signs["entropy"] = (
            f"entropy {now['entropy']:.2f} nats per token, {first['entropy']:.2f} at first: the policy says the same "
            "thing again and again; lower --lr or --epochs"
        )
    return signs
