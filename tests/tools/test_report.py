"""The text report: its tables fit a terminal of 100 columns, whatever was compared."""

from __future__ import annotations

from typing import Any

import pytest

from mpo.runtime.output import fitting_table, table
from mpo.tools.report import kinds_table, probe_table, result_table


def result(gold: bool, kinds: int) -> dict[str, Any]:
    """A policy's results with the widest numbers that occur."""
    wide, all_won = [-1.234, -2.345, -0.123], [1.0, 1.0, 1.0]
    judges = ("gold", "reward") if gold else ("reward",)
    row: dict[str, Any] = {"reward": wide, "kl": [123.4, 100, 150], "words": 123.0, "eos_rate": 1.0}
    row |= {"distinct_1": 0.05, "distinct_2": 0.14}
    for judge in judges:
        row |= {f"{judge}_win_{other}": all_won for other in ("sft", "chosen")}
        row[f"{judge}_win_sft_length_controlled"] = 1.0
    row |= {"gold": wide, "share_of_best": 1.0, "refusals_benign": 1.0} if gold else {}
    return row | {f"{judges[0]}/kind-of-prompt-{i}": -1.23 for i in range(kinds)}


def policies(gold: bool) -> dict[str, Any]:
    """Six policies, one with a name of 60 characters, and the data set."""
    names = ["sft", "dpo-inverted", "mpo-sft-ref", "ppo-hard", "mpo", "a-very-long-name-" + "x" * 43]
    results = {name: result(gold, 8) for name in (*names, "chosen")}
    results["chosen"].pop("kl")
    return results


@pytest.mark.parametrize("gold", [True, False])
def test_the_tables_of_six_policies_with_long_names_fit_100_columns_and_lose_no_number(gold):
    for make, cells in ((result_table, 11 if gold else 9), (kinds_table, 10 if gold else 9)):
        text = make(policies(gold))
        blocks = text.split("\n\n")
        assert max(map(len, text.splitlines())) <= 100
        assert all(len(block.splitlines()) == 2 + 7 for block in blocks)  # a header and every policy in each block
        assert sum(block.splitlines()[0].count("|") - 2 for block in blocks) == cells - 1
        assert "a-very-long-nam" in text
        assert "data set's chosen" in text


def test_the_table_of_the_usual_three_policies_has_two_blocks():
    results = {name: result(True, 0) for name in ("sft", "dpo", "mpo")}
    for row in results.values():
        row |= {"gold": [0.81, 0.55, 1.06], "reward": [0.03, -0.07, 0.14], "kl": [1.3, 1, 2], "words": 17.0}
        row |= {"gold_win_sft": [0.71, 0.68, 0.75], "gold_win_chosen": [0.67, 0.63, 0.71]}
    assert len(result_table(results).split("\n\n")) == 2


def test_the_probe_sheet_of_many_kinds_fits_100_columns():
    probe = [{"kind": f"kind-of-prompt-{i}", "mistake": "wrong", "right_above": 0.5} for i in range(12)]
    text = probe_table(probe)
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("0.50") == 12


def test_a_table_that_fits_is_one_table():
    header, rows = ["a", "b"], [["1", "2"]]
    assert fitting_table(header, rows) == table(header, rows)
    wide = ["a", "b" * 48, "c" * 42]  # 1 + 48 + 42 and 3 for each column and 1: 101
    assert fitting_table(wide, [["1", "2", "3"]]).count("\n\n") == 1
    assert fitting_table([*wide[:2], "c" * 41], [["1", "2", "3"]]).count("\n\n") == 0  # 100
