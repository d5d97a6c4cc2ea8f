"""What is printed: counts, tables and intervals as text."""

from __future__ import annotations

from mpo.runtime.output import counts_text, interval, percent, table


def test_counts_begin_with_what_is_kept_and_leave_out_what_is_zero():
    counts = {"dropped: empty response": 0, "cut: oldest turns": 2, "kept": 9}
    assert counts_text(counts) == "9 kept; 2 cut: oldest turns"
    assert counts_text({}) == ""


def test_a_table_lines_up_and_is_markdown():
    text = table(["name", "n"], [["a", "1"], ["longer", "20"]])
    assert text.splitlines() == ["| name   | n  |", "|--------|----|", "| a      | 1  |", "| longer | 20 |"]


def test_an_interval_shows_its_ends():
    assert interval((0.614, 0.561, 0.662)) == "0.61 [0.56, 0.66]"
    assert percent((0.614, 0.561, 0.662)) == "61 [56, 66]"
