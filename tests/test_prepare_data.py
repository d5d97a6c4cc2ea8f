"""The data stage as a user runs it: what it writes, prints and records, and what it refuses in one line."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from mpo.data.rows import read_rows
from mpo.runtime.files import read_json
from tests.conftest import SHARED, needs_shared
from tests.data.test_folders import comparison
from tests.data.test_rows import write
from tests.support.scripts import run_script


def row(i, **changes):
    ask = f"\n\nHuman: Name number {i}.\n\nAssistant:"
    return {"id": f"r{i}", "prompt": ask, "chosen": f" {i}.", "rejected": " No.", **changes}


def prepare(tmp_path, data, *flags, expect=0):
    done = run_script("prepare_data.py", "--data", data, "--out", tmp_path / "out", *flags, expect=expect)
    if expect:
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("prepare_data.py: error: ")
        assert not (tmp_path / "out" / "manifest.json").exists()
        return done.stderr
    splits = {split: read_rows(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "test")}
    return done.stdout, splits, read_json(tmp_path / "out" / "manifest.json")


def test_a_file_is_divided_and_the_format_and_form_are_recorded(tmp_path):
    same, blank = row(30, rejected=" 30.\n"), row(31, chosen=" ")
    file = write(tmp_path / "rows.jsonl", *(row(i, domain="ab"[i // 10]) for i in range(20)), same, blank)
    told, splits, manifest = prepare(tmp_path, file)
    assert told == (
        f"data: 18 training and 2 test pairs from {file}, read as rows of this project; "
        "1 dropped: same response twice; 1 dropped: empty response\n"
    )
    assert Counter(r.domain for r in splits["test"]) == {"a": 1, "b": 1}
    results = manifest["results"]
    assert results["format"] == "rows of this project"
    assert results["prompt_form"] == "dialogue"
    assert results["dropped"] == {"same response twice": 1, "empty response": 1}


def test_a_test_file_of_ones_own_is_the_test_split_and_an_input_of_the_stage(tmp_path):
    file = write(tmp_path / "rows.jsonl", *(row(i) for i in range(10)))
    pair = {"from": "gpt", "value": "Yes."}, {"from": "gpt", "value": "No."}
    asked = [{"conversations": [{"from": "human", "value": q}], "chosen": pair[0], "rejected": pair[1]} for q in "xy"]
    tests = tmp_path / "tests.json"
    tests.write_text(
        json.dumps([*asked, {**asked[0], "conversations": [{"from": "human", "value": "Name number 3."}]}])
    )
    told, splits, manifest = prepare(tmp_path, file, "--test_data", tests)
    assert "9 training and 3 test pairs" in told
    assert "1 dropped: prompt is in the test split" in told
    assert "r3" not in {r.id for r in splits["train"]}
    assert set(manifest["inputs"]) == {"data", "test_data"}
    assert list(manifest["inputs"]["test_data"]["sha256"]) == ["tests.json"]


def test_caps_take_rows_from_everywhere(tmp_path):
    file = write(tmp_path / "rows.jsonl", *(row(i, domain="ab"[i // 100]) for i in range(200)))
    told, splits, _ = prepare(tmp_path, file, "--train", 40, "--test", 8)
    assert "140 dropped: beyond --train; 12 dropped: beyond --test" in told
    assert (len(splits["train"]), len(splits["test"])) == (40, 8)
    assert {r.domain for r in splits["train"]} == {"a", "b"}  # by chance one of them alone: below 1e-12
    numbers = [int(r.id[1:]) for r in splits["train"]]
    assert numbers == sorted(numbers)


def test_batches_of_comparisons_make_both_splits(tmp_path):
    posts = [{"post": f"I fell {i} times.", "title": "Help", "subreddit": "advice"} for i in range(4)]
    rows = [comparison(info=p, split=s) for p, s in zip(posts, ("train", "valid1", "valid2", "train"), strict=True)]
    write(tmp_path / "tldr" / "comparisons" / "batch3.json", *rows)
    told, _, manifest = prepare(tmp_path, tmp_path / "tldr", "--task", "tldr")
    assert "2 training and 2 test pairs" in told
    assert manifest["results"]["prompt_form"] == "post"
    assert manifest["results"]["format"] == "TL;DR comparisons"


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([row(1), row(1)], [], "rows.jsonl:2: has the same id as "),
        ([row(1), row(2, noise=0.7)], [], "rows.jsonl:2: field 'noise' is 0.7"),
        ([row(1, rejected=" 1.")], [], "no row is left for the train split; 1 dropped: same response twice"),
        ([row(1)], [], "read as rows of this project: 1 row with a single prompt cannot be divided"),
        ([row(1), row(2, prompt=row(1)["prompt"])], [], "2 rows with a single prompt"),
        ([], [], "rows.jsonl: contains no rows"),
        ([row(1), row(2)], ["--test_data", "{}/rows.jsonl"], "needs --data with other rows"),
        ([row(1), row(2)], ["--test_data", "{}/nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        ([row(1), row(2)], ["--test_data", "{}"], ": a folder; name a file in it"),
        (
            [row(1), row(2)],
            ["--test_data", "{}/copy.jsonl"],
            "no row is left for the train split; 2 dropped: prompt is",
        ),
        ([row(1), row(2)], ["--held_out", 1], "--held_out 1: must be above 0 and below 1"),
    ],
)
def test_bad_data_is_refused_by_the_first_stage_in_one_line(tmp_path, rows, flags, message):
    file = write(tmp_path / "rows.jsonl", *rows)
    write(tmp_path / "copy.jsonl", *rows)
    assert message in prepare(tmp_path, file, *(str(flag).format(tmp_path) for flag in flags), expect=2)


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for task in ("hh", "tldr"):
        assert f"{tmp_path}/empty: has n" in prepare(tmp_path, tmp_path / "empty", "--task", task, expect=2)


def test_a_test_file_is_refused_for_the_built_in_world(tmp_path):
    assert "--test_data x: needs --data" in prepare(tmp_path, "builtin", "--test_data", "x", expect=2)


CASES = SHARED / "cases"


@needs_shared
@pytest.mark.parametrize(
    ("case", "counts"),
    [
        ("nullid.jsonl", (18, 2)),
        ("nulldomain.jsonl", (18, 2)),
        ("sorted.jsonl", (18, 2)),
        ("same.jsonl", (9, 1)),
        ("bom_row.jsonl", (2, 1)),
        ("blank_end.jsonl", (1, 1)),
    ],
)
def test_the_cases_are_read(tmp_path, case, counts):
    _, splits, manifest = prepare(tmp_path, CASES / case)
    assert (len(splits["train"]), len(splits["test"])) == counts
    if case == "sorted.jsonl":
        assert {r.domain for r in splits["test"]} == {r.domain for r in splits["train"]}
    if case == "nulldomain.jsonl":
        assert manifest["results"]["domains"]["train"] == {"": 18}


@needs_shared
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("dupid.jsonl", "dupid.jsonl:2: has the same id as"),
        ("n07.jsonl", "n07.jsonl:1: field 'noise' is 0.7"),
        ("allsame.jsonl", "12 dropped: same response twice"),
        ("hh_twice", "train.jsonl.gz: two files of one split"),
    ],
)
def test_the_cases_are_refused(tmp_path, case, message):
    assert message in prepare(tmp_path, CASES / case, expect=2)
