"""The equations of PPO against calculations by hand and independent loops in float64."""

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


def test_the_masked_mean_and_whitening_match_a_calculation_by_hand():
    x = torch.tensor([[1.0, 3.0], [5.0, 99.0]])
    mask = torch.tensor([[True, True], [True, False]])
    assert equations.masked_mean(x, mask).item() == 3.0
    assert equations.masked_mean(x, torch.zeros_like(mask)).item() == 0.0
    # deviations -2, 0, 2; variance 8/3
    s = 2 / math.sqrt(8 / 3)
    assert equations.whiten(x, mask).flatten().tolist() == pytest.approx([-s, 0.0, s, 0.0])


def test_whitened_values_have_mean_0_and_variance_1():
    x = equations.whiten(random(3, 4) * 7 + 5, MASK)[MASK]
    assert x.mean().item() == pytest.approx(0, abs=1e-6)
    assert x.var(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_shaped_rewards_match_a_calculation_by_hand():
    logp, ref = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-2.0, -1.5, 0.0]])
    mask = torch.tensor([[True, True, False]])
    rewards = equations.shape_rewards(torch.tensor([3.0]), logp - ref, mask, 0.1)
    assert rewards.flatten().tolist() == pytest.approx([-0.1, 0.05 + 3.0, 0.0])


def test_kl_estimates_match_a_calculation_by_hand():
    logp, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.5])  # k1 = 1, -0.5
    assert equations.kl_estimate(logp, ref, "k1").tolist() == [1.0, -0.5]
    assert equations.kl_estimate(logp, ref, "k2").tolist() == [0.5, 0.125]
    assert equations.kl_estimate(logp, ref, "k3").tolist() == pytest.approx([math.exp(-1), math.exp(0.5) - 1.5])


def test_k1_and_k3_are_unbiased_for_the_exact_kl_and_k2_is_not():
    """A million tokens are sampled from a distribution over 12. An unbiased estimate is within 4 standard errors."""
    draw = torch.Generator().manual_seed(5)
    p, q = (torch.randn(12, generator=draw, dtype=torch.float64).mul(s).log_softmax(0) for s in (1.0, 0.7))
    exact = float((p.exp() * (p - q)).sum())
    tokens = torch.multinomial(p.exp(), 1_000_000, replacement=True, generator=draw)
    errors = {}  # in standard errors
    for kind in ("k1", "k2", "k3"):
        samples = equations.kl_estimate(p[tokens], q[tokens], kind)
        errors[kind] = abs(float(samples.mean()) - exact) / float(samples.std() / 1000)
    assert errors["k1"] < 4
    assert errors["k3"] < 4
    assert errors["k2"] > 10


def test_rloo_with_two_responses_matches_a_calculation_by_hand():
    """Each response is the baseline of the other, so the gradient of a group is weighted by half their difference."""
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


def test_reinforce_pp_whitens_the_sum_of_the_rewards_still_to_come():
    rewards = torch.tensor([[-1.0, 2.0], [3.0, 99.0]])
    mask = torch.tensor([[True, True], [True, False]])
    # sums of the rewards still to come: 1, 2 and 3; mean 2, variance 2/3
    s = math.sqrt(1.5)
    assert equations.reinforce_pp(rewards, mask, 1).flatten().tolist() == pytest.approx([-s, 0.0, s, 0.0])


def test_token_weights_match_a_calculation_by_hand():
    mask = torch.tensor([[True, True], [True, False]])
    assert equations.token_weights(mask, "gae", 8).flatten().tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert equations.token_weights(mask, "grpo", 8).flatten().tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 2, 0])
    assert equations.token_weights(mask, "dr_grpo", 8).flatten().tolist() == pytest.approx([1 / 16, 1 / 16, 1 / 16, 0])


def gae(rewards, values, mask, gamma, lam):
    """Advantages and returns, combined from the equations as rewards.py does it."""
    advantages = equations.gae(equations.td_errors(rewards, values, mask, gamma), mask, gamma, lam)
    return advantages, (advantages + values) * mask


def test_td_errors_match_a_calculation_by_hand():
    # rewards 0, 1; values 0.5, 0.25; gamma 0.8: 0 + 0.8 * 0.25 - 0.5 and 1 - 0.25
    rewards, values = torch.tensor([[0.0, 1.0, 7.0]]), torch.tensor([[0.5, 0.25, 9.0]])
    mask = torch.tensor([[True, True, False]])
    assert equations.td_errors(rewards, values, mask, 0.8).flatten().tolist() == pytest.approx([-0.3, 0.75, 0.0])


def test_only_a_response_without_eos_is_penalised():
    scores = equations.penalised_scores(torch.tensor([1.0, 2.0]), torch.tensor([True, False]), 0.5)
    assert scores.tolist() == [1.0, 1.5]


def test_gae_matches_a_calculation_by_hand():
    # rewards 0, 1; values 0.5, 0.25; gamma 1, lambda 0.5: delta = -0.25, 0.75
    rewards, values = torch.tensor([[0.0, 1.0, 7.0]]), torch.tensor([[0.5, 0.25, 9.0]])
    mask = torch.tensor([[True, True, False]])
    advantages, returns = gae(rewards, values, mask, 1.0, 0.5)
    assert advantages.flatten().tolist() == pytest.approx([-0.25 + 0.5 * 0.75, 0.75, 0.0])
    assert returns.flatten().tolist() == pytest.approx([0.625, 1.0, 0.0])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.97, 1.0)])
def test_gae_matches_its_definition_as_a_sum(gamma, lam):
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


def test_the_policy_loss_matches_a_calculation_by_hand():
    ratio = torch.tensor([[1.0, 1.5, 1.5, 0.5, 0.5]])
    advantage = torch.tensor([[2.0, 2.0, -2.0, 2.0, -2.0]])
    logp = ratio.log().requires_grad_()
    losses, metrics = equations.policy_losses(logp, torch.zeros(1, 5), advantage, 0.2)
    assert losses.flatten().tolist() == pytest.approx([-2.0, -2.4, 3.0, -1.0, 1.6])
    assert metrics["clipped"].flatten().tolist() == [0, 1, 1, 1, 1]
    losses.sum().backward()
    # No gradient where clipping takes effect: for a good token that is already likelier, and a bad one already rarer.
    assert logp.grad.flatten().tolist() == pytest.approx([-2.0, 0.0, 3.0, -1.0, 0.0])


def test_the_kl_to_the_old_policy_is_0_without_an_update():
    _, metrics = equations.policy_losses(random(2, 3), random(2, 3), random(2, 3, seed=2), 0.2)
    assert metrics["kl_old"].abs().max() == 0
    assert (metrics["ratio"] == 1).all()


def test_the_value_loss_matches_a_calculation_by_hand():
    values, old = torch.tensor([[1.0, 0.1, 1.0]]), torch.zeros(1, 3)
    returns = torch.tensor([[0.0, 1.0, 2.0]])
    # The clipped values are 0.2, 0.1, 0.2. The loss is the larger of the errors with and without clipping.
    expected = [0.5 * 1.0, 0.5 * 0.81, 0.5 * 1.8**2]
    assert equations.value_losses(values, old, returns, 0.2).flatten().tolist() == pytest.approx(expected)


def test_the_adaptive_kl_coefficient_matches_a_calculation_by_hand():
    assert equations.next_kl_coef(0.2, 99.0, 0.0, 10000, 128) == 0.2  # without a target it stays fixed
    assert equations.next_kl_coef(0.2, 60.0, 6.0, 1000, 100) == pytest.approx(0.2 * 1.02)  # the error is clipped to 0.2
    assert equations.next_kl_coef(0.2, 5.4, 6.0, 1000, 100) == pytest.approx(0.2 * 0.99)


def test_explained_variance_is_1_for_exact_values_and_0_for_constant_ones():
    returns = torch.tensor([[1.0, 2.0, 3.0, 50.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert equations.explained_variance(returns, returns, mask) == pytest.approx(1.0)
    assert equations.explained_variance(torch.full((1, 4), 2.0), returns, mask) == pytest.approx(0.0)


def test_a_shared_critic_reads_the_policys_hidden_states_and_trains_its_layers():
    model, batch = small_model(), make_batch([([1, 5], [6, 7, 2]), ([1, 9, 9], [4, 2])])
    hidden = response_hidden(model, batch)
    head = ValueHead(model.config.hidden_size)
    assert not state_values(head, batch, hidden).any()  # all values are 0 before training
    with torch.no_grad():
        head.score.weight.copy_(torch.linspace(-1, 1, model.config.hidden_size))
    values = state_values(head, batch, hidden)
    alone = model(torch.tensor([1, 5, 6]), Packing([3]))[-1] @ head.score.weight[0]
    assert values[0, 1].item() == pytest.approx(alone.item(), abs=1e-5)
    assert values[1, 2] == 0  # past the end of the second response
    values.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
