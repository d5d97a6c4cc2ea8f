"""The order of the pages, read from docs/index.md: the list that a reader sees on the home page is the navigation.

A heading of the second level is a door. Below it is a list with one item for each page, `- [label](page.md): what it
answers`. The items above the first door come first in the navigation, without a heading.
"""

from __future__ import annotations

import posixpath
import re

ITEM = re.compile(r"^- \[([^\]]+)\]\(([^)#]+\.md)\)", re.MULTILINE)
DOOR = re.compile(r"^## (.+)$", re.MULTILINE)


def doors(index: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each door of the index page, with the labels and the paths (as seen from docs/) of its pages.

    A door without pages, such as a section about something else, is left out.
    """
    first, *rest = DOOR.split(index)
    parts = [("", first), *zip(rest[::2], rest[1::2], strict=True)]
    return [(name, pages) for name, text in parts if (pages := ITEM.findall(text))]


def contents(index: str) -> str:
    """The same as MyST's tables of contents, which Sphinx turns into the navigation."""
    lines = []
    for name, pages in doors(index):
        lines += ["", "```{toctree}", ":hidden:", *([f":caption: {name}"] if name else []), ""]
        lines += [f"{label} <{docname(path)}>" for label, path in pages]
        lines += ["```", ""]
    return "\n".join(lines)


def docname(path: str) -> str:
    """Sphinx's name of a page, from its path as seen from docs/: "data.md" -> "/docs/data"."""
    return posixpath.normpath(posixpath.join("/docs", path)).removesuffix(".md")
