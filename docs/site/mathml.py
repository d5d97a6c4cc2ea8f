"""Mathematics as MathML, which browsers show themselves: no script, no web font, nothing from another server.

The pages write it as GitHub reads it: `$...$` and `` $`...`$ `` within a line, `$$...$$` or a fence "math" by itself.
"""

from __future__ import annotations

import re
from typing import Any
from xml.etree.ElementTree import Element, tostring

from docutils import nodes
from latex2mathml.commands import MATRICES
from latex2mathml.converter import convert_to_element
from sphinx.util import logging

logger = logging.getLogger(__name__)


def mathml(latex: str, display: str) -> str:
    """LaTeX -> a <math> element; `display` is "inline" or "block". An unknown command raises ValueError."""
    code = latex.strip().removeprefix("`").removesuffix("`").strip()
    code = re.sub(r"\\(begin|end){aligned}", r"\\\1{split}", code)  # which the converter knows by this name only
    for environment in re.findall(r"\\begin{(.*?)}", code):
        if f"\\{environment}" not in MATRICES:
            raise ValueError(f"unknown environment {environment}")
    element = convert_to_element(code, display=display)
    for part in list(element.iter()):
        if (part.text or "").startswith("\\"):  # the converter shows a command that it does not know
            raise ValueError(f"unknown command {part.text}")
        if part.tag in ("math", "mrow", "mtd"):
            space_after_names(part)
    return tostring(element, encoding="unicode").replace("&amp;#x", "&#x")  # it writes signs by their numbers


def space_after_names(row: Element) -> None:
    """Put TeX's thin space between a function such as log and its argument, if this is not in brackets."""
    for i in reversed(range(len(row) - 1)):
        name = row[i][0] if row[i].tag in ("msub", "msup", "msubsup", "munder") else row[i]
        brackets = row[i + 1] if row[i + 1].tag != "mrow" or not len(row[i + 1]) else row[i + 1][0]
        if name.tag == "mi" and re.fullmatch("[a-z]{2,}", name.text or "") and brackets.tag != "mo":
            row.insert(i + 1, Element("mspace", width="0.167em"))


def write(translator: Any, node: nodes.Element, display: str) -> None:
    """Put the element of a node on the page, then skip the node's text."""
    try:
        element = mathml(node.astext(), display)
    except Exception as error:  # the converter raises exceptions of many kinds
        logger.warning("cannot write as MathML: %s (%s)", node.astext(), error, location=node, type="math")
        element = f"<code>{translator.encode(node.astext())}</code>"
    translator.body.append(f'<div class="math">{element}</div>' if display == "block" else element)
    raise nodes.SkipNode


def inline(translator: Any, node: nodes.Element) -> None:
    """Mathematics within a line."""
    write(translator, node, "inline")


def block(translator: Any, node: nodes.Element) -> None:
    """An equation by itself."""
    write(translator, node, "block")


def setup(app: Any) -> dict[str, bool]:
    """Tell Sphinx about this way to write mathematics."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
