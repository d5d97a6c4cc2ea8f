"""Objects from lines, lists and parquet files, with the line of each."""

from __future__ import annotations

import gzip
import json
import sys

import pytest

from mpo.data.files import one_of_each, read_objects, stem
from mpo.runtime.errors import InputError

LIST = '[\n  {"a": 1,\n   "b": [2]},\n\n  {"a": "x\\ny"}\n]\n'


@pytest.mark.parametrize("name", ["data.json", "data.json.gz", "data.jsonl"])
@pytest.mark.parametrize("mark", ["", "\ufeff", "\ufeff\n "])
def test_a_list_gives_each_object_with_the_line_it_begins_on(tmp_path, name, mark):
    content = (mark + LIST).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    first = 2 + mark.count("\n")
    expected = [(f"{tmp_path / name}:{first}", {"a": 1, "b": [2]}), (f"{tmp_path / name}:{first + 3}", {"a": "x\ny"})]
    assert list(read_objects(tmp_path / name)) == expected


def test_a_json_file_of_lines_is_read_line_by_line(tmp_path):
    (tmp_path / "data.json").write_text('{"a": 1}\n\n{"a": 2}\n')
    found = list(read_objects(tmp_path / "data.json"))
    assert [(where.rpartition(":")[2], item["a"]) for where, item in found] == [("1", 1), ("3", 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": ]', ":1: not valid JSON"),
        ('[{"a": 1},\n{"a": 2}', r":2: not valid JSON \(the object is not followed by ',' or '\]'\)"),
        ('[\n{"a": 1},\n[2]]', ":3: expected a JSON object, found list"),
        ('[{"a": 1}]\n{"b": 2}', "text after the end of the list"),
        ('[{"a": 1} {"a": 2}]', ":1: not valid JSON"),
        ("[" * 100000, ":1: not valid JSON"),
        ("[", ":1: not valid JSON"),
    ],
)
def test_a_damaged_list_is_refused_with_the_line(tmp_path, text, message):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(InputError, match=rf"data.json.*{message}") as refused:
        list(read_objects(tmp_path / "data.json"))
    assert "\n" not in str(refused.value)


def test_an_empty_list_has_no_objects(tmp_path):
    (tmp_path / "data.json").write_text("[ ]\n")
    assert list(read_objects(tmp_path / "data.json")) == []


@pytest.mark.parametrize("name", ["data.csv", "data.csv.gz"])
def test_a_csv_file_gives_its_rows_with_the_line_each_begins_on(tmp_path, name):
    text = "\ufeffid,prompt,chosen,rejected,margin\r\n"
    text += 'a,"Say ""hi"",\nplease",Hi,,0.5\r\n\r\n,What?,"1,2",3,\r\n'
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert list(read_objects(tmp_path / name)) == [
        (
            f"{tmp_path / name}:2",
            {"id": "a", "prompt": 'Say "hi",\nplease', "chosen": "Hi", "rejected": "", "margin": 0.5},
        ),
        (f"{tmp_path / name}:5", {"prompt": "What?", "chosen": "1,2", "rejected": "3"}),
    ]
    assert stem(tmp_path / name) == "data"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,chosen\na,b,c\n", ":2: has 3 cells, but the first line names 2 fields"),
        ("prompt,prompt\na,b\n", ":1: two columns have the same name"),
        ('prompt,chosen\na,"b\n', ":2: not valid CSV"),
        ("prompt,margin\na,b\n", ":2: field 'margin' is 'b', not a number"),
        (f"prompt\n{'x' * (1 << 24)}x\n", ":2: not valid CSV"),
    ],
)
def test_a_damaged_csv_file_is_refused_with_the_line(tmp_path, text, message):
    (tmp_path / "data.csv").write_text(text)
    with pytest.raises(InputError, match=f"data.csv{message}") as refused:
        list(read_objects(tmp_path / "data.csv"))
    assert "\n" not in str(refused.value)


def test_a_parquet_file_gives_its_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the optional package pyarrow is not installed")
    from pyarrow import parquet

    items = [{"prompt": "p", "chosen": [{"role": "user", "content": "é"}]}, {"prompt": None, "chosen": []}]
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(items), path)
    assert list(read_objects(path)) == [(f"{path}:1", items[0]), (f"{path}:2", items[1])]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"data.parquet: not a complete parquet file") as refused:
        list(read_objects(path))
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match=r"none.parquet: no such file"):
        list(read_objects(tmp_path / "none.parquet"))


def test_without_pyarrow_a_parquet_file_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # importing it raises ImportError
    with pytest.raises(InputError, match=r"x.parquet: needs the pyarrow package \(pip install pyarrow\)"):
        list(read_objects(tmp_path / "x.parquet"))


def test_files_that_differ_in_their_suffix_only_are_one_file_twice(tmp_path):
    assert [stem(tmp_path / n) for n in ("a.jsonl", "a.json.gz", "a.b.jsonl.gz", "a.parquet", "a")] == [
        *("a", "a", "a.b", "a", "a"),
    ]
    apart = [tmp_path / "x" / "train.jsonl", tmp_path / "y" / "train.jsonl", tmp_path / "x" / "train2.jsonl"]
    assert one_of_each(apart) == apart
    with pytest.raises(InputError, match=r"x/train.jsonl and \S*x/train.json.gz: two files of one split"):
        one_of_each([*apart, tmp_path / "x" / "train.json.gz"])


def test_where_a_list_is_long_its_lines_are_still_right(tmp_path):
    items = [{"text": "x\n" * (i % 3), "i": i} for i in range(500)]
    (tmp_path / "data.json").write_text(json.dumps(items, indent=1))
    lines = (tmp_path / "data.json").read_text().splitlines()
    for where, item in read_objects(tmp_path / "data.json"):
        at = int(where.rpartition(":")[2])
        assert lines[at - 1].strip() == "{"
        assert lines[at + 1].strip() == f'"i": {item["i"]}'
