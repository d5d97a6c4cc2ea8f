"""Folders of data files as data sets are published: which files are read as which split."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from mpo.data.published import files_of, is_meant, read_folder
from mpo.runtime.errors import InputError

PAIR = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
HH = {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."}


def write(folder, *names, row=PAIR):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row) + "\n")
    return folder


@pytest.mark.parametrize(
    ("names", "train", "test"),
    [
        (["train.jsonl", "test.jsonl"], ["train.jsonl"], ["test.jsonl"]),
        (["train.csv", "dev.csv", "validation.csv"], ["train.csv"], ["validation.csv"]),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], None, []),
        (["default/train/0.json", "default/train/1.json", "default/test/0.json"], None, ["default/test/0.json"]),
        (["pairs.json"], ["pairs.json"], []),
        (["data/train_sft.jsonl", "data/train_prefs.jsonl", "data/test_prefs.jsonl", "data/test_gen.jsonl"], 1, 2),
        ([".cache/x/train.json", "hub.json", "dataset_infos.json", "train.json.gz"], ["train.json.gz"], []),
    ],
)
def test_names_say_which_files_belong_to_a_split(tmp_path, names, train, test):
    write(tmp_path, *names)
    files = {split: [str(p.relative_to(tmp_path)) for p in paths] for split, paths in files_of(tmp_path).items()}
    expected = {"train": [names[train]] if isinstance(train, int) else train or [n for n in names if "train" in n]}
    if test:
        expected["test"] = [names[test]] if isinstance(test, int) else test
    assert files == expected


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a/train.jsonl", "b/train.jsonl"], "has several training splits, a/train, b/train; name the folder or file"),
        (["x.jsonl", "y.jsonl"], "no file that is named as a training split"),
        (["train.jsonl", "a/test.jsonl", "b/test.jsonl"], "has several test splits, a/test, b/test"),
        (["README.md"], "no file that is named as a training split"),
        (["train.jsonl", "train.csv"], "two files of one split, whose rows would be read twice"),
    ],
)
def test_a_folder_that_leaves_it_open_is_refused(tmp_path, names, words):
    with pytest.raises(InputError, match=words):
        files_of(write(tmp_path, *names))


def test_the_rows_of_all_files_of_a_split_are_read_in_order(tmp_path):
    for i in range(3):
        write(tmp_path, f"data/train-0000{i}-of-00003.jsonl", row=PAIR | {"chosen": f"Because {i}."})
    write(tmp_path, "data/test-00000-of-00001.jsonl")
    name, splits = read_folder(tmp_path, Counter())
    assert name == "TRL pairs"
    assert [row.chosen.strip() for row in splits["train"]] == ["Because 0.", "Because 1.", "Because 2."]
    assert len({row.id for row in splits["train"]}) == 3
    assert len(splits["test"]) == 1


def test_the_official_layouts_are_left_to_their_readers(tmp_path):
    assert not is_meant(write(tmp_path / "hh", "helpful-base/train.jsonl", "helpful-base/test.jsonl", row=HH), "hh")
    assert is_meant(write(tmp_path / "own", "data/train.jsonl", "data/test.jsonl"), "hh")
    comparison = {"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}
    assert not is_meant(write(tmp_path / "tldr", "comparisons/train.json", row=comparison), "tldr")
    assert is_meant(write(tmp_path / "other", "train.json", "valid.json"), "tldr")
    (tmp_path / "empty").mkdir()
    assert not is_meant(tmp_path / "empty", "hh")
