"""The split by reward gap and its controls."""

from __future__ import annotations

import math

import pytest
import torch

from mpo.data.rows import Row
from mpo.preference.split import assign, control, gap_over_uncertainty, split_by_gap, threshold
from mpo.runtime.errors import InputError

GAPS = torch.tensor([2.0, -0.5, 0.5, -2.0, 1.0, 0.0, -1.0, 0.9])


def test_the_parts_by_hand():
    split = split_by_gap(GAPS, 1.0)
    assert split.easy == [0, 4]  # gap >= 1
    assert split.hard == [1, 2, 5, 7]  # |gap| < 1
    assert split.contradicted == [3, 6]  # gap <= -1


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
    # gap -0.5, log-odds -1: the reward model finds this label wrong with probability sig(1)
    assert (smoothed.chosen, smoothed.noise) == ("w1", pytest.approx(1 / (1 + math.exp(-1)), abs=1e-6))


def test_gap_over_uncertainty_by_hand():
    gaps = torch.tensor([[1.0, 2.0, -1.0], [3.0, 2.5, -1.0]])
    # means 2, 2.25, -1; standard errors |difference| / 2: 1, 0.25, 0
    z = gap_over_uncertainty(gaps)
    assert z[:2].tolist() == pytest.approx([2.0, 9.0])
    assert z[2] < -1e5
    with pytest.raises(InputError, match="two or more reward models"):
        gap_over_uncertainty(gaps[:1])
