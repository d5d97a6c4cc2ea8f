"""The reward-gap split: which pairs are easy, which hard, which contradict the reward model.

The paper (2403.19443) trains DPO on pairs with a large gap and PPO on prompts of pairs with a
small one. It does not say what happens to pairs with a negative gap; keeping them out of DPO
and their prompts in PPO is our choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpo.data.rows import Row
from mpo.errors import InputError
from mpo.randomness import generator


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


def threshold(gaps: Tensor, gamma: str) -> float:
    """gamma as a number, or for "qX" the X quantile of |gap|.

    Errors: InputError for anything else, or a number that is not above 0.
    """
    try:
        if gamma.startswith("q"):
            share = float(gamma[1:])
            if 0 < share < 1:
                return float(gaps.double().abs().quantile(share))
        elif 0 < float(gamma) < math.inf:
            return float(gamma)
    except ValueError:
        pass
    raise InputError(f"--gamma {gamma}: expected a number above 0, or a quantile of |gap| such as q0.5")


def split_by_gap(gaps: Tensor, gamma: float) -> Split:
    """Easy, hard and contradicted by the gap r(chosen) - r(rejected), (N,)."""

    def where(condition: Tensor) -> list[int]:
        return condition.nonzero().flatten().tolist()

    return Split(gamma, where(gaps >= gamma), where(gaps.abs() < gamma), where(gaps <= -gamma))


def gap_over_uncertainty(gaps: Tensor) -> Tensor:
    """(K, N) gaps of K reward models -> (N,): mean over standard error, so that doubt makes a pair hard.

    Errors: InputError where there is one reward model, which cannot disagree with itself.
    """
    if len(gaps) < 2:
        raise InputError("--by uncertainty: needs two or more reward models: --rm folder,folder")
    return gaps.mean(0) / (gaps.std(0) / len(gaps) ** 0.5).clamp(min=1e-6)


def control(split: Split, gaps: Tensor, kind: str, seed: int) -> Split:
    """A split with parts of the same sizes as `split`, but another order of the same pairs.

    random: shuffled. inverted: DPO gets the pairs of smallest |gap| among those that do not
    contradict the reward model, PPO the rest; contradicted pairs stay where they are.
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
    """What each part is used for -> (pairs for DPO, rows whose prompts are for PPO), in row order.

    `uses`: part -> dpo (train on the pair), flip (on the pair with its label turned round), smooth
    (on the pair, with the reward model's probability that the label is wrong, sig(-log_odds), for
    the losses that know label noise), ppo (its prompt), or drop. log_odds (N,): of the label.
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
