"""A few hundred malformed inputs for every reader (tests/support/fuzz.py); `make fuzz` tries thousands."""

from __future__ import annotations

import pytest

from tests.support.fuzz import TARGETS, run_target


@pytest.mark.parametrize("target", TARGETS)
def test_malformed_input_ends_in_one_line(target):
    found = run_target(target, 60, seed=1)
    assert not found["details"]
    assert found.get("accepted", 0) + found.get("refused", 0) == 60
    if target not in ("gz", "saves"):  # a test that only ever sees one end tests nothing
        assert found["refused"] >= 5
