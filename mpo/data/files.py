"""From a data file of any kind to JSON objects, each with its line number, and from these to rows."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

from mpo.data.dialogue import is_blank
from mpo.data.rows import BYTE_ORDER_MARK, LONGEST_LINE, Found, Item, Row, Unusable, as_object, opened, read_jsonl
from mpo.runtime.errors import InputError

LARGEST_LIST = 1 << 30  # characters: a list is read as a whole
NUMBERS = ("margin", "noise", "score_chosen", "score_rejected")  # fields of a csv file that are not texts
NEXT = re.compile(r"\s*([,\]])\s*")  # what may follow an item of a list


def stem(path: Path) -> str:
    """The name of a data file without its suffixes: "rows.jsonl.gz" -> "rows"."""
    return re.sub(r"(\.jsonl?|\.parquet|\.csv)?(\.gz)?$", "", path.name)


def one_of_each(files: list[Path]) -> list[Path]:
    """The files. Raises InputError where two differ in their suffixes only: every row would be read twice."""
    seen: dict[tuple[Path, str], Path] = {}
    for file in files:
        other = seen.setdefault((file.parent, stem(file)), file)
        if other is not file:
            raise InputError(
                f"{other} and {file}: two files of one split, whose rows would be read twice; keep one of them "
                f"elsewhere"
            )
    return files


def read_objects(path: Path) -> Iterator[tuple[str, Item]]:
    """Yield ("file:line", object) for each row of a file. In a parquet file, the line is the number of the row.

    Other files but .csv hold one object a line, or one JSON list of objects, whatever their name; .gz means gzipped.

    Raises InputError for a file that cannot be read, and naming the line for an object that is not valid.
    """
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.name.endswith((".csv", ".csv.gz")):
        return _read_csv(path)
    with opened(path) as text:
        start = text.read(1 << 16).lstrip(BYTE_ORDER_MARK + " \t\r\n")
    return _read_list(path) if start.startswith("[") else read_jsonl(path)


def _read_list(path: Path) -> Iterator[tuple[str, Item]]:
    with opened(path) as file:
        text = file.read(LARGEST_LIST + 1)
    if len(text) > LARGEST_LIST:
        raise InputError(f"{path}: a list of more than {LARGEST_LIST} characters; write one object a line (.jsonl)")
    decoder, line, counted = json.JSONDecoder(), 1, 0
    at = re.compile(r"\s*").match(text, text.index("[") + 1).end()  # type: ignore[union-attr]
    closed = text.startswith("]", at)
    at += closed
    while not closed:
        line, counted = line + text.count("\n", counted, at), at
        where = f"{path}:{line}"
        try:
            item, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            raise InputError(f"{where}: not valid JSON ({e})") from None
        yield where, as_object(where, item)
        after = NEXT.match(text, end)
        if not after:
            raise InputError(
                f"{where}: not valid JSON (the object is not followed by ',' or ']'); is the file complete?"
            )
        at, closed = after.end(), after[1] == "]"
    if rest := text[at:].strip():
        raise InputError(f"{path}: not valid JSON (text after the end of the list: {rest:.40})")


def _read_csv(path: Path) -> Iterator[tuple[str, Item]]:
    """The first line names the fields. An empty cell is a field that the row does not have, unless it is a text."""
    csv.field_size_limit(LONGEST_LINE)
    with opened(path) as text:
        reader = csv.reader(_without_mark(text), strict=True)
        line, names = 1, list[str]()
        try:
            for cells in reader:
                where, line = f"{path}:{line}", reader.line_num + 1
                if not names:
                    names = cells
                    if len(set(names)) < len(names):
                        raise InputError(
                            f"{where}: two columns have the same name; the first line must name the fields"
                        )
                elif cells and len(cells) != len(names):
                    raise InputError(f"{where}: has {len(cells)} cells, but the first line names {len(names)} fields")
                elif cells:
                    yield where, _item_of(where, dict(zip(names, cells, strict=True)))
        except csv.Error as e:
            raise InputError(f"{path}:{line}: not valid CSV ({e})") from None


def _without_mark(text: TextIO) -> Iterator[str]:
    for i, line in enumerate(text):
        yield line if i else line.removeprefix(BYTE_ORDER_MARK)


def _item_of(where: str, cells: dict[str, str]) -> Item:
    item: Item = {name: cell for name, cell in cells.items() if cell or name in ("prompt", "chosen", "rejected")}
    for name in NUMBERS:
        try:
            item |= {name: float(item[name])} if name in item else {}
        except ValueError:
            raise InputError(f"{where}: field {name!r} is {item[name]!r:.40}, not a number") from None
    return item


def _read_parquet(path: Path) -> Iterator[tuple[str, Item]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{path}: needs the pyarrow package (pip install pyarrow); or convert the file to .jsonl"
        ) from None
    if not path.is_file():
        raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for item in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", item
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise InputError(f"{path}: not a complete parquet file ({reason})") from None


def convert_all(
    objects: Iterable[tuple[str, Item]], convert: Callable[[str, Item], Row], name: str, dropped: Counter[str]
) -> Iterator[Found]:
    """Yield the rows of a file; count in `dropped` those that make no pair, such as two equal responses.

    Args:
        objects: ("file:line", object) of each row.
        convert: makes a row of such a pair; raises InputError or Unusable.
        name: a row without an id gets one from this name and its place in the file.
    """
    for i, (where, item) in enumerate(objects):
        try:
            row = convert(where, item)
            if is_blank(row.prompt):
                raise Unusable("blank prompt")
            if not row.chosen.strip() or not row.rejected.strip():
                raise Unusable("empty response")
            if row.chosen.strip() == row.rejected.strip():
                raise Unusable("same response twice")
        except Unusable as e:
            dropped[str(e)] += 1
        else:
            yield where, f"{name}-{i}", row
