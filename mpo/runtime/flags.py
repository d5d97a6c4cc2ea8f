"""The command line, generated from a config dataclass (mpo/config.py).

Each field is a flag. The comment after a field is its help text, and a comment on a line of its own is the heading
of the fields below it. Field types are str, bool, Literal (a choice), and int or float with the range of their values.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import math
import re
import sys
import textwrap
import typing
from dataclasses import MISSING, Field, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from mpo.config import Range
from mpo.runtime.errors import InputError

C = TypeVar("C")
MOST = 1 << 31  # whole numbers are below this, since compiled code may keep them in 32 bits


def parse(config_class: type[C], argv: list[str]) -> C:
    """Build a config from flags: --name value or --name=value, with underscores or dashes.

    Raises InputError, in one line, for an unknown flag (naming the nearest), a wrong value or a missing flag.
    """
    known = {field.name: field for field in fields(config_class)}  # type: ignore[arg-type]
    values, unknown = _parser(config_class, known).parse_known_args(_with_values(argv))
    if unknown:
        word = unknown[0].partition("=")[0] if unknown[0].startswith("--") else unknown[0]
        near = difflib.get_close_matches(word.lstrip("-"), known, 1)
        hint = f"; did you mean --{near[0]}?" if near else " (--help lists every flag)"
        raise InputError(f"unknown flag {word}{hint}")
    if missing := [
        f"--{k}" for k, value in vars(values).items() if known[k].default is MISSING and value in (None, "")
    ]:
        raise InputError(f"the following flags are required: {', '.join(missing)} (--help lists every flag)")
    return config_class(**vars(values))


def _with_values(argv: list[str]) -> list[str]:
    """Flags in one spelling, each joined with its value: --max-prompt 7 -> --max_prompt=7.

    So a value may start with a dash (--lr -1e-3), which argparse would take for a flag.
    """
    for word in argv:
        if not word.isascii() and any("\ud800" <= c <= "\udfff" for c in word):  # Python's stand-ins for such bytes
            raise InputError(f"{word}: not valid UTF-8")
    words = [re.sub(r"^--[^=]+", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in argv]
    joined, i = list[str](), 0
    while i < len(words):
        word, following = words[i], words[i + 1 : i + 2]
        whole = not word.startswith("--") or "=" in word or word == "--help"
        whole = whole or not following or following[0].startswith("--")
        joined.append(word if whole else f"{word}={following[0]}")
        i += 1 if whole else 2
    return joined


def read_number(name: str, kind: type[int | float], bounds: Range, text: str) -> int | float:
    """Read a number that a user has typed, as the value of `name`. Raises InputError where it is not in its range."""
    shown = f"{name} {text or repr(text)}"
    try:
        number = kind(text)
    except ValueError:
        raise InputError(f"{shown}: not a {'whole number in digits' if kind is int else 'number'}") from None
    if kind is float and not math.isfinite(number):
        raise InputError(f"{shown}: must be a finite number")
    if not bounds.has(max(-MOST, min(number, MOST))):
        raise InputError(f"{shown}: must be {bounds}")
    if number >= MOST and kind is int:
        raise InputError(f"{shown}: must be below 2^31")
    return number


def headings(config_class: type) -> dict[str, dict[str, str]]:
    """heading -> {field: its comment}, in the order of --help: what the class itself declares comes first.

    A field that a class declares again stands where that class has it.
    """
    groups: dict[str, dict[str, str]] = {}
    placed = set[str]()
    for base in config_class.__mro__[:-1]:
        heading = "flags"
        for line in inspect.getsource(base).splitlines():
            if match := re.fullmatch(r"    # (\w.*)", line):
                heading = match[1]
            elif (match := re.fullmatch(r"    (\w+): .*?  # (.*)", line)) and match[1] not in placed:
                groups.setdefault(heading, {})[match[1]] = match[2]
                placed.add(match[1])
    return groups


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists every flag)")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help texts that are broken only at spaces, so that a list such as q_proj,k_proj stays in one piece."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_long_words=False, break_on_hyphens=False)


def _parser(config_class: type, known: dict[str, Field[Any]]) -> argparse.ArgumentParser:
    program, types = Path(sys.argv[0]).name, typing.get_type_hints(config_class, include_extras=True)
    groups = headings(config_class)
    needed = [name for comments in groups.values() for name in comments if known[name].default is MISSING]
    description = inspect.cleandoc(config_class.__doc__ or "")
    usage = " ".join([program, *(f"--{name} {name.upper()}" for name in needed), "[--FLAG VALUE ...]"])
    parser = _Parser(program, usage, description, allow_abbrev=False, formatter_class=_Formatter)
    for heading, comments in groups.items():
        group = parser.add_argument_group(heading)
        for name, comment in comments.items():
            group.add_argument(
                f"--{name}", **_argument(f"{config_class.__name__}.{name}", types[name], known[name].default, comment)
            )
    return parser


def _argument(field: str, kind: Any, default: Any, comment: str) -> dict[str, Any]:
    """What argparse has to know of a flag; the range of its values and its default become part of its help."""
    bounds = None
    if typing.get_origin(kind) is Annotated:
        kind, bounds = typing.get_args(kind)
    if kind in (int, float) and bounds is None:
        raise TypeError(f"{field}: a number needs a range, such as Positive or Size (mpo/config.py)")
    name, choices = f"--{field.split('.')[1]}", typing.get_args(kind) or None
    facts = [str(bounds)] if bounds else []
    facts += [] if default is MISSING else [f"default: {'none' if default == '' else default}"]
    return {
        "type": _boolean if kind is bool else partial(read_number, name, kind, bounds) if bounds else str,
        "choices": choices,
        "default": None if default is MISSING else default,  # `parse` refuses None, but only after unknown flags
        "metavar": None if choices else kind.__name__.upper(),
        "help": comment.replace("%", "%%") + (f" ({'; '.join(facts)})" if facts else ""),
    }


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, found {text!r}")
    return text.lower() == "true"


def exact_div(whole: int, part: int, whole_name: str, part_name: str) -> int:
    """whole / part. Raises InputError for a division that does not come out, or a number below 1."""
    if part < 1 or whole < 1:
        raise InputError(f"{whole_name} {whole} and {part_name} {part} must both be positive")
    if whole % part:
        raise InputError(f"{whole_name} {whole} must be a multiple of {part_name} {part}")
    return whole // part
