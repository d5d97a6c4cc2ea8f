"""Break good input at random: bytes, JSON values, and lines of JSON."""

from __future__ import annotations

import json
import random
from typing import Any

# Values and bytes that are known to break careless readers.
WORDS: list[Any] = [None, True, False, [], {}, [[]], {"a": {}}, [None]]
WORDS += [0, -1, 1, 2**31, 2**63, 2**64, 10**40, 1e308, -0.0, 0.5, float("nan"), float("inf")]
WORDS += ["", " ", "\x00", "\ud800", "\n\nAssistant:", "\n\nHuman:", "../../etc/passwd", "/dev/zero", "a" * 70_000]
BYTES = [
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r",
    b"\n\n",
    b"{",
    b"}",
    b'"',
    b"[" * 5000,
    b"NaN",
    b"1e999",
    b"9" * 5000,
]


def broken_bytes(data: bytes, draw: random.Random) -> bytes:
    """Change the bytes in one to four places: cut off the end, overwrite, delete, repeat, insert, or flip a bit."""
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        end = min(len(data), at + draw.choice((1, 2, 8, 100, 5000)))
        before, chunk, after = data[:at], data[at:end], data[end:]
        how = draw.choice(("cut", "overwrite", "delete", "repeat", "insert", "flip"))
        if how == "cut":
            chunk = after = b""
        elif how == "overwrite":
            chunk = draw.randbytes(len(chunk))
        elif how == "delete":
            chunk = b""
        elif how == "repeat":
            chunk *= draw.randint(2, 4)
        elif how == "insert":
            chunk = draw.choice(BYTES) + chunk
        elif chunk:
            chunk = bytes([chunk[0] ^ (1 << draw.randrange(8))]) + chunk[1:]
        data = before + chunk + after
    return data


def broken_value(value: Any, draw: random.Random) -> Any:
    """Replace or delete one value at a random depth of a JSON value."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        if draw.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: broken_value(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.85:
        at = draw.randrange(len(value))
        return [*value[:at], *([broken_value(value[at], draw)] if draw.random() < 0.8 else []), *value[at + 1 :]]
    if isinstance(value, int) and draw.random() < 0.5:
        return draw.choice((value + 1, value - 1, -value, value * 2, value * 10**9, str(value), float(value)))
    return draw.choice(WORDS)


def broken_json(text: str, draw: random.Random) -> bytes:
    """Break JSON text: replace or delete one of its values, or break its bytes."""
    if draw.random() < 0.3:
        return broken_bytes(text.encode(), draw)
    return json.dumps(broken_value(json.loads(text), draw)).encode()


def broken_lines(text: str, draw: random.Random) -> bytes:
    """Break one of several lines of JSON."""
    lines = [line.encode() for line in text.splitlines()]
    at = draw.randrange(len(lines))
    lines[at] = broken_json(lines[at].decode(), draw)
    return b"\n".join(lines) + b"\n"
