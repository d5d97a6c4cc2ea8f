"""A folder of data files as data sets are published: which files are the training split, and which the test split.

The names say it: data/train-00000-of-00002.parquet, train_prefs.jsonl, default/train/0.json. Of the names of a test
split, the first in TEST counts. Where there are several training splits, one that ends in "prefs" (preferences) counts.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from mpo.data.files import one_of_each, read_objects
from mpo.data.formats import read_files, recognised
from mpo.data.rows import Item, Row
from mpo.runtime.errors import InputError
from mpo.runtime.manifest import HUB

TRAIN, TEST = ("train", "training"), ("test", "validation", "valid", "dev", "eval")
SUFFIX = re.compile(r"\.(jsonl|json|csv|parquet)(\.gz)?$")
SHARD = re.compile(r"[-_.]\d+(-of-\d+)?$")  # the number of one file of several
OFFICIAL = {  # task -> files of its official layout (hh.py, tldr.py), and the format of their rows
    "hh": (("*/train.jsonl*", "*/test.jsonl*"), "HH pairs"),
    "tldr": (("comparisons/*.json*", "*.json*"), "TL;DR comparisons"),
}


def is_meant(folder: Path, task: str) -> bool:
    """Whether a folder holds a published data set rather than the official layout of a task, or nothing at all.

    Some names fit both, such as data/train.jsonl. Then the first row decides.
    """
    patterns, form = OFFICIAL[task]
    named = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.name != HUB]
    if named:
        try:
            return recognised(next(iter(read_objects(named[0])), ("", Item()))[1]) != form
        except InputError:  # which the reader of the official layout reports
            return False
    return any(_name(path, folder) for path in data_files(folder))


def data_files(folder: Path) -> list[Path]:
    """The files of a folder that can hold rows; not those of a hub's own records, or about the download."""
    inside = [p.relative_to(folder) for p in folder.rglob("*") if SUFFIX.search(p.name)]
    seen = [p for p in inside if not any(part.startswith(".") for part in p.parts)]
    return sorted(folder / p for p in seen if p.name not in (HUB, "dataset_infos.json"))


def _name(path: Path, folder: Path) -> str | None:
    """What a file is a part of, such as "data/train_prefs"; None for a file without a split in its name."""
    parts = [*path.relative_to(folder).parts[:-1], SHARD.sub("", SUFFIX.sub("", path.name))]
    for i in reversed(range(len(parts))):
        if re.split(r"[-_.]", parts[i])[0] in TRAIN + TEST:
            return "/".join(parts[: i + 1])
    return None


def _word(name: str) -> str:
    return re.split(r"[-_.]", name.rpartition("/")[2])[0]


def files_of(folder: Path) -> dict[str, list[Path]]:
    """{"train": files, "test": files}, or the former alone where no name says that it is a test split.

    Raises InputError where no file can be read, where it is not clear which ones are meant, or where two files differ
    in their suffixes alone.
    """
    groups: dict[str, list[Path]] = {}
    for path in (everything := data_files(folder)):
        if name := _name(path, folder):
            groups.setdefault(name, []).append(path)
    if not groups and len(everything) == 1:
        return {"train": everything}
    train = _one(folder, [name for name in groups if _word(name) in TRAIN], "training")
    tests = [[name for name in groups if _word(name) == word] for word in TEST]
    test = _one(folder, next(filter(None, tests), []), "test")
    if train is None:
        raise InputError(
            f"{folder}: has no file that is named as a training split (train.jsonl, "
            f"data/train-00000-of-00002.parquet); name the file of the pairs, not the folder"
        )
    named = {"train": train} | ({"test": test} if test else {})
    return {split: one_of_each(groups[name]) for split, name in named.items()}


def _one(folder: Path, names: list[str], split: str) -> str | None:
    """The only one of these names, or the only one that ends in "prefs"; None where there is none."""
    preferences = [name for name in names if name.endswith("prefs")]
    chosen = preferences if len(names) > 1 and preferences else names
    if len(chosen) > 1:
        raise InputError(
            f"{folder}: has several {split} splits, {', '.join(sorted(chosen))}; name the folder or file of one of them"
        )
    return chosen[0] if chosen else None


def read_folder(folder: Path, dropped: Counter[str]) -> tuple[str, dict[str, list[Row]]]:
    """The format of the pairs in a folder, and the rows of each split; see `files_of`. Raises InputError."""
    read = {split: read_files(files, dropped) for split, files in files_of(folder).items()}
    return read["train"][0], {split: rows for split, (_, rows) in read.items()}
