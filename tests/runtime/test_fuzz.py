"""Sixty malformed inputs for each reader (tests/support/fuzz.py). `make fuzz` tries thousands."""

from __future__ import annotations

import pytest

from mpo.runtime.errors import InputError
from tests.support import fuzz, soak
from tests.support.fuzz import TARGETS, run_target


@pytest.mark.parametrize("target", TARGETS)
def test_malformed_input_is_accepted_or_refused_in_one_line(target):
    result = run_target(target, 60, seed=1)
    assert not result["details"]
    assert result.get("accepted", 0) + result.get("refused", 0) == 60
    if target not in ("gz", "saves"):  # a target that never refuses its inputs breaks them too little
        assert result["refused"] >= 5


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (soak.main, ["a", "9", "docs/robustness.md"], "KILLS a: not a whole number in digits"),
        (soak.main, ["0", "9", "docs/robustness.md"], "KILLS 0: must be at least 1"),
        (soak.main, ["1", "0.5", "docs/robustness.md"], "CASES 0.5: not a whole number in digits"),
        (soak.main, ["1", "1", "nowhere.md"], "nowhere.md: no such file"),
        (soak.main, [], "usage: python -m tests.support.soak KILLS CASES PAGE"),
        (fuzz.main, ["-3", "1"], "CASES -3: must be at least 1"),
        (fuzz.main, ["3", "one"], "SEED one: not a whole number in digits"),
        (fuzz.main, ["3", "1", "rowz"], "usage: python -m tests.support.fuzz CASES SEED"),
    ],
)
def test_wrong_arguments_of_the_long_versions_are_refused_in_one_line(main, words, message):
    with pytest.raises(InputError) as error:
        main(words)
    assert str(error.value).startswith(message)
