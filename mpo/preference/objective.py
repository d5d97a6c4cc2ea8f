"""From a --loss flag to the objective: one preference loss, or a weighted sum of several.

Examples: sigmoid    sigmoid+0.1*sft    simpo:beta=2.5:gamma=0.5    0.8*sigmoid+0.2*bco_pair+0.1*sft
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from dataclasses import dataclass

from torch import Tensor

from mpo.preference.losses import NOISE_AWARE, PREFERENCE_LOSSES, REFERENCE_FREE, WHOLE_BATCH, PairLogps, PreferenceLoss
from mpo.runtime.errors import InputError


@dataclass(frozen=True)
class Term:
    """One term of an objective: weight * loss(pairs, beta, **constants)"""

    name: str
    weight: float
    constants: dict[str, float]

    @property
    def loss(self) -> PreferenceLoss:
        """The function with this name."""
        return PREFERENCE_LOSSES[self.name]


@dataclass(frozen=True)
class Objective:
    """A weighted sum of preference losses."""

    terms: tuple[Term, ...]
    beta: float

    @property
    def reference_free(self) -> bool:
        """True if no term needs a reference model."""
        return all(term.name in REFERENCE_FREE for term in self.terms)

    @property
    def whole_batch(self) -> bool:
        """True if a term compares the pairs of a batch with each other."""
        return any(term.name in WHOLE_BATCH for term in self.terms)

    @property
    def uses_noise(self) -> bool:
        """True if a term uses the label noise of a row."""
        return any(term.name in NOISE_AWARE for term in self.terms)

    def losses(self, pairs: PairLogps) -> Tensor:
        """(B,): the objective of each pair."""
        total = pairs.chosen.new_zeros(())
        for term in self.terms:
            total = total + term.weight * term.loss(pairs, **{"beta": self.beta, **term.constants})
        return total


def parse_objective(text: str, beta: float) -> Objective:
    """Read a --loss flag: terms joined by +, each [weight*]name[:constant=value]...

    `beta` is for the terms that do not set their own. Raises InputError for an unknown loss (naming the nearest), an
    unknown constant, or a bad number.
    """
    return Objective(tuple(_term(part.strip(), text) for part in re.split(r"(?<![eE])\+", text)), beta)


def _term(part: str, text: str) -> Term:
    weight, star, rest = part.rpartition("*")
    name, *settings = rest.split(":")
    if name not in PREFERENCE_LOSSES:
        near = difflib.get_close_matches(name, PREFERENCE_LOSSES, 1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(PREFERENCE_LOSSES)}"
        raise InputError(f"--loss {text}: unknown loss {name!r}; {hint}")
    known = [p for p in inspect.signature(PREFERENCE_LOSSES[name]).parameters if p != "pairs"]
    constants = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in known:
            raise InputError(f"--loss {text}: {name} has no constant {key!r}; it has {', '.join(known)}")
        constants[key] = _number(value, text)
    return Term(name, _number(weight, text) if star else 1.0, constants)


def _number(value: str, text: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"--loss {text}: {value!r} is not a number")
    return number
