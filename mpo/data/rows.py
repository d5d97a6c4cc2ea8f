"""Rows: one preference pair each, one JSON object a line. How they are read, checked and written."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpo.runtime.errors import InputError
from mpo.runtime.files import write_text

LONGEST_LINE = 16 << 20  # characters


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


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file:line", object) for each line of a .jsonl or .jsonl.gz file.

    Raises InputError, naming file and line, for anything that is not a JSON object.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a file")
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            number = 0
            while line := lines.readline(LONGEST_LINE + 1):
                number += 1
                where = f"{path}:{number}"
                if len(line) > LONGEST_LINE:
                    raise InputError(f"{where}: a line of more than {LONGEST_LINE} characters; no row is that long")
                try:
                    item = json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise InputError(f"{where}: not a JSON object ({e}); each line must hold one") from None
                if not isinstance(item, dict):
                    raise InputError(f"{where}: expected a JSON object, found {type(item).__name__}")
                yield where, item
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start}); convert it first") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise InputError(f"{path}: not a complete gzip file ({e}); download it again") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror or e})") from None


def text_field(where: str, item: dict[str, Any], name: str) -> str:
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


def number_field(where: str, item: dict[str, Any], name: str) -> float | None:
    """The number in field `name`, None if it is missing. Raises InputError for anything but a finite number."""
    value = item.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise InputError(f"{where}: field {name!r} is {value!r:.40}, not a finite number")
    return float(value)


def read_rows(path: str | Path) -> list[Row]:
    """Read rows in the project's own format: {"id", "prompt", "chosen", "rejected"} on each line.

    A row without an id gets one from the file's name and its place. Raises InputError for a file without rows, and
    naming the line for a row that is not valid.
    """
    path = Path(path)
    rows: list[Row] = []
    for where, item in read_jsonl(path):
        rows.append(
            Row(
                id=whole_text(where, "id", str(item.get("id", f"{path.stem}-{len(rows)}"))),
                prompt=text_field(where, item, "prompt"),
                chosen=text_field(where, item, "chosen"),
                rejected=text_field(where, item, "rejected"),
                domain=whole_text(where, "domain", str(item.get("domain", ""))),
                margin=number_field(where, item, "margin"),
                noise=number_field(where, item, "noise"),
            )
        )
    if not rows:
        raise InputError(f"{path}: contains no rows")
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows, all or none of them. Fields without a value are left out."""
    lines = []
    for row in rows:
        item = {k: v for k, v in asdict(row).items() if v not in ("", None) or k in ("chosen", "rejected")}
        lines.append(json.dumps(item, ensure_ascii=False))
    write_text(path, "".join(line + "\n" for line in lines))
