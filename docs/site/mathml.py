"""Mathematics as MathML, which browsers show themselves: no script, no web font, nothing from another server.

The pages write it as GitHub reads it: `$...$` and `` $`...`$ `` within a line, `$$...$$` or a fence "math" by itself.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

logger = logging.getLogger(__name__)


def mathml(latex: str, display: str) -> str:
    """LaTeX -> a <math> element; `display` is "inline" or "block". An unknown command raises ValueError."""
    code = latex.strip().removeprefix("`").removesuffix("`").strip()
    element: str = convert(code, display=display)
    if unknown := re.search(r">\s*(\\[A-Za-z]+)", element):  # the converter shows a command that it does not know
        raise ValueError(f"unknown command {unknown[1]}")
    return element


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
