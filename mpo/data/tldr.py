"""OpenAI's summarize-from-feedback (2009.01325): comparisons of two summaries of a Reddit post, with a choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mpo.data.files import convert_all, one_of_each, stem
from mpo.data.rows import Found, Item, Row, Unusable, read_jsonl, text_field, with_ids
from mpo.runtime.errors import InputError

SPLITS = {"train": "train", "test": "valid"}  # OpenAI calls its held-out splits "valid1" and "valid2"
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")  # of files that all hold one JSON object a line


def prompt_text(subreddit: str, title: str, post: str) -> str:
    """A post in the prompt format of the TL;DR task."""
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title.strip()}\n\nPOST: {post.strip()}\n\nTL;DR:"


def parse(where: str, item: Item) -> Row:
    """Convert one comparison. The id of its post is not an id of the row: a post has several comparisons.

    Raises InputError, with `where` in front, for a comparison of another form; Unusable where it makes no pair.
    """
    info, summaries, choice = item.get("info"), item.get("summaries"), item.get("choice")
    if not isinstance(info, dict):
        raise InputError(f"{where}: field 'info' is missing or not an object")
    if not (isinstance(summaries, list) and len(summaries) == 2 and all(isinstance(s, dict) for s in summaries)):
        raise InputError(f"{where}: field 'summaries' must be a list of two objects")
    if choice not in (0, 1) or isinstance(choice, bool):
        raise InputError(f"{where}: field 'choice' must be 0 or 1, found {choice!r}")
    if not isinstance(info.get("post"), str):  # the CNN/DM part of the data set has news articles instead
        raise Unusable("no Reddit post")
    prompt = prompt_text(*(text_field(where, info, name) for name in ("subreddit", "title", "post")))
    first, second = (text_field(where, s, "text").strip() for s in summaries)
    if not first or not second:
        raise Unusable("empty response")
    chosen, rejected = (first, second) if choice == 0 else (second, first)
    return Row("", prompt, " " + chosen, " " + rejected, info["subreddit"])


def files_of(folder: Path, split: str) -> tuple[list[Path], bool]:
    """The files that hold a split, and whether they hold other splits, too.

    Files of a split are named after it: train.json, valid.json. In OpenAI's own download, batch*.json hold all splits.

    Raises InputError for a folder with neither or both.
    """
    base = folder / "comparisons" if (folder / "comparisons").is_dir() else folder
    files = sorted(p for p in base.iterdir() if p.name.endswith(SUFFIXES))
    named = {name: [p for p in files if p.name.startswith(name)] for name in SPLITS.values()}
    batches = [p for p in files if p.name.startswith("batch")]
    if batches and (of_a_split := [*named["train"], *named["valid"]]):
        raise InputError(
            f"{of_a_split[0]} and {batches[0]}: files of one split beside files of all splits, which would be read "
            f"twice; keep the two in different folders"
        )
    if not batches and not named[SPLITS[split]]:
        raise InputError(
            f"{folder}: has neither comparisons/{SPLITS[split]}.json nor comparisons/batch*.json; "
            f"expected OpenAI's layout (to read one file, name it)"
        )
    return one_of_each(batches or named[SPLITS[split]]), bool(batches)


def rows_of(file: Path, split: str, mixed: bool, dropped: Counter[str]) -> Iterator[tuple[str, Item]]:
    """Yield ("file:line", comparison) for the comparisons of one split in a file, told apart by their field `split`.

    Comparisons that belong to no split that is read are counted, once. Raises InputError, in a file of several splits,
    for a comparison that does not say which is its own.
    """
    name = SPLITS[split]
    for where, item in read_jsonl(file):
        own = text_field(where, item, "split") if mixed else str(item.get("split", name))
        if own.startswith(name):
            yield where, item
        elif not mixed or (split == "train" and not own.startswith(tuple(SPLITS.values()))):
            dropped["of another split"] += 1


def read_folder(folder: Path, split: str, dropped: Counter[str]) -> list[Row]:
    """All rows of one split ("train" or "test") from a folder with comparisons/{train,valid}.json, or batch*.json.

    Raises InputError for a folder without such files, or a file that is damaged or of another form.
    """
    files, mixed = files_of(folder, split)
    found = list[Found]()
    for file in files:
        name = f"{stem(file)}-{split}" if mixed else stem(file)
        found += convert_all(rows_of(file, split, mixed, dropped), parse, name, dropped)
    return with_ids(found)
