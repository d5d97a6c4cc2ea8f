"""The language of the built-in worlds: sentences with a known meaning, and ways to spoil them.

Both worlds (hh.py, tldr.py) write text by joining complete sentences. Each world lists the sentences of its answers in
a *bank*, a dict from a sentence to its meaning, an `Act`. To read a text is to split it into sentences and to look each
one up. That is exact, works for every string, and is fast: tens of thousands of answers in a second.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Act = tuple[str, ...]
"""The meaning of a sentence: the name of what it does, then arguments, such as ("tip", "sleep better", "2")."""

Bank = dict[str, Act]

_SENTENCE = re.compile(r"[^.!?]*[.!?]+|[^.!?]+$")


@dataclass(frozen=True)
class Reading:
    """What the gold reward knows of a text."""

    acts: tuple[Act, ...]  # one for each different sentence of the bank, in order of appearance
    repeats: int  # sentences that occur earlier in the text, too
    unreadable: int  # complete sentences that are not in the bank
    unfinished: bool  # the text ends without a full stop, ! or ?
    words: int


def sentences(text: str) -> list[str]:
    """Split a text after ., ! and ?. Words after the last of these marks are a sentence, too, though without a mark."""
    return [s.strip() for s in _SENTENCE.findall(text) if s.strip()]


def read(text: str, bank: Mapping[str, Act]) -> Reading:
    """Read any string: sentences of the bank become acts, all others are counted."""
    acts: list[Act] = []
    seen: set[str] = set()
    repeats = unreadable = 0
    unfinished = False
    for sentence in sentences(text):
        if sentence in seen:
            repeats += 1
        elif sentence[-1] not in ".!?":
            unfinished = True
        elif sentence in bank:
            acts.append(bank[sentence])
        else:
            unreadable += 1
        seen.add(sentence)
    return Reading(tuple(acts), repeats, unreadable, unfinished, len(text.split()))


def add(bank: Bank, act: Act, texts: Iterable[str]) -> None:
    """Add sentences that have the same meaning to the bank.

    Raises ValueError if one of them is there already with another meaning, which is a bug in the tables.
    """
    for text in texts:
        if bank.setdefault(text, act) != act:
            raise ValueError(f"two meanings for one sentence: {text!r}")


def capital(text: str) -> str:
    """The text with its first letter in upper case and the rest unchanged."""
    return text[:1].upper() + text[1:]


def unfinish(rng: random.Random, text: str) -> str:
    """Cut a text off within its last sentence."""
    words = text.split()
    last = len(sentences(text)[-1].split()) if words else 0
    keep = len(words) - rng.randint(1, max(1, last - 1))
    return " ".join(words[: max(1, keep)]).rstrip(".!?")


def garble(rng: random.Random, text: str) -> str:
    """Put the words of a text into another order, with a full stop at the end."""
    words = text.rstrip(".!?").split()
    before = list(words)
    while words == before and len(set(words)) > 1:
        rng.shuffle(words)
    return " ".join(words) + "."


def repeat(rng: random.Random, text: str) -> str:
    """Repeat some of the sentences two or three times; if the draw picks none, the complete text twice."""
    out: list[str] = []
    for sentence in sentences(text):
        out += [sentence] * rng.choice((1, 2, 3))
    return " ".join(out if len(out) > len(sentences(text)) else out * 2)


SPOILERS = {"repeat": repeat, "garbled": garble, "unfinished": unfinish}


def spoil(rng: random.Random, text: str, mistakes: Iterable[str]) -> str:
    """Apply those of the mistakes that are in SPOILERS, which work on any text. The worlds make the others."""
    for name, change in SPOILERS.items():
        if name in mistakes:
            text = change(rng, text)
    return text


def draw_mistakes(
    rng: random.Random,
    count: Mapping[int, float],
    content: Mapping[str, float],
    form: Mapping[str, float],
) -> tuple[str, ...]:
    """Draw how many mistakes an answer makes, then which ones: of content, of form, or one of each.

    Each argument maps the possible values to their weights.
    """
    n = rng.choices(list(count), list(count.values()))[0]
    tables = (content, form) if rng.random() < 0.7 else (form, content)
    return tuple(rng.choices(list(t), list(t.values()))[0] for t in tables[:n])
