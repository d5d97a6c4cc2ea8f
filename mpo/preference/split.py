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


@dataclass(frozen=True)
class Split:
    """Row indices of each part, and the threshold that made them."""

    gamma: float
    easy: list[int]  # gap >= gamma
    hard: list[int]  # |gap| < gamma
    contradicted: list[int]  # gap <= -gamma

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
    """The threshold that a --gamma flag asks for, given the gaps (N,). Raises InputError (`parse_gamma`)."""
    is_quantile, number = parse_gamma(gamma)
    return float(gaps.double().abs().quantile(number)) if is_quantile else number


def split_by_gap(gaps: Tensor, gamma: float) -> Split:
    """Easy, hard and contradicted by the gap r(chosen) - r(rejected), (N,)."""

    def where(condition: Tensor) -> list[int]:
        return condition.nonzero().flatten().tolist()

    return Split(gamma, where(gaps >= gamma), where(gaps.abs() < gamma), where(gaps <= -gamma))


def gap_over_uncertainty(gaps: Tensor) -> Tensor:
    """Gaps of K reward models (K, N) -> their mean over its standard error (N,), so that doubt makes a pair hard.

    Raises InputError for a single reward model, which cannot disagree with itself.
    """
    if len(gaps) < 2:
        raise InputError("--by uncertainty: needs two or more reward models: --rm folder,folder")
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
        uses: part -> dpo (train on the pair), flip (on the pair with its label swapped), smooth (on the pair, with
            sig(-log_odds) as the probability that its label is wrong, for losses that use label noise), ppo (sample
            from its prompt), or drop.
    """
    use_of = {i: uses[name] for name, index in split.parts.items() for i in index}
    for_dpo, for_ppo = [], []
    for i, row in enumerate(rows):
        if use_of[i] == "dpo":
            for_dpo.append(row)
        elif use_of[i] == "flip":
            for_dpo.append(replace(row, chosen=row.rejected, rejected=row.chosen))
        elif use_of[i] == "smooth":
            for_dpo.append(replace(row, noise=round(float(torch.sigmoid(-log_odds[i])), 6)))
        elif use_of[i] == "ppo":
            for_ppo.append(row)
    return for_dpo, for_ppo
