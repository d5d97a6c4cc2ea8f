"""The split by reward gap and its controls."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo.data.rows import Row, read_rows, write_rows
from mpo.preference.losses import NOISE_AWARE, PREFERENCE_LOSSES, PairLogps
from mpo.preference.split import assign, control, gap_over_uncertainty, split_by_gap, threshold
from mpo.runtime.errors import InputError

GAPS = torch.tensor([2.0, -0.5, 0.5, -2.0, 1.0, 0.0, -1.0, 0.9])


def test_the_parts_by_hand():
    split = split_by_gap(GAPS, 1.0)
    assert split.easy == [0, 4]  # gap >= 1
    assert split.hard == [1, 2, 5, 7]  # |gap| < 1
    assert split.contradicted == [3, 6]  # gap <= -1


def test_a_gap_of_zero_is_hard_even_if_gamma_is_zero():
    gaps = torch.tensor([0.0, 0.0, -0.0, 0.0, 3.0, -2.0])
    split = split_by_gap(gaps, threshold(gaps, "q0.5"))  # the median of |gap| is 0
    assert (split.gamma, split.easy, split.hard, split.contradicted) == (0, [4], [0, 1, 2, 3], [5])


VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 3.4e38, -3.4e38]) | st.floats(allow_nan=False, width=32)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(VALUES.filter(math.isfinite), min_size=1, max_size=20),
    st.sampled_from(["q0.01", "q0.5", "q0.99", "0.7", "1e-300", "1e300"]),
)
def test_every_pair_is_in_exactly_one_part(values, gamma):
    gaps = torch.tensor(values)
    split = split_by_gap(gaps, threshold(gaps, gamma))
    assert sorted(split.easy + split.hard + split.contradicted) == list(range(len(values)))
    assert all(gaps[i] > 0 and gaps[i] >= split.gamma for i in split.easy)
    assert all(gaps[i] < 0 and -gaps[i] >= split.gamma for i in split.contradicted)
    assert all(gaps[i] == 0 or abs(float(gaps[i])) < split.gamma for i in split.hard)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gaps_that_are_not_finite_are_refused(bad):
    gaps = torch.tensor([1.0, bad, 0.0])
    for refused in (lambda: threshold(gaps, "q0.5"), lambda: split_by_gap(gaps, 1.0)):
        with pytest.raises(InputError, match="1 of 3 reward gaps are not finite"):
            refused()


def test_gamma_as_a_number_and_as_a_quantile():
    assert threshold(GAPS, "0.7") == 0.7
    # |gap| sorted: 0, .5, .5, .9, 1, 1, 2, 2; the median lies between .9 and 1
    assert threshold(GAPS, "q0.5") == pytest.approx(0.95)


@pytest.mark.parametrize("gamma", ["0", "-1", "q0", "q1", "q", "median", "nan", ""])
def test_gamma_that_makes_no_sense(gamma):
    with pytest.raises(InputError, match="--gamma"):
        threshold(GAPS, gamma)


@pytest.mark.parametrize("kind", ["random", "inverted"])
def test_controls_have_the_same_sizes_and_lose_no_pair(kind):
    split = split_by_gap(GAPS, 1.0)
    other = control(split, GAPS, kind, seed=1)
    for name in ("easy", "hard", "contradicted"):
        assert len(getattr(other, name)) == len(getattr(split, name))
    assert sorted(other.easy + other.hard + other.contradicted) == list(range(8))


def test_inverted_gives_dpo_the_smallest_gaps():
    other = control(split_by_gap(GAPS, 1.0), GAPS, "inverted", seed=1)
    assert other.easy == [1, 5] or other.easy == [2, 5]  # |gap| 0 and .5
    assert other.contradicted == [3, 6]


def test_random_depends_on_the_seed():
    gaps = torch.linspace(-3, 3, 200)
    split = split_by_gap(gaps, 1.0)
    one, two = control(split, gaps, "random", 1), control(split, gaps, "random", 2)
    assert one.easy != two.easy
    assert one == control(split, gaps, "random", 1)


ROWS = [Row(str(i), f"p{i}", f"w{i}", f"l{i}") for i in range(len(GAPS))]
DEFAULT = {"easy": "dpo", "hard": "ppo", "contradicted": "ppo"}


def test_by_default_easy_pairs_go_to_dpo_and_the_other_prompts_to_ppo():
    for_dpo, for_ppo = assign(split_by_gap(GAPS, 1.0), ROWS, GAPS, DEFAULT)
    assert [r.id for r in for_dpo] == ["0", "4"]
    assert [r.id for r in for_ppo] == ["1", "2", "3", "5", "6", "7"]
    assert for_dpo == [ROWS[0], ROWS[4]]


def test_flip_smooth_and_drop():
    uses = {"easy": "drop", "hard": "smooth", "contradicted": "flip"}
    for_dpo, for_ppo = assign(split_by_gap(GAPS, 1.0), ROWS, 2 * GAPS, uses)
    assert for_ppo == []
    assert [r.id for r in for_dpo] == ["1", "2", "3", "5", "6", "7"]
    flipped, smoothed = for_dpo[2], for_dpo[0]
    assert (flipped.chosen, flipped.rejected, flipped.noise) == ("l3", "w3", None)
    # gap -0.5, log-odds -1: the reward model finds this label wrong with probability sig(1), and swapped with sig(-1)
    assert (smoothed.chosen, smoothed.rejected) == ("l1", "w1")
    assert smoothed.noise == pytest.approx(1 / (1 + math.exp(1)), abs=1e-6)
    # gap 0.5, log-odds 1: the label is more likely right, and stays
    assert (for_dpo[1].chosen, for_dpo[1].noise) == ("w2", smoothed.noise)


def test_smoothed_rows_can_be_read_whatever_the_reward_model_thinks(tmp_path):
    uses = dict.fromkeys(("easy", "hard", "contradicted"), "smooth")
    log_odds = torch.tensor([0.0, 1e-9, -1e-9, 100.0, -100.0, 3.0, -3.0, 1e30])
    for_dpo, _ = assign(split_by_gap(GAPS, 1.0), ROWS, log_odds, uses)
    write_rows(tmp_path / "rows.jsonl", for_dpo)
    read = read_rows(tmp_path / "rows.jsonl")
    assert read == for_dpo
    assert all(0 < row.noise < 0.5 for row in read)


@pytest.mark.parametrize("name", sorted(NOISE_AWARE))
def test_swapping_a_doubted_label_leaves_the_loss_as_it_is(name):
    s_w, s_l = torch.tensor([0.3, -2.0], dtype=torch.double), torch.tensor([1.1, 0.4], dtype=torch.double)
    zero, one, noise = torch.zeros(2).double(), torch.ones(2).double(), torch.tensor([0.8, 0.6]).double()
    loss = PREFERENCE_LOSSES[name]
    kept = loss(PairLogps(s_w, s_l, zero, zero, one, one, noise), beta=0.5)
    swapped = loss(PairLogps(s_l, s_w, zero, zero, one, one, 1 - noise), beta=0.5)
    torch.testing.assert_close(kept, swapped)


def test_gap_over_uncertainty_by_hand():
    gaps = torch.tensor([[1.0, 2.0, -1.0], [3.0, 2.5, -1.0]])
    # means 2, 2.25, -1; standard errors |difference| / 2: 1, 0.25, 0
    z = gap_over_uncertainty(gaps)
    assert z[:2].tolist() == pytest.approx([2.0, 9.0])
    assert z[2] < -1e5
    with pytest.raises(InputError, match="two or more reward models"):
        gap_over_uncertainty(gaps[:1])
