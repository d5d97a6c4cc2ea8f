"""Contrasts between methods over seeds and prompts, as docs/protocol.md defines them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo.evaluation import Interval, wins

Values = Mapping[int, NDArray[np.float64]]
"""Seed -> a value for each prompt, or a single value."""

DRAWS = 10_000


@dataclass(frozen=True)
class Contrast:
    """The mean of a paired difference with its 95 % interval, and its mean on each seed."""

    interval: Interval
    per_seed: dict[int, float]

    @property
    def verdict(self) -> str:
        """holds where the interval is above 0, fails where it is below, else open."""
        _, low, high = self.interval
        return "holds" if low > 0 else "fails" if high < 0 else "open"


def hierarchical_bootstrap(values: Values, seed: int = 0, draws: int = DRAWS) -> Interval:
    """Mean over seeds and prompts, with a percentile bootstrap's 95 % interval.

    Each draw resamples the seeds and, within each seed, its prompts. With five seeds of one value each, the interval
    is too narrow: it covers the true mean about 83 % of the time.
    """
    groups = list(values.values())
    rng = np.random.default_rng(seed)
    total = np.zeros(draws)
    for _ in groups:
        chosen = rng.integers(0, len(groups), draws)
        for i, group in enumerate(groups):
            at = np.flatnonzero(chosen == i)
            total[at] += group[rng.integers(0, len(group), (len(at), len(group)))].mean(1)
    low, high = np.quantile(total / len(groups), (0.025, 0.975))
    return float(np.mean([g.mean() for g in groups])), float(low), float(high)


# The 0.975 quantile of Student's t distribution, by degrees of freedom
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
Z = 1.959964  # the same of the normal distribution


def t_quantile(freedom: int) -> float:
    """The 0.975 quantile of Student's t: from the table or, beyond it, by expansion around the normal quantile.

    Source: Abramowitz and Stegun, 26.7.5, to the third order; the error is below 3e-4.
    """
    first, second = (Z**3 + Z) / 4, (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return T.get(freedom, Z + first / freedom + second / freedom**2 + third / freedom**3)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of two or more numbers, one for each seed, and half the width of its 95 % interval.

    That is t s / sqrt(n), with the standard deviation s and Student's t. Unlike a percentile bootstrap, it is not too
    narrow with few seeds.
    """
    n = len(values)
    return float(np.mean(values)), t_quantile(n - 1) * float(np.std(values, ddof=1)) / n**0.5


def contrast(values: Values) -> Contrast:
    """The contrast of paired differences by seed."""
    return Contrast(hierarchical_bootstrap(values), {seed: float(v.mean()) for seed, v in values.items()})


def column(rows: Sequence[Mapping[str, Any]], name: str) -> Values:
    """A column of a method's rows by seed: "golds", "rewards" or "kls"."""
    return {row["seed"]: np.asarray(row[name], dtype=np.float64) for row in rows}


def difference(ours: Values, theirs: Values) -> Values:
    """Ours less theirs, prompt by prompt, on the seeds that both have."""
    return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def win(ours: Values, theirs: Values) -> Values:
    """1 where ours is higher, 1/2 for a tie, 0 otherwise; prompt by prompt, on the seeds that both have."""
    return {seed: wins(ours[seed], theirs[seed]) for seed in ours if seed in theirs}


def path(
    row: Mapping[str, Any], before: Sequence[tuple[float, float]], name: str = "gold"
) -> list[tuple[float, float]]:
    """(KL, gold) points from the SFT model to the final policy, in the order of training.

    Args:
        row: the policy's row, with the intermediate models that were kept.
        before: the path to the model that the last stage started from, which begins at the SFT model.
        name: "gold" or "reward", the reward model's score.
    """
    kept = [(p["kl"], p[name]) for _, p in sorted(row["path"].items(), key=lambda item: int(item[0]))]
    return [*before, *kept, (row["kl"], row[name])]


def at_kl(points: Sequence[tuple[float, float]], kl: float) -> float:
    """Gold where a path first reaches this KL, interpolated linearly; the path's last gold if it never does."""
    for (kl_a, gold_a), (kl_b, gold_b) in itertools.pairwise(points):
        if kl_a <= kl <= kl_b and kl_b > kl_a:
            return gold_a + (gold_b - gold_a) * (kl - kl_a) / (kl_b - kl_a)
    return points[-1][1]
