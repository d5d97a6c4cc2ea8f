"""Losses against numbers worked out by hand, finite differences and known identities, in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mpo.preference.losses import PREFERENCE_LOSSES, REFERENCE_FREE, PairLogps, bradley_terry, centring, pair_metrics

# Two pairs, with numbers chosen so that everything comes out round:
#   pair 1: s_w = 2, s_l = -2, D = 4, |w| = 2, |l| = 4;  pair 2: s_w = -1, s_l = 1, D = -2, |w| = 1, |l| = 2
# With beta = 1/4: beta D = 1, -1/2; beta s_w = 1/2, -1/4; beta s_l = -1/2, 1/4; 1/(2 beta) = 2.
BETA = 0.25


def pairs(chosen=(-3.0, -2.0), rejected=(-4.0, -1.0), ref_chosen=(-5.0, -1.0), ref_rejected=(-2.0, -2.0), **more):
    columns = (chosen, rejected, ref_chosen, ref_rejected, more.pop("w", (2, 1)), more.pop("l", (4, 2)))
    return PairLogps(*(torch.tensor(c, dtype=torch.float64) for c in columns), **more)


def sig(x):
    return 1 / (1 + math.exp(-x))


def nls(x):
    """-log sig(x), by the definition."""
    return math.log(1 + math.exp(-x))


def odds(p):
    return p / (1 - p)


BY_HAND = {
    "sigmoid": [0.3132616875, nls(-0.5)],  # ln(1 + 1/e)
    "cdpo": [0.9 * nls(1) + 0.1 * nls(-1), 0.9 * nls(-0.5) + 0.1 * nls(0.5)],
    "robust": [(0.9 * nls(1) - 0.1 * nls(-1)) / 0.8, (0.9 * nls(-0.5) - 0.1 * nls(0.5)) / 0.8],
    "hinge": [0.0, 1.5],
    "ipo": [4.0, 16.0],  # (4 - 2)^2, (-2 - 2)^2
    "ipo_mean": [(1 + 0.5 - 2) ** 2, (-1 - 0.5 - 2) ** 2],
    "exo_pair": [
        sig(x) * math.log(sig(x) / 0.999) + sig(-x) * math.log(sig(-x) / 0.001) for x in (1.0, -0.5)
    ],  # KL of (sig, 1 - sig) from (0.999, 0.001)
    "nca_pair": [nls(0.5) + 0.5 * nls(-0.5) + 0.5 * nls(0.5), nls(-0.25) + 0.5 * nls(0.25) + 0.5 * nls(-0.25)],
    "bco_pair": [2 * nls(0.5), 2 * nls(-0.25)],
    "sppo_hard": [0.0, 18.0],  # (2-2)^2 + (-2+2)^2, (-1-2)^2 + (1+2)^2
    # policy log-ratios 1, -1 sorted: -1, 1; reference's -3, 1 sorted: -3, 1; differences 2, 0
    "aot": [nls(0.5), math.log(2)],
    # s_w sorted: -1, 2; s_l sorted: -2, 1; differences 1, 1
    "aot_unpaired": [nls(0.25), nls(0.25)],
    "apo_zero": [2 * sig(-0.5), 2 * sig(0.25)],
    "apo_down": [sig(0.5) + sig(-1), sig(-0.25) + sig(0.5)],
    # m = sig(20) and sig(-10): all but the exponential, all but the logistic
    "discopop": [
        (1 - sig(20)) * nls(1) + sig(20) * math.exp(-1),
        (1 - sig(-10)) * nls(-0.5) + sig(-10) * math.exp(0.5),
    ],
    "simpo": [nls(0.25 * (-1.5 + 1) - 0.5), nls(0.25 * (-2 + 0.5) - 0.5)],
    "orpo": [
        1.5 + 0.1 * nls(math.log(odds(math.exp(-1.5)) / odds(math.exp(-1)))),
        2.0 + 0.1 * nls(math.log(odds(math.exp(-2)) / odds(math.exp(-0.5)))),
    ],
    "cpo": [nls(0.25 * 1) + 1.5, nls(0.25 * -1) + 2.0],
    "rpo": [nls(1) + 1.5, nls(-0.5) + 2.0],
    # baselines: mean s_w = 1/2, mean s_l = -1/2 -> 0
    "kto": [2 - sig(0.5) - sig(0.25 * (0.5 + 2)), 2 - sig(-0.25) - sig(0.25 * (0.5 - 1))],
    "sft": [1.5, 2.0],
}


def test_every_loss_has_a_number_worked_out_by_hand():
    assert BY_HAND.keys() == PREFERENCE_LOSSES.keys()


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_by_hand(name):
    assert PREFERENCE_LOSSES[name](pairs(), BETA).tolist() == pytest.approx(BY_HAND[name], rel=1e-9)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_gradients_are_finite_differences(name):
    # no ties and hinge off its kink; all log-ratios below 0, since kto's baselines, constants to the
    # gradient, are then clamped to 0
    chosen = torch.tensor([-5.5, -2.75], dtype=torch.float64)
    rejected = torch.tensor([-4.25, -2.5], dtype=torch.float64)
    leaves = [chosen.clone().requires_grad_(), rejected.clone().requires_grad_()]
    p = pairs()
    PREFERENCE_LOSSES[name](replace(p, chosen=leaves[0], rejected=leaves[1]), BETA).sum().backward()
    h = 1e-6
    for which, leaf in enumerate(leaves):
        gradient = torch.zeros(2, dtype=torch.float64) if leaf.grad is None else leaf.grad
        for i in range(2):
            moved = []
            for sign in (1, -1):
                values = [chosen.clone(), rejected.clone()]
                values[which][i] += sign * h
                moved.append(PREFERENCE_LOSSES[name](replace(p, chosen=values[0], rejected=values[1]), BETA).sum())
            assert gradient[i].item() == pytest.approx((moved[0] - moved[1]).item() / (2 * h), abs=1e-7)


@pytest.mark.parametrize("name", sorted(PREFERENCE_LOSSES.keys() - {"sft", "discopop"}))
def test_every_loss_prefers_the_chosen_response(name):
    """At the start, a gradient step makes chosen more likely relative to rejected."""
    start = pairs((-3.0, -2.0), (-4.0, -1.0), (-3.0, -2.0), (-4.0, -1.0))
    leaves = [start.chosen.clone().requires_grad_(), start.rejected.clone().requires_grad_()]
    PREFERENCE_LOSSES[name](replace(start, chosen=leaves[0], rejected=leaves[1]), BETA).sum().backward()
    rejected = torch.zeros(2) if leaves[1].grad is None else leaves[1].grad
    assert (leaves[0].grad - rejected < 0).all()


@pytest.mark.parametrize("name", ["sigmoid", "cdpo", "robust", "aot", "aot_unpaired"])
def test_logistic_losses_are_ln_2_at_step_0(name):
    start = pairs((-3.0, -50.0), (-4.0, -2.0), (-3.0, -50.0), (-4.0, -2.0))
    assert PREFERENCE_LOSSES[name](start, 0.3).tolist() == pytest.approx([math.log(2)] * 2)


def test_identities():
    p = pairs()
    dpo = PREFERENCE_LOSSES["sigmoid"](p, BETA)
    for name in ("cdpo", "robust"):
        torch.testing.assert_close(PREFERENCE_LOSSES[name](p, BETA, e=0.0), dpo)
    torch.testing.assert_close(PREFERENCE_LOSSES["rpo"](p, BETA, alpha=0.0), dpo)
    one = PairLogps(*(t[:1] for t in list(vars(p).values())[:6]))
    torch.testing.assert_close(PREFERENCE_LOSSES["aot"](one, BETA), dpo[:1])  # one pair: nothing to sort


def test_ipo_is_smallest_where_the_difference_is_half_over_beta():
    differences = torch.linspace(0, 4, 401, dtype=torch.float64)
    zeros, ones = torch.zeros_like(differences), torch.ones_like(differences)
    losses = PREFERENCE_LOSSES["ipo"](PairLogps(differences, zeros, zeros, zeros, ones, ones), BETA)
    assert differences[losses.argmin()].item() == pytest.approx(1 / (2 * BETA))
    assert losses.min().item() == pytest.approx(0)


def test_robust_is_unbiased_under_flipped_labels():
    """E over a label that is wrong with probability e is DPO's loss on the right label (2403.00409)."""
    p, e = pairs(), 0.2
    flipped = PairLogps(p.rejected, p.chosen, p.ref_rejected, p.ref_chosen, p.rejected_len, p.chosen_len)
    robust = PREFERENCE_LOSSES["robust"]
    expected = (1 - e) * robust(p, BETA, e=e) + e * robust(flipped, BETA, e=e)
    torch.testing.assert_close(expected, PREFERENCE_LOSSES["sigmoid"](p, BETA))


def test_exo_is_smallest_at_the_smoothed_label():
    x = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    zeros, ones = torch.zeros_like(x), torch.ones_like(x)
    losses = PREFERENCE_LOSSES["exo_pair"](PairLogps(x, zeros, zeros, zeros, ones, ones), 1.0, e=0.1)
    assert x[losses.argmin()].item() == pytest.approx(math.log(9), abs=0.01)  # sig(x) = 0.9
    assert losses.min().item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("log_ratio", [-2.3714, 1.44012])
def test_discopop_has_the_two_local_optima_of_its_paper(log_ratio):
    """At beta = 0.05; between them the slope has the wrong sign, also at 0 (2406.08414)."""
    d = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1), torch.ones(1)
    PREFERENCE_LOSSES["discopop"](PairLogps(d, zero, zero, zero, one, one), 0.05).sum().backward()
    assert d.grad.item() == pytest.approx(0, abs=1e-5)


def test_bco_is_shifted_by_the_running_mean():
    p = pairs(mean_log_ratio=0.4)  # d = 0.1
    expected = [nls(0.5 - 0.1) + nls(0.5 + 0.1), nls(-0.25 - 0.1) + nls(-0.25 + 0.1)]
    assert PREFERENCE_LOSSES["bco_pair"](p, BETA).tolist() == pytest.approx(expected)


def test_the_noise_of_a_row_comes_before_that_of_the_flag():
    p = pairs(noise=torch.tensor([0.3, math.nan], dtype=torch.float64))
    expected = [0.7 * nls(1) + 0.3 * nls(-1), 0.8 * nls(-0.5) + 0.2 * nls(0.5)]
    assert PREFERENCE_LOSSES["cdpo"](p, BETA, e=0.2).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", sorted(REFERENCE_FREE))
def test_reference_free_losses_do_not_look_at_a_reference(name):
    p = pairs()
    other = replace(p, ref_chosen=p.ref_chosen + 7, ref_rejected=p.ref_rejected - 3)
    torch.testing.assert_close(PREFERENCE_LOSSES[name](p, BETA), PREFERENCE_LOSSES[name](other, BETA))


def test_reference_based_losses_do():
    p = pairs()
    other = replace(p, ref_chosen=p.ref_chosen + 7, ref_rejected=p.ref_rejected - 3)
    for name in PREFERENCE_LOSSES.keys() - REFERENCE_FREE:
        assert not torch.equal(PREFERENCE_LOSSES[name](p, BETA), PREFERENCE_LOSSES[name](other, BETA)), name


@pytest.mark.parametrize("name", sorted(PREFERENCE_LOSSES.keys() - {"discopop", "sppo_hard", "ipo", "ipo_mean"}))
def test_extreme_log_probs_give_finite_losses(name):
    p = pairs((-1e4, -1e-9), (-1e-9, -1e4), (-1.0, -1.0), (-1.0, -1.0))
    assert PREFERENCE_LOSSES[name](p, BETA).isfinite().all()


def test_bradley_terry_by_hand():
    chosen, rejected = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1.0, 0.0, 1.0])
    # gaps 1, 0, -2: ln(1 + e^-1), ln 2, ln(1 + e^2)
    assert bradley_terry(chosen, rejected).tolist() == pytest.approx([0.3132617, 0.6931472, 2.1269280])
    # a margin of 1 turns them into 0, -1, -3
    expected = [0.6931472, 1.3132617, 3.0485874]
    assert bradley_terry(chosen, rejected, torch.ones(3)).tolist() == pytest.approx(expected)
    # one label in ten wrong: 0.9 of the first list, 0.1 of that of the opposite gaps
    expected = [0.9 * 0.3132617 + 0.1 * 1.3132617, 0.6931472, 0.9 * 2.1269280 + 0.1 * 0.1269280]
    assert bradley_terry(chosen, rejected, e=0.1).tolist() == pytest.approx(expected)


def test_centring_by_hand():
    assert centring(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0])).tolist() == [9.0, 0.0]


def test_pair_metrics_by_hand():
    m = pair_metrics(pairs((-3.0, -6.0), (-4.0, -1.0), (-5.0, -5.0), (-2.0, -1.0)), 0.5)
    assert m["reward_chosen"].tolist() == [1.0, -0.5]
    assert m["reward_rejected"].tolist() == [-1.0, 0.0]
    assert m["reward_margin"].tolist() == [2.0, -0.5]
    assert m["accuracy"].tolist() == [1.0, 0.0]
