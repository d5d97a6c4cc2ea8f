"""OpenAI's summarize-from-feedback (2009.01325): comparisons of two summaries of a Reddit post, with a choice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from mpo.data.rows import Row, read_jsonl, text_field
from mpo.runtime.errors import InputError

SPLITS = {"train": "train", "test": "valid"}  # OpenAI calls its held-out split "valid"


def prompt_text(subreddit: str, title: str, post: str) -> str:
    """A post in the prompt format of the TL;DR task."""
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title.strip()}\n\nPOST: {post.strip()}\n\nTL;DR:"


def parse(where: str, item: dict[str, Any], row_id: str, dropped: Counter[str]) -> Row | None:
    """Convert one comparison. Returns None, and counts the reason in `dropped`, where it does not make a pair.

    Raises InputError, with `where` in front, for a comparison of another form.
    """
    info, summaries, choice = item.get("info"), item.get("summaries"), item.get("choice")
    if not isinstance(info, dict):
        raise InputError(f"{where}: field 'info' is missing or not an object")
    if not (isinstance(summaries, list) and len(summaries) == 2 and all(isinstance(s, dict) for s in summaries)):
        raise InputError(f"{where}: field 'summaries' must be a list of two objects")
    if choice not in (0, 1) or isinstance(choice, bool):
        raise InputError(f"{where}: field 'choice' must be 0 or 1, found {choice!r}")
    if not isinstance(info.get("post"), str):  # the CNN/DM part of the data set has news articles instead
        dropped["no Reddit post"] += 1
        return None
    prompt = prompt_text(*(text_field(where, info, name) for name in ("subreddit", "title", "post")))
    first, second = (text_field(where, s, "text").strip() for s in summaries)
    if not first or not second or first == second:
        dropped["empty response" if not first or not second else "same response twice"] += 1
        return None
    chosen, rejected = (first, second) if choice == 0 else (second, first)
    return Row(row_id, prompt, " " + chosen, " " + rejected, info["subreddit"])


def read_folder(folder: Path, split: str, dropped: Counter[str]) -> list[Row]:
    """All rows of one split ("train" or "test") from a folder with comparisons/{train,valid}.json, or batch*.json.

    Raises InputError for a folder without such files, or a file that is damaged or of another form.
    """
    name = SPLITS[split]
    base = folder / "comparisons" if (folder / "comparisons").is_dir() else folder
    files = sorted(base.glob(f"{name}*.json*"))
    if not files:
        files = [p for p in sorted(base.glob("batch*.json")) if split == "train"]
    if not files:
        raise InputError(f"{folder}: has no comparisons/{name}.json; expected OpenAI's layout")
    rows = []
    for file in files:
        for i, (where, item) in enumerate(read_jsonl(file)):
            if not str(item.get("split", name)).startswith(name):
                dropped["of another split"] += 1
            elif (row := parse(where, item, f"{file.stem}-{i}", dropped)) is not None:
                rows.append(row)
    return rows
