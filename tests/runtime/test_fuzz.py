"""Sixty malformed inputs for each reader (tests/support/fuzz.py). `make fuzz` tries thousands."""

from __future__ import annotations

import pytest

from tests.support.fuzz import TARGETS, run_target


@pytest.mark.parametrize("target", TARGETS)
def test_malformed_input_is_accepted_or_refused_in_one_line(target):
    result = run_target(target, 60, seed=1)
    assert not result["details"]
    assert result.get("accepted", 0) + result.get("refused", 0) == 60
    if target not in ("gz", "saves"):  # a target that never refuses its inputs breaks them too little
        assert result["refused"] >= 5
