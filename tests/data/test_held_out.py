"""Holding rows out and taking a sample: at random by seed, whole prompts on one side, every domain in its share."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo.data.held_out import hold_out, sample, without_overlap
from mpo.data.rows import Row
from mpo.runtime.errors import InputError


def rows_of(*prompts, domain=""):
    return [Row(f"{domain}{i}", f"{domain}{prompt}", " a", " b", domain) for i, prompt in enumerate(prompts)]


def test_sorted_domains_are_held_out_in_equal_shares():
    rows = rows_of(*range(100), domain="a") + rows_of(*range(50), domain="b")
    splits = hold_out("f", rows, 0.1, seed=1)
    assert Counter(row.domain for row in splits["test"]) == {"a": 10, "b": 5}
    assert Counter(row.domain for row in splits["train"]) == {"a": 90, "b": 45}
    assert splits["test"] != hold_out("f", rows, 0.1, seed=2)["test"]
    assert splits == hold_out("f", rows, 0.1, seed=1)


def test_the_held_out_rows_come_from_everywhere_in_the_file():
    rows = rows_of(*range(1000))
    places = [int(row.prompt) for row in hold_out("f", rows, 0.1, seed=1)["test"]]
    assert len(places) == 100
    assert places == sorted(places)
    # of 100 random places, fewer than 20 or more than 80 in one half has a probability below 1e-9
    assert 20 < sum(place < 500 for place in places) < 80


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from("abc")), min_size=2, max_size=40),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
)
def test_every_row_is_on_one_side_with_all_rows_of_its_prompt(pairs, share, seed):
    rows = [Row(str(i), f"p{prompt}", " a", " b", domain) for i, (prompt, domain) in enumerate(pairs)]
    if len({row.prompt for row in rows}) == 1:
        with pytest.raises(InputError, match=r"f: .* with a single prompt cannot be divided"):
            hold_out("f", rows, share, seed)
        return
    splits = hold_out("f", rows, share, seed)
    assert sorted(splits["train"] + splits["test"], key=rows.index) == rows
    assert splits["train"]
    assert splits["test"]
    assert not {row.prompt for row in splits["train"]} & {row.prompt for row in splits["test"]}
    smallest = min(Counter(row.prompt for row in rows).values())
    assert len(splits["test"]) <= max(1, round(share * len(rows)), smallest)


def test_a_single_prompt_is_refused_with_a_way_on():
    with pytest.raises(InputError, match=r"x.jsonl: 3 rows with a single prompt .*--test_data"):
        hold_out("x.jsonl", rows_of("p", "p", "p"), 0.1, 1)
    with pytest.raises(InputError, match=r"x.jsonl: 1 row with a single prompt"):
        hold_out("x.jsonl", rows_of("p"), 0.1, 1)


def test_a_sample_is_random_and_in_order():
    rows = rows_of(*range(1000))
    chosen = [int(row.prompt) for row in sample(rows, 100, 1, "train")]
    assert len(set(chosen)) == 100
    assert chosen == sorted(chosen)
    assert 20 < sum(place < 500 for place in chosen) < 80
    assert chosen == [int(row.prompt) for row in sample(rows, 100, 1, "train")]
    assert chosen != [int(row.prompt) for row in sample(rows, 100, 2, "train")]
    assert chosen != [int(row.prompt) for row in sample(rows, 100, 1, "test")]
    assert sample(rows, 0, 1, "train") == sample(rows, 1000, 1, "train") == sample(rows, 2000, 1, "train") == rows


@pytest.mark.parametrize(("most", "expected"), [(1, None), (15, (10, 4, 1)), (30, (20, 8, 2)), (149, None)])
def test_a_sample_has_each_domain_in_its_share(most, expected):
    rows = rows_of(*range(100), domain="a") + rows_of(*range(40), domain="b") + rows_of(*range(10), domain="c")
    for seed in (1, 2, 3):
        counts = Counter(row.domain for row in sample(rows, most, seed, "train"))
        assert sum(counts.values()) == most
        assert all(abs(counts[d] - most * n / 150) < 1 for d, n in (("a", 100), ("b", 40), ("c", 10)))
        assert expected is None or tuple(counts[d] for d in "abc") == expected


def test_training_rows_with_a_test_prompt_are_dropped_and_counted():
    dropped: Counter[str] = Counter()
    splits = without_overlap({"train": rows_of("a", "b", "a", "c"), "test": rows_of("a", "d")}, dropped)
    assert [row.prompt for row in splits["train"]] == ["b", "c"]
    assert [row.prompt for row in splits["test"]] == ["a", "d"]
    assert dropped == {"prompt is in the test split": 2}
