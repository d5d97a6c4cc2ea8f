"""The mathematics of PPO by hand and by independent float64 loops."""

from __future__ import annotations

import math

import pytest
import torch

from mpo.data.batches import make_batch
from mpo.kernels.functions import Packing
from mpo.model.llama import ValueHead
from mpo.model.logprobs import response_hidden
from mpo.model.scoring import state_values
from mpo.ppo import equations
from tests.conftest import small_model

MASK = torch.tensor([[True, True, True, True], [True, True, False, False], [True, False, False, False]])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_masked_mean_and_whiten_by_hand():
    x = torch.tensor([[1.0, 3.0], [5.0, 99.0]])
    mask = torch.tensor([[True, True], [True, False]])
    assert equations.masked_mean(x, mask).item() == 3.0
    assert equations.masked_mean(x, torch.zeros_like(mask)).item() == 0.0
    # deviations -2, 0, 2; variance 8/3
    s = 2 / math.sqrt(8 / 3)
    assert equations.whiten(x, mask).flatten().tolist() == pytest.approx([-s, 0.0, s, 0.0])


def test_whitened_mean_is_0_and_variance_1():
    x = equations.whiten(random(3, 4) * 7 + 5, MASK)[MASK]
    assert x.mean().item() == pytest.approx(0, abs=1e-6)
    assert x.var(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_shaped_rewards_by_hand():
    logp, ref = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-2.0, -1.5, 0.0]])
    mask = torch.tensor([[True, True, False]])
    rewards = equations.shape_rewards(torch.tensor([3.0]), logp - ref, mask, 0.1)
    assert rewards.flatten().tolist() == pytest.approx([-0.1, 0.05 + 3.0, 0.0])


def test_kl_estimates_by_hand():
    logp, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.5])  # k1 = 1, -0.5
    assert equations.kl_estimate(logp, ref, "k1").tolist() == [1.0, -0.5]
    assert equations.kl_estimate(logp, ref, "k2").tolist() == [0.5, 0.125]
    assert equations.kl_estimate(logp, ref, "k3").tolist() == pytest.approx([math.exp(-1), math.exp(0.5) - 1.5])


def test_k1_and_k3_are_unbiased_for_the_exact_kl_and_k2_is_not():
    """By simulation: a million tokens from a distribution over 12; errors within 4 standard errors."""
    draw = torch.Generator().manual_seed(5)
    p, q = (torch.randn(12, generator=draw, dtype=torch.float64).mul(s).log_softmax(0) for s in (1.0, 0.7))
    exact = float((p.exp() * (p - q)).sum())
    tokens = torch.multinomial(p.exp(), 1_000_000, replacement=True, generator=draw)
    off = {}
    for kind in ("k1", "k2", "k3"):
        samples = equations.kl_estimate(p[tokens], q[tokens], kind)
        off[kind] = abs(float(samples.mean()) - exact) / float(samples.std() / 1000)
    assert off["k1"] < 4
    assert off["k3"] < 4
    assert off["k2"] > 10


def test_rloo_of_two_by_hand():
    """k = 2: each response is measured against the other, so a group's gradient is half their difference."""
    rewards = torch.tensor([[0.0, 5.0, 0.0], [1.0, 1.0, 0.0]])  # returns 5 and 2
    mask = torch.tensor([[True, True, False], [True, True, True]])
    advantages = equations.rloo(rewards, mask, 2)
    assert advantages.tolist() == [[3.0, 3.0, 0.0], [-3.0, -3.0, -3.0]]
    # (A_1 g_1 + A_2 g_2) / 2 = (R_1 - R_2)/2 (g_1 - g_2), with g_i = d log pi(y_i)
    assert (advantages[:, 0] / 2).tolist() == [(5 - 2) / 2, -(5 - 2) / 2]


def test_group_estimators_match_a_loop():
    rewards, mask = random(6, 3), torch.tensor([[True, True, True], [True, False, False]] * 3)
    rewards = rewards * mask
    totals = [sum(row) for row in rewards.tolist()]
    for start in (0, 3):
        group = totals[start : start + 3]
        mean = sum(group) / 3
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 2)
        for i, total in enumerate(group):
            rest = (sum(group) - total) / 2
            expected = {"rloo": total - rest, "grpo": (total - mean) / (std + 1e-4), "dr_grpo": total - mean}
            for name, value in expected.items():
                row = equations.CRITIC_FREE[name](rewards, mask, 3)[start + i]
                length = int(mask[start + i].sum())
                assert row.tolist() == pytest.approx([value] * length + [0.0] * (3 - length)), name


def test_reinforce_pp_is_the_whitened_reward_to_come():
    rewards = torch.tensor([[-1.0, 2.0], [3.0, 99.0]])
    mask = torch.tensor([[True, True], [True, False]])
    # to come: 1, 2 and 3; mean 2, variance 2/3
    s = math.sqrt(1.5)
    assert equations.reinforce_pp(rewards, mask, 1).flatten().tolist() == pytest.approx([-s, 0.0, s, 0.0])


def test_token_weights_by_hand():
    mask = torch.tensor([[True, True], [True, False]])
    assert equations.token_weights(mask, "gae", 8).flatten().tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert equations.token_weights(mask, "grpo", 8).flatten().tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 2, 0])
    assert equations.token_weights(mask, "dr_grpo", 8).flatten().tolist() == pytest.approx([1 / 16, 1 / 16, 1 / 16, 0])


def gae(rewards, values, mask, gamma, lam):
    """Advantages and returns, as rewards.py computes them."""
    advantages = equations.gae(equations.td_errors(rewards, values, mask, gamma), mask, gamma, lam)
    return advantages, (advantages + values) * mask


def test_td_errors_by_hand():
    # rewards 0, 1; values 0.5, 0.25; gamma 0.8: 0 + 0.8 * 0.25 - 0.5 and 1 - 0.25
    rewards, values = torch.tensor([[0.0, 1.0, 7.0]]), torch.tensor([[0.5, 0.25, 9.0]])
    mask = torch.tensor([[True, True, False]])
    assert equations.td_errors(rewards, values, mask, 0.8).flatten().tolist() == pytest.approx([-0.3, 0.75, 0.0])


def test_penalised_scores_by_hand():
    scores = equations.penalised_scores(torch.tensor([1.0, 2.0]), torch.tensor([True, False]), 0.5)
    assert scores.tolist() == [1.0, 1.5]


def test_gae_by_hand():
    # rewards 0, 1; values 0.5, 0.25; gamma 1, lambda 0.5: delta = -0.25, 0.75
    rewards, values = torch.tensor([[0.0, 1.0, 7.0]]), torch.tensor([[0.5, 0.25, 9.0]])
    mask = torch.tensor([[True, True, False]])
    advantages, returns = gae(rewards, values, mask, 1.0, 0.5)
    assert advantages.flatten().tolist() == pytest.approx([-0.25 + 0.5 * 0.75, 0.75, 0.0])
    assert returns.flatten().tolist() == pytest.approx([0.625, 1.0, 0.0])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.97, 1.0)])
def test_gae_matches_the_definition_as_a_sum(gamma, lam):
    rewards, values = random(3, 4), random(3, 4, seed=1)
    advantages, _ = gae(rewards * MASK, values, MASK, gamma, lam)
    for b, length in enumerate((4, 2, 1)):
        for t in range(length):
            total = 0.0
            for k in range(t, length):
                after = values[b, k + 1].item() if k + 1 < length else 0.0
                total += (gamma * lam) ** (k - t) * (rewards[b, k].item() + gamma * after - values[b, k].item())
            assert advantages[b, t].item() == pytest.approx(total, abs=1e-12)


def test_gae_with_lambda_1_is_return_minus_value():
    rewards, values = random(3, 4) * MASK, random(3, 4, seed=1)
    advantages, returns = gae(rewards, values, MASK, 1.0, 1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages, (to_go - values) * MASK)
    torch.testing.assert_close(returns, to_go * MASK)


def test_policy_loss_by_hand():
    ratio = torch.tensor([[1.0, 1.5, 1.5, 0.5, 0.5]])
    advantage = torch.tensor([[2.0, 2.0, -2.0, 2.0, -2.0]])
    logp = ratio.log().requires_grad_()
    losses, metrics = equations.policy_losses(logp, torch.zeros(1, 5), advantage, 0.2)
    assert losses.flatten().tolist() == pytest.approx([-2.0, -2.4, 3.0, -1.0, 1.6])
    assert metrics["clipped"].flatten().tolist() == [0, 1, 1, 1, 1]
    losses.sum().backward()
    # no gradient where clipping binds: a good token already likelier, a bad one already rarer
    assert logp.grad.flatten().tolist() == pytest.approx([-2.0, 0.0, 3.0, -1.0, 0.0])


def test_kl_to_old_is_0_without_an_update():
    _, metrics = equations.policy_losses(random(2, 3), random(2, 3), random(2, 3, seed=2), 0.2)
    assert metrics["kl_old"].abs().max() == 0
    assert (metrics["ratio"] == 1).all()


def test_value_loss_by_hand():
    values, old = torch.tensor([[1.0, 0.1, 1.0]]), torch.zeros(1, 3)
    returns = torch.tensor([[0.0, 1.0, 2.0]])
    # clipped values 0.2, 0.1, 0.2: the larger error of the two counts
    expected = [0.5 * 1.0, 0.5 * 0.81, 0.5 * 1.8**2]
    assert equations.value_losses(values, old, returns, 0.2).flatten().tolist() == pytest.approx(expected)


def test_adaptive_kl_by_hand():
    assert equations.next_kl_coef(0.2, 99.0, 0.0, 10000, 128) == 0.2  # fixed
    assert equations.next_kl_coef(0.2, 60.0, 6.0, 1000, 100) == pytest.approx(0.2 * 1.02)  # error clipped at 0.2
    assert equations.next_kl_coef(0.2, 5.4, 6.0, 1000, 100) == pytest.approx(0.2 * 0.99)


def test_explained_variance():
    returns = torch.tensor([[1.0, 2.0, 3.0, 50.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert equations.explained_variance(returns, returns, mask) == pytest.approx(1.0)
    assert equations.explained_variance(torch.full((1, 4), 2.0), returns, mask) == pytest.approx(0.0)


def test_a_shared_critic_reads_the_policys_states_and_moves_its_trunk():
    model, batch = small_model(), make_batch([([1, 5], [6, 7, 2]), ([1, 9, 9], [4, 2])])
    hidden = response_hidden(model, batch)
    head = ValueHead(model.config.hidden_size)
    assert not state_values(head, batch, hidden).any()  # before training
    with torch.no_grad():
        head.score.weight.copy_(torch.linspace(-1, 1, model.config.hidden_size))
    values = state_values(head, batch, hidden)
    alone = model(torch.tensor([1, 5, 6]), Packing([3]))[-1] @ head.score.weight[0]
    assert values[0, 1].item() == pytest.approx(alone.item(), abs=1e-5)
    assert values[1, 2] == 0  # no such token
    values.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
