"""Statistics of an evaluation: intervals, win rates, length control, calibration, variety."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Interval = tuple[float, float, float]
"""(value, low, high): an estimate and its 95 % interval."""


def bootstrap(values: ArrayLike, seed: int = 0, draws: int = 2000) -> Interval:
    """Mean of at least one value, with a 95 % interval: percentiles of the means of `draws` resamples."""
    x = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    return interval_of(x.mean(), x[rng.integers(0, len(x), (draws, len(x)))].mean(1))


def interval_of(value: float, draws: ArrayLike) -> Interval:
    """A value with the percentiles that bound 95 % of its draws."""
    low, high = np.quantile(np.asarray(draws), (0.025, 0.975))
    return float(value), float(low), float(high)


def win_rate(won: ArrayLike, seed: int | Sequence[int] = 0, draws: int = 2000) -> tuple[float, NDArray[np.float64]]:
    """The mean of at least one result 0, 1/2 or 1, and the means (draws,) of resamples, as in `bootstrap`.

    How many of each there are in a resample is drawn at once, so that a million results take no more memory than ten.
    """
    x = np.asarray(won, dtype=np.float64)
    kinds = np.array((0.0, 0.5, 1.0))
    shares = (x[:, None] == kinds).mean(0)
    counts = np.random.default_rng(seed).multinomial(len(x), shares, draws)  # (draws, 3)
    return float(x.mean()), counts @ kinds / len(x)


def wins(ours: ArrayLike, theirs: ArrayLike) -> NDArray[np.float64]:
    """For each prompt 1 if ours scores higher, 0 if theirs does, 1/2 for a tie. The mean is the win rate."""
    difference = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    return (np.sign(difference) + 1) / 2


def length_controlled(won: ArrayLike, ours: ArrayLike, theirs: ArrayLike) -> float:
    """The win rate at equal length, as in length-controlled AlpacaEval (2404.04475).

    Fits P(win) = sig(a + b x), where x is the difference in length divided by its standard deviation, and returns
    sig(a). The fit takes Newton steps, with a weak ridge penalty on b.

    Args:
        won: (n,), as from `wins`.
        ours, theirs: (n,), the lengths of the responses.
    """
    y = np.asarray(won, dtype=np.float64)
    x = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    x = x / (x.std() or 1.0)
    features = np.stack([np.ones_like(x), x], 1)  # (n, 2)
    ridge = np.diag([1e-6, 1.0])
    w = np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-(features @ w)))
        gradient = features.T @ (p - y) + ridge @ w
        hessian = features.T @ (features * (p * (1 - p) + 1e-9)[:, None]) + ridge
        step = np.linalg.solve(hessian, gradient)
        w -= np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-9:
            break
    return float(1 / (1 + np.exp(-w[0])))


def calibration_error(gaps: ArrayLike, bins: int = 10) -> float:
    """Expected calibration error of a reward model on labelled pairs (1706.04599), from gaps r_w - r_l in log-odds.

    The model bets sig(|gap|) on the response that it prefers. Bets are sorted into bins over [0.5, 1]. The result is
    the distance between the mean bet and the share of bets that were right, averaged over the bins with the number of
    pairs in each as its weight.
    """
    g = np.asarray(gaps, dtype=np.float64)
    bet, right = 1 / (1 + np.exp(-np.abs(g))), g > 0
    which = np.minimum(((bet - 0.5) * 2 * bins).astype(int), bins - 1)
    error = 0.0
    for i in range(bins):
        if (inside := which == i).any():
            error += inside.mean() * abs(bet[inside].mean() - right[inside].mean())
    return float(error)


def log_loss(gaps: ArrayLike) -> float:
    """Mean of -log sig(gap), in nats: the loss of a reward model per label. Gaps r_w - r_l are in log-odds."""
    return float(np.logaddexp(0, -np.asarray(gaps, dtype=np.float64)).mean())


def histogram(gaps: ArrayLike, width: float = 0.5, most: float = 4.0) -> list[tuple[float, int]]:
    """Counts of gaps in bins of this width: (left edge, count). Gaps beyond +-`most` count in the first or last bin."""
    g = np.clip(np.asarray(gaps, dtype=np.float64), -most, most - 1e-9)
    edges = np.arange(-most, most + width / 2, width)
    counts, _ = np.histogram(g, edges)
    return [(float(edge), int(n)) for edge, n in zip(edges[:-1], counts, strict=True)]


def distinct(responses: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams as a share of all n-grams in all responses (1510.03055). A low share means monotony."""
    grams = [tuple(r[i : i + n]) for r in responses for i in range(len(r) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def stratified(domains: Sequence[str], count: int) -> list[int]:
    """Indices of `count` rows, in ascending order, with as equal shares of the domains as their sizes allow."""
    groups: dict[str, list[int]] = {}
    for i, domain in enumerate(domains):
        groups.setdefault(domain, []).append(i)
    chosen: list[int] = []
    for turn in range(len(domains)):
        chosen += [group[turn] for group in groups.values() if turn < len(group)]
        if len(chosen) >= count:
            break
    return sorted(chosen[:count])
