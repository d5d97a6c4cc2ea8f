"""Anthropic's HH-RLHF (2204.05862): pairs of dialogues {"chosen", "rejected"} that differ in the last reply."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from mpo.data.rows import Row, read_jsonl, text_field
from mpo.runtime.errors import InputError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def split_dialogue(where: str, text: str) -> tuple[str, str]:
    """Split a dialogue after its last "\\n\\nAssistant:" into prompt and response.

    Raises InputError, with `where` in front, for a text that is not a dialogue.
    """
    at = text.rfind(ASSISTANT)
    if at < 0 or not text.startswith(HUMAN):
        raise InputError(f"{where}: not a dialogue of '\\n\\nHuman:' and '\\n\\nAssistant:' turns")
    at += len(ASSISTANT)
    return text[:at], text[at:]


def parse(where: str, item: dict[str, Any], row_id: str, domain: str, dropped: Counter[str]) -> Row | None:
    """Convert one official row. Returns None, and counts the reason in `dropped`, where it does not make a pair.

    A few pairs of dialogues differ before the last reply. They do not answer the same prompt and are dropped, too.

    Raises InputError, with `where` in front, for a row of another form.
    """
    prompt, chosen = split_dialogue(where, text_field(where, item, "chosen"))
    other, rejected = split_dialogue(where, text_field(where, item, "rejected"))
    for reason, holds in (
        ("prompts differ", prompt != other),
        ("empty response", not chosen.strip() or not rejected.strip()),
        ("same response twice", chosen == rejected),
        ("human turn within a response", HUMAN in chosen or HUMAN in rejected),
    ):
        if holds:
            dropped[reason] += 1
            return None
    return Row(row_id, prompt, " " + chosen.strip(), " " + rejected.strip(), domain)


def read_folder(folder: Path, split: str, dropped: Counter[str]) -> list[Row]:
    """All rows of one split ("train" or "test") from a folder in the official layout.

    The layout is `<subset>/<split>.jsonl.gz` (or .jsonl). The subset becomes the domain of its rows.

    Raises InputError for a folder without such files, or a file that is damaged or of another form.
    """
    files = sorted(p for p in folder.glob(f"*/{split}.jsonl*") if p.name.endswith((".jsonl", ".jsonl.gz")))
    if not files:
        raise InputError(f"{folder}: has no <subset>/{split}.jsonl.gz; expected the layout of HH-RLHF")
    rows = []
    for file in files:
        subset = file.parent.name
        for i, (where, item) in enumerate(read_jsonl(file)):
            row = parse(where, item, f"{subset}-{split}-{i}", subset, dropped)
            if row is not None:
                rows.append(row)
    return rows
