"""The folders of the two official data sets: HH-RLHF and summarize-from-feedback."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from mpo.data import hh, tldr
from mpo.data.rows import Row, Unusable
from mpo.runtime.errors import InputError
from tests.conftest import SHARED, needs_shared
from tests.data.test_rows import write

TALK = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant:"


def test_hh_splits_at_the_last_reply_and_keeps_its_form():
    row = hh.parse("f:1", {"chosen": TALK + " Goodbye!\n", "rejected": TALK + " No."}, "d")
    assert row == Row("", TALK, " Goodbye!", " No.", "d")
    assert hh.parse("f:1", {"chosen": TALK.lstrip() + "a", "rejected": TALK.lstrip() + "b"}).prompt == TALK


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (TALK + " a", "\n\nHuman: Else\n\nAssistant: b", "prompts differ"),
        (TALK + " a", TALK + "  ", "empty response"),
        (TALK + " a", TALK + " a", "same response twice"),
        (TALK + " a", TALK + " a \n", "same response twice"),
        (TALK + " a\n\nHuman: c", TALK + " b", "a turn within a response"),
        (TALK + " a", TALK + "\n\nHuman: c", "a turn within a response"),
    ],
)
def test_hh_counts_what_it_drops(tmp_path, chosen, rejected, reason):
    with pytest.raises(Unusable, match=reason):
        hh.parse("f:1", {"chosen": chosen, "rejected": rejected})
    good = {"chosen": TALK + " a", "rejected": TALK + " b"}
    write(tmp_path / "base" / "train.jsonl", good, {"chosen": chosen, "rejected": rejected}, good)
    dropped: Counter[str] = Counter()
    rows = hh.read_folder(tmp_path, "train", dropped)
    assert [row.id for row in rows] == ["base-train-0", "base-train-2"]
    assert dropped == {reason: 1}


def test_a_dialogue_that_asks_nothing_is_dropped(tmp_path):
    blank = "\n\nHuman: \n\nAssistant:"
    write(tmp_path / "base" / "train.jsonl", {"chosen": blank + " a", "rejected": blank + " b"})
    dropped: Counter[str] = Counter()
    assert hh.read_folder(tmp_path, "train", dropped) == []
    assert dropped == {"blank prompt": 1}


def test_hh_text_without_turns_is_an_error(tmp_path):
    file = write(tmp_path / "base" / "train.jsonl", {"chosen": "hello", "rejected": "hello"})
    with pytest.raises(InputError, match=rf"{file}:1: not a dialogue"):
        hh.read_folder(tmp_path, "train", Counter())
    with pytest.raises(InputError, match="expected the layout of HH-RLHF"):
        hh.read_folder(tmp_path, "test", Counter())


def test_a_split_of_hh_in_two_files_is_refused_by_both_names(tmp_path):
    pair = {"chosen": TALK + " a", "rejected": TALK + " b"}
    plain = write(tmp_path / "base" / "train.jsonl", pair)
    packed = write(tmp_path / "base" / "train.jsonl.gz", pair)
    with pytest.raises(InputError, match=f"{plain} and {packed}: two files of one split"):
        hh.read_folder(tmp_path, "train", Counter())
    write(tmp_path / "base" / "test.jsonl", pair)
    write(tmp_path / "other" / "test.jsonl.gz", pair)  # of another subset
    assert len(hh.read_folder(tmp_path, "test", Counter())) == 2


def test_an_id_twice_in_two_subsets_of_hh_is_refused_with_both_lines(tmp_path):
    one, two = ({"chosen": TALK + f" {a}", "rejected": TALK + " no", "id": "x"} for a in "ab")
    files = write(tmp_path / "a" / "train.jsonl", one), write(tmp_path / "b" / "train.jsonl", two)
    with pytest.raises(InputError, match=f"{files[1]}:1: has the same id as {files[0]}:1, 'x'"):
        hh.read_folder(tmp_path, "train", Counter())


def comparison(**changes):
    info = {"post": "I fell.", "title": "Help", "subreddit": "advice"}
    item = {"info": info, "summaries": [{"text": " fell"}, {"text": " stood"}], "choice": 1}
    return {**item, **changes}


def test_tldr_prompt_and_choice():
    row = tldr.parse("f:1", comparison())
    prompt = "SUBREDDIT: r/advice\n\nTITLE: Help\n\nPOST: I fell.\n\nTL;DR:"
    assert row == Row("", prompt, " stood", " fell", "advice")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choice": 2}, "field 'choice' must be 0 or 1"),
        ({"choice": True}, "field 'choice' must be 0 or 1"),
        ({"info": None}, "field 'info'"),
        ({"summaries": [{"text": "a"}]}, "field 'summaries'"),
        ({"summaries": [{"text": "a"}, {}]}, "field 'text' is missing"),
    ],
)
def test_tldr_errors(changes, message):
    with pytest.raises(InputError, match=f"f:1: {message}"):
        tldr.parse("f:1", comparison(**changes))


def test_tldr_drops_what_makes_no_pair(tmp_path):
    article = comparison(info={"article": "News.", "title": "t"})
    same, empty = (comparison(summaries=[{"text": " fell"}, {"text": text}]) for text in ("fell ", " "))
    write(tmp_path / "comparisons" / "train.json", comparison(), article, same, empty, comparison(split="valid1"))
    dropped: Counter[str] = Counter()
    assert [row.id for row in tldr.read_folder(tmp_path, "train", dropped)] == ["train-0"]
    assert dropped == {
        "no Reddit post": 1,
        "same response twice": 1,
        "empty response": 1,
        "of another split": 1,
    }


def test_batches_of_comparisons_are_told_apart_by_each_rows_split(tmp_path):
    splits = "train", "valid1", "test", "valid2", "train"
    write(tmp_path / "comparisons" / "batch3.json", *(comparison(split=split) for split in splits))
    write(tmp_path / "comparisons" / "batch4.json.gz", comparison(split="valid1"))
    dropped: Counter[str] = Counter()
    rows = {split: tldr.read_folder(tmp_path, split, dropped) for split in ("train", "test")}
    # a row without an id is named after its file and its place among the rows of its split
    assert [row.id for row in rows["train"]] == ["batch3-train-0", "batch3-train-1"]
    assert [row.id for row in rows["test"]] == ["batch3-test-0", "batch3-test-1", "batch4-test-0"]
    assert dropped == {"of another split": 1}
    file = write(tmp_path / "comparisons" / "batch5.json", comparison())
    with pytest.raises(InputError, match=f"{file}:1: field 'split' is missing"):
        tldr.read_folder(tmp_path, "train", Counter())


@pytest.mark.parametrize("other", ["train.jsonl", "train.json.gz", "batch3.json"])
def test_comparisons_that_would_be_read_twice_are_refused_by_both_names(tmp_path, other):
    files = [write(tmp_path / "comparisons" / name, comparison(split="train")) for name in ("train.json", other)]
    with pytest.raises(InputError) as refused:
        tldr.read_folder(tmp_path, "train", Counter())
    assert all(str(file) in str(refused.value) for file in files)


def test_batches_without_a_folder_of_their_own_are_read(tmp_path):
    write(tmp_path / "batch3.json", comparison(split="train"), comparison(split="valid2"))
    (tmp_path / "README.json").write_text("not rows")
    assert len(tldr.read_folder(tmp_path, "train", Counter())) == 1
    assert len(tldr.read_folder(tmp_path, "test", Counter())) == 1


@pytest.mark.parametrize("reader", [hh.read_folder, tldr.read_folder])
def test_an_empty_folder_is_refused_by_name(tmp_path, reader):
    with pytest.raises(InputError, match=f"{tmp_path}: has n.*expected .*layout.*to read one file, name it"):
        reader(tmp_path, "train", Counter())


@needs_shared
def test_the_real_data_reads():
    dropped: Counter[str] = Counter()
    rows = hh.read_folder(SHARED / "hh-rlhf", "train", dropped)
    assert len(rows) + sum(dropped.values()) == 2054 + 2012
    assert {r.domain for r in rows} == {"helpful-base", "harmless-base"}
    assert all(r.prompt.endswith("\n\nAssistant:") and r.chosen.startswith(" ") for r in rows)
    assert len(tldr.read_folder(SHARED / "tldr", "train", dropped)) == 300
    assert len(tldr.read_folder(SHARED / "tldr", "test", dropped)) == 54


@needs_shared
def test_the_official_layout_of_tldr_reads():
    folder = SHARED / "cases" / "tldr_official_layout"
    lines = [line for p in (folder / "comparisons").glob("*.json") for line in p.read_text().splitlines()]
    splits = Counter("train" if json.loads(line)["split"] == "train" else "test" for line in lines)
    for split, number in splits.items():
        assert len(tldr.read_folder(folder, split, Counter())) == number
