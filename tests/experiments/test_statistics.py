"""The statistics of the claims, checked by hand and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from experiments.statistics import (
    T,
    at_kl,
    column,
    contrast,
    difference,
    hierarchical_bootstrap,
    path,
    t_interval,
    t_quantile,
    win,
)


def test_the_mean_weighs_seeds_alike_and_a_constant_has_no_interval():
    values = {1: np.array([1.0, 3.0]), 2: np.array([5.0, 5.0, 5.0, 5.0])}
    assert hierarchical_bootstrap(values)[0] == 3.5
    assert hierarchical_bootstrap({1: np.full(9, 0.2), 2: np.full(9, 0.2)}) == pytest.approx((0.2, 0.2, 0.2))


def test_the_interval_counts_both_seeds_and_prompts():
    """Five seeds with variance 4, each with 100 prompts of variance 100: the standard error of the mean is
    sqrt((4 + 100/100) / 5) = 1. The half-width of the interval, averaged over trials, is a little below 1.96, since
    five resampled seeds show only 4/5 of their variance."""
    rng = np.random.default_rng(3)
    widths = []
    for trial in range(60):
        centres = rng.normal(0, 2, 5)
        values = {s: rng.normal(c, 10, 100) for s, c in enumerate(centres)}
        _, low, high = hierarchical_bootstrap(values, seed=trial, draws=1000)
        widths.append((high - low) / 2)
    assert 1.5 < np.mean(widths) < 2.1


def test_five_seeds_with_one_value_each_cover_the_mean_about_83_percent_of_the_time():
    rng = np.random.default_rng(7)
    covered = []
    for trial in range(600):
        values = {seed: rng.normal(0, 1, 1) for seed in range(5)}
        _, low, high = hierarchical_bootstrap(values, seed=trial, draws=500)
        covered.append(low <= 0 <= high)
    assert 0.79 < np.mean(covered) < 0.87  # sqrt(0.83 * 0.17 / 600) = 0.015


def test_a_t_interval_by_hand():
    # mean 2, standard deviation 1: 4.303 / sqrt(3)
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.4843), abs=1e-4)
    assert t_interval([0.5, 0.5]) == (0.5, 0.0)


def test_the_quantiles_of_students_t_leave_5_percent_outside():
    for df in (*T, 10, 11, 19, 49):  # the table, and beyond it
        t = t_quantile(df)
        x = np.linspace(-t, t, 200_001)
        density = (1 + x**2 / df) ** (-(df + 1) / 2)
        density *= math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
        inside = (density.sum() - (density[0] + density[-1]) / 2) * (x[1] - x[0])
        assert inside == pytest.approx(0.95, abs=3e-5), df


def test_a_contrast_holds_fails_or_is_open():
    sure = {s: np.array([1.0, 1.1, 0.9]) for s in range(5)}
    assert contrast(sure).verdict == "holds"
    assert contrast({s: -v for s, v in sure.items()}).verdict == "fails"
    assert contrast({s: v * (1 if s % 2 else -1) for s, v in sure.items()}).verdict == "open"
    assert contrast(sure).per_seed[3] == pytest.approx(1.0)


def test_methods_are_paired_by_seed_and_prompt():
    ours = column([{"seed": 1, "golds": [1, 2]}, {"seed": 2, "golds": [5, 5]}], "golds")
    theirs = column([{"seed": 1, "golds": [1, 0]}], "golds")
    assert difference(ours, theirs)[1].tolist() == [0, 2]
    assert win(ours, theirs)[1].tolist() == [0.5, 1.0]
    assert list(difference(ours, theirs)) == [1]


def test_gold_at_a_kl_is_interpolated_along_the_path():
    row = {"kl": 2.0, "gold": 1.0, "path": {"160": {"kl": 1.5, "gold": 2.0}, "80": {"kl": 1.0, "gold": 1.5}}}
    points = path(row, [(0.0, 0.5)])
    assert points == [(0.0, 0.5), (1.0, 1.5), (1.5, 2.0), (2.0, 1.0)]
    assert at_kl(points, 0.5) == pytest.approx(1.0)
    assert at_kl(points, 1.75) == pytest.approx(1.5)
    assert at_kl(points, 9.0) == 1.0
