"""The reward-gap split: which pairs are easy, which are hard, and which contradict the reward model.

The paper (2403.19443) trains DPO on pairs with a large gap, and PPO on the prompts of pairs with a small one. It does
not say what happens to pairs with a negative gap. Here they are kept out of DPO, and their prompts go to PPO.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpo.data.rows import Row
from mpo.runtime.errors import InputError
from mpo.runtime.seeding import generator

DOUBT = (1e-6, 0.499999)  # the smallest and largest noise: exo_pair is not defined at 0, and robust not at 1/2


@dataclass(frozen=True)
class Split:
    """Row indices of each part, and the threshold that made them."""

    gamma: float
    easy: list[int]  # gap >= gamma, and above 0
    hard: list[int]  # the rest: |gap| < gamma, or a gap of 0
    contradicted: list[int]  # gap <= -gamma, and below 0

    @property
    def parts(self) -> dict[str, list[int]]:
        """The three parts by name."""
        return {"easy": self.easy, "hard": self.hard, "contradicted": self.contradicted}


def parse_gamma(gamma: str) -> tuple[bool, float]:
    """("q0.5" -> (True, 0.5), "1.5" -> (False, 1.5)): whether it is a quantile of |gap|, and the number.

    Raises InputError for anything else, a number that is not above 0, or a quantile that is not between 0 and 1.
    """
    is_quantile = gamma.startswith("q")
    try:
        number = float(gamma[is_quantile:])
        if 0 < number < (1 if is_quantile else math.inf):
            return is_quantile, number
    except ValueError:
        pass
    raise InputError(f"--gamma {gamma}: expected a number above 0, or a quantile of |gap| such as q0.5")


def threshold(gaps: Tensor, gamma: str) -> float:
    """The threshold that a --gamma flag asks for, given the gaps (N,); 0 for a quantile of gaps most of which are 0.

    Raises InputError (`parse_gamma`, `check_finite`).
    """
    is_quantile, number = parse_gamma(gamma)
    check_finite(gaps)
    return float(gaps.double().abs().quantile(number)) if is_quantile else number


def check_finite(gaps: Tensor) -> None:
    """Raise InputError for a gap that is not finite: it belongs to no part."""
    if bad := int((~gaps.isfinite()).sum()):
        raise InputError(f"{bad} of {len(gaps)} reward gaps are not finite numbers; train the reward model again")


def split_by_gap(gaps: Tensor, gamma: float) -> Split:
    """Easy, hard and contradicted by the gap r(chosen) - r(rejected), (N,). Every pair is in exactly one part.

    Raises InputError (`check_finite`).
    """
    check_finite(gaps)
    gaps = gaps.double()  # the threshold is one, too, and would be rounded to the type of the gaps
    easy, contradicted = (gaps >= gamma) & (gaps > 0), (gaps <= -gamma) & (gaps < 0)

    def where(condition: Tensor) -> list[int]:
        return condition.nonzero().flatten().tolist()

    return Split(gamma, where(easy), where(~(easy | contradicted)), where(contradicted))


def gap_over_uncertainty(gaps: Tensor) -> Tensor:
    """Gaps of K reward models (K, N) -> their mean over its standard error (N,), so that doubt makes a pair hard.

    Raises InputError for a single reward model, which cannot disagree with itself.
    """
    if len(gaps) < 2:
        raise InputError("--by uncertainty: needs two or more reward models: --rm folder,folder")
    gaps = gaps.double()  # squares and quotients of large gaps stay finite
    return gaps.mean(0) / (gaps.std(0) / len(gaps) ** 0.5).clamp(min=1e-6)


def control(split: Split, gaps: Tensor, kind: str, seed: int) -> Split:
    """A control: a split of the same pairs into parts of the same sizes, chosen in another way.

    random: at random. inverted: of the pairs that do not contradict the reward model, DPO gets those of smallest |gap|
    and PPO the rest; contradicted pairs stay where they are.
    """
    pairs = torch.tensor(sorted(split.easy + split.hard))
    if kind == "random":
        everything = torch.randperm(len(gaps), generator=generator(seed, "split")).tolist()
        easy, hard = len(split.easy), len(split.easy) + len(split.hard)
        return Split(split.gamma, *(sorted(p) for p in (everything[:easy], everything[easy:hard], everything[hard:])))
    order = pairs[gaps[pairs].abs().argsort(stable=True)].tolist()
    cut = len(split.easy)
    return Split(split.gamma, sorted(order[:cut]), sorted(order[cut:]), split.contradicted)


def assign(split: Split, rows: Sequence[Row], log_odds: Tensor, uses: Mapping[str, str]) -> tuple[list[Row], list[Row]]:
    """The pairs for DPO, and the rows whose prompts are for PPO, in row order.

    Args:
        rows: all N rows.
        log_odds: (N,), of each row's label, by the reward model.
        uses: part -> dpo (train on the pair), flip (on the pair with its label swapped), smooth (on the pair, with the
            probability that its label is wrong, for losses that use label noise), ppo (sample from its prompt), or
            drop. That probability is sig(-log_odds). A label that is more likely wrong than right is swapped, and the
            probability becomes sig(log_odds): a loss that weighs both labels stays the same.
    """
    use_of = {i: uses[name] for name, index in split.parts.items() for i in index}
    for_dpo, for_ppo = [], []
    for i, row in enumerate(rows):
        if use_of[i] == "dpo":
            for_dpo.append(row)
        elif use_of[i] == "flip":
            for_dpo.append(replace(row, chosen=row.rejected, rejected=row.chosen))
        elif use_of[i] == "smooth":
            noise = round(float(torch.sigmoid(-log_odds[i].abs()).clamp(*DOUBT)), 6)
            pair = (row.chosen, row.rejected) if log_odds[i] >= 0 else (row.rejected, row.chosen)
            for_dpo.append(replace(row, chosen=pair[0], rejected=pair[1], noise=noise))
        elif use_of[i] == "ppo":
            for_ppo.append(row)
    return for_dpo, for_ppo
