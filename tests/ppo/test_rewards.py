"""What a rollout's tokens have earned: every quantity, against a loop in float64 that knows only the definitions."""

from __future__ import annotations

import math

import pytest
import torch

from mpo.config import PPOConfig
from mpo.data.batches import make_batch
from mpo.ppo.rewards import assign_credit
from mpo.ppo.rollout import Rollout

LENGTHS = (7, 1, 4, 3)
FLAGS = {"out": "", "prompts": "", "model": "", "ref": "", "rm": ""}


def rollout_of(critic: bool) -> Rollout:
    """Random log-probs, values and scores of responses with different lengths; the last one is unfinished."""
    draw = torch.Generator().manual_seed(3)
    batch = make_batch([([1, 5], list(range(6, 6 + n))) for n in LENGTHS], share=False)
    mask = batch.response_mask

    def column(scale: float) -> torch.Tensor:
        return torch.randn(mask.shape, generator=draw) * scale * mask

    logp, ref_logp, values = column(1.0), column(1.0), column(0.5)
    kl = column(0.3).abs()
    scores = torch.randn(len(LENGTHS), generator=draw)
    finished = torch.tensor([True, True, True, False])
    return Rollout(batch, mask, logp, ref_logp, kl, kl, values if critic else None, scores, finished)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "exact"])
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_every_quantity_matches_a_loop(estimator, kl_in):
    config = PPOConfig(**FLAGS, kl_estimator=estimator, kl_in=kl_in, gamma=0.97, lam=0.9, missing_eos_penalty=0.7)
    rollout = rollout_of(critic=True)
    credit = assign_credit(rollout, 0.3, config)
    everything = []  # (row, column, advantage)
    for b, length in enumerate(LENGTHS):
        score = rollout.scores[b].item() - (0.7 if b == 3 else 0.0)
        assert credit.penalised_scores[b].item() == pytest.approx(score, abs=1e-6)
        value = [rollout.values[b, t].item() for t in range(length)] + [0.0]
        reward, delta = [], []
        for t in range(length):
            k1 = rollout.logp[b, t].item() - rollout.ref_logp[b, t].item()
            kl = {"k1": k1, "k2": k1 * k1 / 2, "k3": math.exp(-k1) - 1 + k1, "exact": rollout.kl_exact[b, t].item()}[
                estimator
            ]
            assert credit.kl[b, t].item() == pytest.approx(kl, rel=1e-5, abs=1e-5)
            reward.append((-0.3 * kl if kl_in == "reward" else 0.0) + (score if t == length - 1 else 0.0))
            assert credit.rewards[b, t].item() == pytest.approx(reward[t], rel=1e-5, abs=1e-5)
        for t in range(length):
            delta.append(reward[t] + 0.97 * value[t + 1] - value[t])
            assert credit.deltas[b, t].item() == pytest.approx(delta[t], rel=1e-5, abs=1e-5)
        for t in range(length):
            advantage = sum((0.97 * 0.9) ** (k - t) * delta[k] for k in range(t, length))
            everything.append((b, t, advantage))
            assert credit.advantages[b, t].item() == pytest.approx(advantage, rel=1e-5, abs=1e-5)
            assert credit.returns[b, t].item() == pytest.approx(advantage + value[t], rel=1e-5, abs=1e-5)
    mean = sum(a for _, _, a in everything) / len(everything)
    std = math.sqrt(sum((a - mean) ** 2 for _, _, a in everything) / len(everything))
    for b, t, advantage in everything:
        assert credit.loss_advantages[b, t].item() == pytest.approx((advantage - mean) / std, rel=1e-4, abs=1e-4)
    assert not credit.loss_advantages[~rollout.mask].any()


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "dr_grpo", "reinforce++"])
def test_without_a_critic_the_loss_uses_the_advantages_as_they_are(estimator):
    config = PPOConfig(**FLAGS, advantage=estimator, group=2, kl_coef=0.3)
    credit = assign_credit(rollout_of(critic=False), 0.3, config)
    assert credit.deltas is None
    assert credit.returns is None
    assert torch.equal(credit.loss_advantages, credit.advantages)
    assert credit.advantages.any()
