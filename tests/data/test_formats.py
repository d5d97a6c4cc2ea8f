"""Reading rows: the real formats, and one-line errors that name file and line."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import pytest

from mpo.data import hh, tldr
from mpo.data.rows import Row, read_rows, write_rows
from mpo.runtime.errors import InputError
from tests.conftest import SHARED, needs_shared


def write(path, *items):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((i if isinstance(i, str) else json.dumps(i)) + "\n" for i in items)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


GOOD = {"prompt": "p", "chosen": " a", "rejected": " b"}
TALK = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant:"


def test_rows_round_trip(tmp_path):
    rows = [Row("x", "p\n", " ü", " b", "d", 0.5), Row("y", "q", " a", " b")]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"rows.jsonl:2: not a JSON object"),
        ("[1]", r"rows.jsonl:2: expected a JSON object, found list"),
        ({"prompt": "p", "chosen": "a"}, r"rows.jsonl:2: field 'rejected' is missing"),
        ({**GOOD, "chosen": 3}, r"rows.jsonl:2: field 'chosen' is int, not a string"),
        ({**GOOD, "margin": "big"}, r"rows.jsonl:2: field 'margin' is 'big', not a finite number"),
        ("[" * 100000, r"rows.jsonl:2: not a JSON object"),
    ],
)
def test_a_bad_row_names_file_and_line(tmp_path, line, message):
    with pytest.raises(InputError, match=message) as error:
        read_rows(write(tmp_path / "rows.jsonl", GOOD, line))
    assert "\n" not in str(error.value)


def test_damaged_files_are_named(tmp_path):
    whole = write(tmp_path / "rows.jsonl.gz", *[GOOD] * 500).read_bytes()
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    (tmp_path / "plain.jsonl.gz").write_text("{}")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    (tmp_path / "empty.jsonl").write_text("")
    for name, message in (
        ("cut.jsonl.gz", "not a complete gzip file"),
        ("plain.jsonl.gz", "not a complete gzip file"),
        ("latin.jsonl", "not UTF-8"),
        ("empty.jsonl", "contains no rows"),
        ("none.jsonl", "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            read_rows(tmp_path / name)


def test_hh_splits_at_the_last_reply_and_keeps_its_form():
    dropped: Counter[str] = Counter()
    row = hh.parse("f:1", {"chosen": TALK + " Goodbye!\n", "rejected": TALK + " No."}, "id", "d", dropped)
    assert row == Row("id", TALK, " Goodbye!", " No.", "d")
    assert not dropped


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (TALK + " a", "\n\nHuman: Else\n\nAssistant: b", "prompts differ"),
        (TALK + " a", TALK + "  ", "empty response"),
        (TALK + " a", TALK + " a", "same response twice"),
        (TALK + " a\n\nHuman: c", TALK + " b", "human turn within a response"),
    ],
)
def test_hh_counts_what_it_drops(chosen, rejected, reason):
    dropped: Counter[str] = Counter()
    assert hh.parse("f:1", {"chosen": chosen, "rejected": rejected}, "id", "d", dropped) is None
    assert dropped == {reason: 1}


def test_hh_text_without_turns_is_an_error(tmp_path):
    file = write(tmp_path / "base" / "train.jsonl", {"chosen": "hello", "rejected": "hello"})
    with pytest.raises(InputError, match=rf"{file}:1: not a dialogue"):
        hh.read_folder(tmp_path, "train", Counter())
    with pytest.raises(InputError, match="expected the layout of HH-RLHF"):
        hh.read_folder(tmp_path, "test", Counter())


def comparison(**changes):
    info = {"post": "I fell.", "title": "Help", "subreddit": "advice"}
    item = {"info": info, "summaries": [{"text": " fell"}, {"text": " stood"}], "choice": 1}
    return {**item, **changes}


def test_tldr_prompt_and_choice():
    row = tldr.parse("f:1", comparison(), "id", Counter())
    prompt = "SUBREDDIT: r/advice\n\nTITLE: Help\n\nPOST: I fell.\n\nTL;DR:"
    assert row == Row("id", prompt, " stood", " fell", "advice")


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
        tldr.parse("f:1", comparison(**changes), "id", Counter())


@needs_shared
def test_the_real_data_reads():
    dropped: Counter[str] = Counter()
    rows = hh.read_folder(SHARED / "hh-rlhf", "train", dropped)
    assert len(rows) + sum(dropped.values()) == 2054 + 2012
    assert {r.domain for r in rows} == {"helpful-base", "harmless-base"}
    assert all(r.prompt.endswith("\n\nAssistant:") and r.chosen.startswith(" ") for r in rows)
    assert len(tldr.read_folder(SHARED / "tldr", "train", dropped)) == 300
    assert len(tldr.read_folder(SHARED / "tldr", "test", dropped)) == 54
