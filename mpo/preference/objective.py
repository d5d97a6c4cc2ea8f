"""From a --loss flag to the objective: one preference loss, or a weighted sum of several.

Examples: sigmoid    sigmoid+0.1*sft    simpo:beta=2.5:gamma=0.5    0.8*sigmoid+0.2*bco_pair+0.1*sft
"""

from __future__ import annotations

import difflib
import inspect
import re
import typing
from dataclasses import dataclass

from torch import Tensor

from mpo.config import Range
from mpo.preference.losses import NOISE_AWARE, PREFERENCE_LOSSES, REFERENCE_FREE, WHOLE_BATCH, PairLogps, PreferenceLoss
from mpo.runtime.errors import InputError
from mpo.runtime.flags import read_number


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
    def names(self) -> list[str]:
        """The losses that are summed."""
        return [term.name for term in self.terms]

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
    ranges = ranges_of(PREFERENCE_LOSSES[name])
    constants = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in ranges:
            raise InputError(f"--loss {text}: {name} has no constant {key!r}; it has {', '.join(ranges)}")
        constants[key] = read_number(f"--loss {text}: {key}", float, ranges[key], value)
    return Term(name, read_number(f"--loss {text}: weight", float, Range(above=0), weight) if star else 1.0, constants)


def ranges_of(loss: PreferenceLoss) -> dict[str, Range]:
    """The constants of a loss, and the values that each takes. Without a range in its type, that is any number.

    A loss with beta or a weight below 0 would push in the wrong direction, and with 0 not at all.
    """
    types = typing.get_type_hints(loss, include_extras=True)
    names = [name for name in inspect.signature(loss).parameters if name != "pairs"]
    declared = {name: getattr(types.get(name), "__metadata__", (Range(),))[0] for name in names}
    return declared | ({"beta": Range(above=0)} if "beta" in declared else {})
