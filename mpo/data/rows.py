"""Rows: one preference pair each, one JSON object a line. How they are read, checked and written."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from mpo.runtime.errors import InputError
from mpo.runtime.files import write_text

LONGEST_LINE = 16 << 20  # characters
LARGEST_MARGIN = 1000.0  # rewards are of the order of 1: a larger margin is a mistake in its unit
BYTE_ORDER_MARK = "\ufeff"

Item = dict[str, Any]
"""One JSON object of a file, before it becomes a row."""
Found = tuple[str, str, "Row"]
"""("file:line", the id for a row that has none of its own, row)."""


@dataclass(frozen=True)
class Row:
    """One preference pair. A response starts with a space, as in HH-RLHF."""

    id: str
    prompt: str
    chosen: str
    rejected: str
    domain: str = ""
    margin: float | None = None  # how much better the annotator finds `chosen`, if known
    noise: float | None = None  # the probability that the label is wrong, if known
    where: str = field(default="", compare=False, repr=False)  # "file:line" that it was read from, for messages


class Unusable(Exception):
    """A row that is well formed but makes no pair. It is dropped, and counted under the message."""


@contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 text, gzipped if its name ends in .gz. Raises InputError, also while it is read."""
    if path.is_dir():
        raise InputError(f"{path}: a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a file")
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as text:
            yield text
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start}); convert it first") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise InputError(f"{path}: not a complete gzip file ({e}); download it again") from None
    except NotADirectoryError:
        raise InputError(f"{path.parent}: a file; name the folder that holds {path.name}") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror or e})") from None


def read_jsonl(path: Path) -> Iterator[tuple[str, Item]]:
    """Yield ("file:line", object) for each line of a .jsonl or .jsonl.gz file.

    A byte-order mark and blank lines are skipped. Raises InputError, naming file and line, for anything else that is
    not a JSON object.
    """
    with opened(path) as lines:
        number = 0
        while line := lines.readline(LONGEST_LINE + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > LONGEST_LINE:
                raise InputError(f"{where}: a line of more than {LONGEST_LINE} characters; no row is that long")
            line = line.removeprefix(BYTE_ORDER_MARK)
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise InputError(f"{where}: not a JSON object ({e}); each line must hold one") from None
            yield where, as_object(where, item)


def as_object(where: str, item: Any) -> Item:
    """The item. Raises InputError, with `where` in front, if it is not a JSON object."""
    if not isinstance(item, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(item).__name__}")
    return item


def text_field(where: str, item: Item, name: str) -> str:
    """The string in field `name`. Raises InputError, with `where` in front, if there is none."""
    value = item.get(name)
    if not isinstance(value, str):
        fault = "is missing" if name not in item else f"is {type(value).__name__}, not a string"
        raise InputError(f"{where}: field {name!r} {fault}")
    return whole_text(where, name, value)


def whole_text(where: str, name: str, value: str) -> str:
    """The value, checked: raises InputError for half of a surrogate pair, which JSON allows and UTF-8 does not."""
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise InputError(f"{where}: field {name!r} is not valid Unicode ({e.reason} at {e.start})") from None
    return value


def name_field(where: str, item: Item, name: str) -> str:
    """The string or number in field `name` as a string, "" if it is missing or null. Raises InputError for others."""
    value = item.get(name)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f"{where}: field {name!r} is {type(value).__name__}, not a string or a number")
    return whole_text(where, name, str(value))


def domain_field(where: str, item: Item) -> str:
    """The row's domain or, without one, its subset; "" if it has neither. Raises InputError as `name_field` does."""
    return name_field(where, item, "domain") or name_field(where, item, "subset")


def number_field(where: str, item: Item, name: str) -> float | None:
    """The number in field `name`, None if it is missing. Raises InputError for anything but a finite number."""
    value = item.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise InputError(f"{where}: field {name!r} is {value!r:.40}, not a finite number")
    return float(value)


def margin_field(where: str, item: Item) -> float | None:
    """The row's margin, None if it has none. Raises InputError for a number that is no margin."""
    margin = number_field(where, item, "margin")
    if margin is not None and not 0 <= margin <= LARGEST_MARGIN:
        raise InputError(f"{where}: field 'margin' is {margin:g}, not between 0 and {LARGEST_MARGIN:g}")
    return margin


def noise_field(where: str, item: Item) -> float | None:
    """The row's label noise, None if it has none. Raises InputError for a number that is not in [0, 1/2).

    A label that is wrong with a probability of 1/2 says nothing, and one that is more likely wrong should be swapped.
    """
    noise = number_field(where, item, "noise")
    if noise is not None and not 0 <= noise < 0.5:
        raise InputError(
            f"{where}: field 'noise' is {noise:g}, not at least 0 and below 0.5; "
            f"if the label is more likely wrong than right, swap 'chosen' and 'rejected'"
        )
    return noise


def parse_row(where: str, item: Item, prompt_alone: bool = False) -> Row:
    """An object in the project's own format, unaltered; a row without an id has the id "". Raises InputError.

    prompt_alone: the row needs no responses, which are "" then.
    """
    item = {"chosen": "", "rejected": ""} | item if prompt_alone else item
    return Row(
        id=name_field(where, item, "id"),
        prompt=text_field(where, item, "prompt"),
        chosen=text_field(where, item, "chosen"),
        rejected=text_field(where, item, "rejected"),
        domain=domain_field(where, item),
        margin=margin_field(where, item),
        noise=noise_field(where, item),
        where=where,
    )


def make_row(where: str, item: Item, prompt: str, chosen: str, rejected: str, domain: str = "") -> Row:
    """A row from the texts of another format, with the responses in the form of ours.

    The fields `id`, `domain`, `margin` and `noise` mean what they mean in our own rows. Where there is no margin, it is
    the difference of the fields `score_chosen` and `score_rejected`, or 0 if that is negative. Raises InputError.
    """
    margin = margin_field(where, item)
    better, worse = (number_field(where, item, f"score_{name}") for name in ("chosen", "rejected"))
    if margin is None and better is not None and worse is not None:
        margin = margin_field(where, {"margin": max(0.0, better - worse)})
    texts = prompt, " " + chosen.strip(), " " + rejected.strip()
    domain = domain or domain_field(where, item)
    return Row(name_field(where, item, "id"), *texts, domain, margin, noise_field(where, item))


def with_ids(found: Iterable[Found]) -> list[Row]:
    """The rows, each with an id. Raises InputError, naming both lines, where two rows have the same one."""
    found, taken = list(found), dict[str, str]()
    for where, _, row in found:
        if row.id in taken:
            raise InputError(f"{where}: has the same id as {taken[row.id]}, {row.id!r:.80}; ids must be unique")
        if row.id:
            taken[row.id] = where
    rows = []
    for where, name, row in found:
        if not row.id:
            while name in taken:  # another row has been given this name by hand
                name += "'"
            taken[name] = where
        rows.append(row if row.id else replace(row, id=name))
    return rows


def read_rows(path: str | Path, prompts_alone: bool = False) -> list[Row]:
    """Read rows in the project's own format: {"id", "prompt", "chosen", "rejected"} on each line.

    With `prompts_alone`, a row may have no responses. One without an id gets one from the file's name and its place.
    Raises InputError for a file without rows, and naming the line for a row that is not valid or whose id another row
    has.
    """
    path = Path(path)
    rows = with_ids(
        (where, f"{path.stem}-{i}", parse_row(where, item, prompts_alone))
        for i, (where, item) in enumerate(read_jsonl(path))
    )
    if not rows:
        raise InputError(f"{path}: contains no rows")
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows, all or none of them. Fields without a value are left out."""
    write_text(path, "".join(map(row_text, rows)))


def row_text(row: Row) -> str:
    """A row as a line of a file."""
    item = {k: v for k, v in asdict(row).items() if v not in ("", None) or k in ("prompt", "chosen", "rejected")}
    item.pop("where", None)
    return json.dumps(item, ensure_ascii=False) + "\n"
