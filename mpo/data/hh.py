"""Anthropic's HH-RLHF (2204.05862): pairs of dialogues {"chosen", "rejected"} that differ in the last reply."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

from mpo.data.dialogue import ASSISTANT, HUMAN
from mpo.data.files import convert_all, one_of_each
from mpo.data.rows import Found, Item, Row, Unusable, make_row, read_jsonl, text_field, with_ids
from mpo.runtime.errors import InputError


def split_dialogue(where: str, text: str) -> tuple[str, str]:
    """Split a dialogue after its last "\\n\\nAssistant:" into prompt and response.

    Raises InputError, with `where` in front, for a text that is not a dialogue.
    """
    if text.lstrip().startswith("Human:"):
        text = "\n\n" + text.lstrip()  # copies of the data set may lack the line breaks in front
    at = text.rfind(ASSISTANT)
    if at < 0 or not text.startswith(HUMAN):
        raise InputError(f"{where}: not a dialogue of '\\n\\nHuman:' and '\\n\\nAssistant:' turns")
    at += len(ASSISTANT)
    return text[:at], text[at:]


def parse(where: str, item: Item, domain: str = "") -> Row:
    """Convert one official row.

    A few pairs of dialogues differ before the last reply. They do not answer the same prompt, and are unusable.

    Raises InputError, with `where` in front, for a row of another form; Unusable where it makes no pair.
    """
    prompt, chosen = split_dialogue(where, text_field(where, item, "chosen"))
    other, rejected = split_dialogue(where, text_field(where, item, "rejected"))
    for reason, holds in (
        ("prompts differ", prompt != other),
        ("empty response", not chosen.strip() or not rejected.strip()),
        ("same response twice", chosen.strip() == rejected.strip()),
        ("a turn within a response", HUMAN in chosen or HUMAN in rejected),
    ):
        if holds:
            raise Unusable(reason)
    return make_row(where, item, prompt, chosen, rejected, domain)


def read_folder(folder: Path, split: str, dropped: Counter[str]) -> list[Row]:
    """All rows of one split ("train" or "test") from a folder in the official layout.

    The layout is `<subset>/<split>.jsonl.gz` (or .jsonl). The subset becomes the domain of its rows.

    Raises InputError for a folder without such files, or a file that is damaged or of another form.
    """
    files = sorted(p for p in folder.glob(f"*/{split}.jsonl*") if p.name.endswith((".jsonl", ".jsonl.gz")))
    if not files:
        raise InputError(
            f"{folder}: has no <subset>/{split}.jsonl.gz; expected the layout of HH-RLHF (to read one file, name it)"
        )
    found = list[Found]()
    for file in one_of_each(files):
        subset = file.parent.name
        found += convert_all(read_jsonl(file), partial(parse, domain=subset), f"{subset}-{split}", dropped)
    return with_ids(found)
