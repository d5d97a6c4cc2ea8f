"""Rows in the project's own format: what is read and written, and one-line errors that name file and line."""

from __future__ import annotations

import gzip
import json

import pytest

from mpo.data.rows import Row, read_rows, write_rows
from mpo.runtime.errors import InputError


def write(path, *items):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((i if isinstance(i, str) else json.dumps(i)) + "\n" for i in items)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


GOOD = {"prompt": "p", "chosen": " a", "rejected": " b"}


def test_rows_round_trip(tmp_path):
    rows = [Row("x", "p\n", " ü", " b", "d", 0.5, 0.25), Row("y", "", "", " b")]
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
        ({**GOOD, "margin": -0.5}, r"rows.jsonl:2: field 'margin' is -0.5, not between 0 and 1000"),
        ({**GOOD, "margin": 1e29}, r"rows.jsonl:2: field 'margin' is 1e\+29, not between 0 and 1000"),
        ({**GOOD, "noise": 0.5}, r"rows.jsonl:2: field 'noise' is 0.5, not at least 0 and below 0.5"),
        ({**GOOD, "noise": 0.7}, r"rows.jsonl:2: field 'noise' is 0.7"),
        ({**GOOD, "noise": -0.1}, r"rows.jsonl:2: field 'noise' is -0.1"),
        ({**GOOD, "id": ["x"]}, r"rows.jsonl:2: field 'id' is list, not a string or a number"),
        ({**GOOD, "domain": {}}, r"rows.jsonl:2: field 'domain' is dict, not a string or a number"),
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


def test_a_byte_order_mark_and_blank_lines_are_no_rows(tmp_path):
    first, second = json.dumps({**GOOD, "id": "a"}), json.dumps({**GOOD, "id": "b"})
    for name, text in (
        ("mark", f"\ufeff{first}\n{second}\n"),
        ("blank", f"\n  \n{first}\n\n{second}\n\t\n\n"),
        ("windows", f"{first}\r\n\r\n{second}\r\n"),
        ("two files joined", f"\ufeff{first}\n\ufeff{second}\n\ufeff\n"),
    ):
        (tmp_path / f"{name}.jsonl").write_bytes(text.encode())
        assert [row.id for row in read_rows(tmp_path / f"{name}.jsonl")] == ["a", "b"]
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        assert [row.id for row in read_rows(tmp_path / f"{name}.jsonl.gz")] == ["a", "b"]


def test_blank_lines_count_as_lines(tmp_path):
    with pytest.raises(InputError, match=r"rows.jsonl:3: field 'chosen' is missing"):
        read_rows(write(tmp_path / "rows.jsonl", GOOD, "", {"prompt": "p"}))


@pytest.mark.parametrize(("one", "two"), [("p0", "p0"), (7, 7), (7, "7")])
def test_two_rows_of_the_same_id_are_refused_with_both_lines(tmp_path, one, two):
    rows = {**GOOD, "id": one}, {**GOOD, "id": "other"}, {**GOOD, "id": two}
    with pytest.raises(InputError, match=r"rows.jsonl:3: has the same id as \S*rows.jsonl:1, "):
        read_rows(write(tmp_path / "rows.jsonl", *rows))


def test_a_null_id_is_no_id_and_a_made_one_differs_from_all_others(tmp_path):
    given = [{"id": None}, {"id": "rows-0"}, {}, {"id": ""}, {"id": "rows-2"}]
    rows = read_rows(write(tmp_path / "rows.jsonl", *({**GOOD, **some} for some in given)))
    assert [row.id for row in rows] == ["rows-0'", "rows-0", "rows-2'", "rows-3", "rows-2"]


def test_null_fields_have_no_value(tmp_path):
    row = read_rows(write(tmp_path / "r.jsonl", {**GOOD, "domain": None, "margin": None, "noise": None}))[0]
    assert (row.domain, row.margin, row.noise) == ("", None, None)


def test_the_ends_of_margin_and_noise_are_accepted(tmp_path):
    rows = {**GOOD, "margin": 0, "noise": 0}, {**GOOD, "margin": 1000, "noise": 0.499}
    read = read_rows(write(tmp_path / "rows.jsonl", *rows))
    assert [(row.margin, row.noise) for row in read] == [(0, 0), (1000, 0.499)]


def test_a_folder_for_a_file_and_a_file_for_a_folder_are_named(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}: a folder; name a file in it"):
        read_rows(tmp_path)
    file = write(tmp_path / "rows.jsonl", GOOD)
    with pytest.raises(InputError, match=f"{file}: a file; name the folder that holds train.jsonl"):
        read_rows(file / "train.jsonl")


def test_a_row_without_responses_is_a_prompt_where_only_prompts_are_used(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"prompt": "Why?"}, GOOD, {"prompt": "Who?", "chosen": None})
    with pytest.raises(InputError, match=r"rows\.jsonl:1: field 'chosen' is missing"):
        read_rows(path)
    with pytest.raises(InputError, match=r"rows\.jsonl:3: field 'chosen' is NoneType, not a string"):
        read_rows(path, prompts_alone=True)
    path = write(tmp_path / "rows.jsonl", {"prompt": "Why?"}, GOOD)
    alone, whole = read_rows(path, prompts_alone=True)
    assert (alone.prompt, alone.chosen, alone.rejected, alone.id) == ("Why?", "", "", "rows-0")
    assert whole.chosen == GOOD["chosen"]
