"""The command line, generated from a config dataclass (mpo/config.py).

Each field is a flag. The comment after a field is its help text, and a comment on a line of its own is the heading
of the fields below it. Field types are str, int, float, bool and Literal (a choice).
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
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from mpo.runtime.errors import InputError

C = TypeVar("C")
# Whole numbers that must be at least 1; all others may be 0.
SIZES = {"batch", "minibatch", "microbatch", "max_prompt", "max_response", "max_new", "iterations", "group"}


def parse(config_class: type[C], argv: list[str]) -> C:
    """Build a config from flags: --name value or --name=value, with underscores or dashes.

    Raises InputError, in one line, for an unknown flag (naming the nearest), a wrong value or a missing flag.
    """
    known = {field.name: field for field in fields(config_class)}  # type: ignore[arg-type]
    argv = [re.sub(r"^--[^=]+", lambda m: m[0].replace("-", "_").replace("__", "--", 1), a) for a in argv]
    parser = _parser(config_class, known)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-"), known, 1)
        hint = f"; did you mean --{near[0]}?" if near else " (--help lists every flag)"
        raise InputError(f"unknown flag {unknown[0]}{hint}")
    if missing := [f"--{name}" for name, value in vars(values).items() if value is None]:
        parser.error(f"the following flags are required: {', '.join(missing)}")
    for name, value in vars(values).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{name} {value}: must be a finite number")
        if isinstance(value, int) and not (1 if name in SIZES else 0) <= value < 1 << 31:
            raise InputError(
                f"--{name} {value}: must be a {'positive' if name in SIZES else 'whole'} number below 2^31"
            )
    return config_class(**vars(values))


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
    program, types = Path(sys.argv[0]).name, typing.get_type_hints(config_class)
    groups = headings(config_class)
    needed = [name for comments in groups.values() for name in comments if known[name].default is MISSING]
    description = inspect.cleandoc(config_class.__doc__ or "")
    usage = " ".join([program, *(f"--{name} {name.upper()}" for name in needed), "[--FLAG VALUE ...]"])
    parser = _Parser(program, usage, description, allow_abbrev=False, formatter_class=_Formatter)
    for heading, comments in groups.items():
        group = parser.add_argument_group(heading)
        for name, comment in comments.items():
            kind, default = types[name], known[name].default
            choices = typing.get_args(kind) or None
            shown = "" if default is MISSING else " (default: none)" if default == "" else f" (default: {default})"
            group.add_argument(
                f"--{name}",
                type=_boolean if kind is bool else _number(name, kind) if kind in (int, float) else str,
                choices=choices,
                default=None if default is MISSING else default,  # `parse` refuses None, after unknown flags
                metavar=None if choices else kind.__name__.upper(),
                help=comment.replace("%", "%%") + shown,
            )
    return parser


def _number(name: str, kind: type[int | float]) -> Callable[[str], int | float]:
    def read(text: str) -> int | float:
        try:
            return kind(text)
        except ValueError:
            raise InputError(f"--{name} {text}: not a {'whole ' if kind is int else ''}number") from None

    return read


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
