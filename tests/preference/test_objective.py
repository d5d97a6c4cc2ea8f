"""The --loss flag: sums, weights, constants, and one-line errors."""

from __future__ import annotations

import inspect

import pytest
import torch

from mpo.preference.losses import PREFERENCE_LOSSES
from mpo.preference.objective import parse_objective
from mpo.runtime.errors import InputError
from tests.preference.test_losses import BETA, BY_HAND, pairs


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_a_name_alone_is_that_loss(name):
    assert parse_objective(name, BETA).losses(pairs()).tolist() == pytest.approx(BY_HAND[name])


def test_a_weighted_sum():
    found = parse_objective("0.8*sigmoid + 0.2*bco_pair+1e-1*sft", BETA).losses(pairs())
    columns = zip(BY_HAND["sigmoid"], BY_HAND["bco_pair"], BY_HAND["sft"], strict=True)
    assert found.tolist() == pytest.approx([0.8 * a + 0.2 * b + 0.1 * c for a, b, c in columns])


def test_rpo_and_cpo_are_sums_themselves():
    for name, text in (("rpo", "sigmoid+1*sft"), ("cpo", "cpo:alpha=0+sft"), ("orpo:lam=0", "sft")):
        torch.testing.assert_close(
            parse_objective(name, BETA).losses(pairs()), parse_objective(text, BETA).losses(pairs())
        )


def test_constants():
    p = pairs()
    simpo = PREFERENCE_LOSSES["simpo"](p, 2.5, gamma=1.0)
    torch.testing.assert_close(parse_objective("simpo:beta=2.5:gamma=1", BETA).losses(p), simpo)


def test_what_it_needs():
    assert parse_objective("simpo+sft", 1.0).reference_free
    assert not parse_objective("simpo+sigmoid", 1.0).reference_free
    assert parse_objective("sigmoid+aot", 1.0).whole_batch
    assert not parse_objective("sigmoid", 1.0).whole_batch
    assert parse_objective("cdpo", 1.0).uses_noise
    assert not parse_objective("sigmoid", 1.0).uses_noise


# The values that each constant takes: the nearest ones outside its range, and those inside.
TAKEN = {
    "beta": (
        ["0", "-0.5", "nan", "inf"],
        ["1e-9", "10"],
    ),  # at 0 no pair would pull, below 0 all in the wrong direction
    "weight": (["0", "-1", "nan", "inf"], ["1e-9", "10"]),  # the same
    "e": (["-1e-9", "0.5", "1", "nan"], ["0", "0.4999"]),  # the loss of robust is divided by 1 - 2e
    "exo_pair e": (["0", "-1e-9", "0.5", "nan"], ["1e-9", "0.4999"]),  # it has log e
    "tau": (["0", "-0.05", "nan"], ["1e-9", "1"]),  # a divisor
    "alpha": (["-0.1", "nan", "inf"], ["0", "1"]),  # weights of a likelihood
    "lam": (["-0.1", "nan", "inf"], ["0", "1"]),
    "gamma": (["-0.1", "nan", "inf"], ["0", "1"]),  # a margin
}


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_every_constant_of_a_loss_is_taken_in_its_range_only(loss):
    for constant in ["weight", *inspect.signature(PREFERENCE_LOSSES[loss]).parameters]:
        if constant == "pairs":
            continue
        bad, good = TAKEN.get(f"{loss} {constant}") or TAKEN[constant]
        form = f"{{}}*{loss}" if constant == "weight" else f"{loss}:{constant}={{}}"
        for value in bad:
            with pytest.raises(InputError, match=rf"^--loss .*: {constant} {value}: must be "):
                parse_objective(form.format(value), BETA)
        for value in good:
            (term,) = parse_objective(form.format(value), BETA).terms
            assert (term.weight if constant == "weight" else term.constants[constant]) == float(value)


def test_a_constant_without_a_range_takes_any_number(monkeypatch):
    def mine(pairs, beta, shift=0.0):
        return pairs.D * beta + shift

    monkeypatch.setitem(PREFERENCE_LOSSES, "mine", mine)
    assert parse_objective("mine:shift=-3", BETA).terms[0].constants == {"shift": -3.0}
    with pytest.raises(InputError, match="shift nan: must be a finite number"):
        parse_objective("mine:shift=nan", BETA)
    with pytest.raises(InputError, match="beta -1: must be above 0"):
        parse_objective("mine:beta=-1", BETA)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sigmiod", "did you mean sigmoid"),
        ("xyz", "expected one of sigmoid"),
        ("sigmoid+", "unknown loss ''"),
        ("two*sigmoid", "weight two: not a number"),
        ("nan*sigmoid", "weight nan: must be a finite number"),
        ("simpo:delta=1", "simpo has no constant 'delta'; it has beta, gamma"),
        ("simpo:gamma", "gamma '': not a number"),
        ("simpo:pairs=1", "no constant 'pairs'"),
    ],
)
def test_bad_flags_are_one_line(text, message):
    with pytest.raises(InputError, match="--loss") as error:
        parse_objective(text, 1.0)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
