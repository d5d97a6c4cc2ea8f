"""The --loss flag: sums, weights, constants, and one-line errors."""

from __future__ import annotations

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
    for name, text in (("rpo", "sigmoid+1*sft"), ("cpo", "cpo:alpha=0+sft"), ("orpo", "sft+orpo+-1*sft")):
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sigmiod", "did you mean sigmoid"),
        ("xyz", "expected one of sigmoid"),
        ("sigmoid+", "unknown loss ''"),
        ("two*sigmoid", "'two' is not a number"),
        ("nan*sigmoid", "'nan' is not a number"),
        ("simpo:delta=1", "simpo has no constant 'delta'; it has beta, gamma"),
        ("simpo:gamma", "'' is not a number"),
        ("simpo:pairs=1", "no constant 'pairs'"),
    ],
)
def test_bad_flags_are_one_line(text, message):
    with pytest.raises(InputError, match="--loss") as error:
        parse_objective(text, 1.0)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
