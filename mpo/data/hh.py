"""Anthropic's HH-RLHF: whole dialogues {"chosen", "rejected"} that differ in the last reply."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from mpo.data.rows import Row, read_jsonl, text_field
from mpo.runtime.errors import InputError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def split_dialogue(where: str, text: str) -> tuple[str, str]:
    """Cut a dialogue behind its last "\\n\\nAssistant:": (prompt, response)."""
    at = text.rfind(ASSISTANT)
    if at < 0 or not text.startswith(HUMAN):
        raise InputError(f"{where}: not a dialogue of '\\n\\nHuman:' and '\\n\\nAssistant:' turns")
    at += len(ASSISTANT)
    return text[:at], text[at:]


def parse(where: str, item: dict[str, Any], row_id: str, domain: str, dropped: Counter[str]) -> Row | None:
    """One official row to a Row; None, with the reason counted, where no pair can be made of it.

    Two dialogues that part before the last reply (a handful do) share no prompt to compare on.
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
    """All rows of one split ("train" or "test") of a folder in the official layout.

    The layout is `<subset>/<split>.jsonl.gz` (or .jsonl); the subset becomes the row's domain.
    """
    files = sorted(p for p in folder.glob(f"*/{split}.jsonl*") if p.name.endswith((".jsonl", ".jsonl.gz")))
    if not files:
        raise InputError(f"{folder}: no <subset>/{split}.jsonl.gz in it; expected the layout of HH-RLHF")
    rows = []
    for file in files:
        subset = file.parent.name
        for i, (where, item) in enumerate(read_jsonl(file)):
            row = parse(where, item, f"{subset}-{split}-{i}", subset, dropped)
            if row is not None:
                rows.append(row)
    return rows
