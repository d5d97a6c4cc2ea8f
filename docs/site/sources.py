"""A page for every file and folder of the repository that the docs link to: the site works without a network.

On GitHub a link such as `../mpo/ppo/equations.py` opens the file. On the site it opens the file's page: its text in
colours with numbered lines, and the pages that mention it. A folder's page lists its files. A notebook is a download,
and so is a file that is too long to be read.
"""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import BashLexer, TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes

LONGEST = 300_000  # bytes of a file that gets a page
SHOWN = {".py", ".cpp", ".h", ".mk", ".md", ".html", ".json", ".toml", ".txt", ".css"}  # in the list of a folder


def page_of(path: str, folder: bool) -> str:
    """The name of the page of a file or folder: "mpo/config.py" -> "mpo/config.py", "kernels" -> "kernels/index"."""
    return posixpath.join(path, "index") if folder else path.lstrip(".")  # some servers hide names with a dot


def link(page: str, to: str) -> str:
    """The relative link from one page to another, both by name."""
    return posixpath.relpath(f"{to}.html", posixpath.dirname(page) or ".")


def link_sources(app: Any, document: nodes.document) -> None:
    """Turn a page's links to files that are no pages into links to the pages that `pages` makes of them."""
    mentions = app.env.__dict__.setdefault("mentions", defaultdict(set))  # file -> the pages that link to it
    here = app.env.docname
    for node in list(document.findall(lambda n: isinstance(n, addnodes.download_reference | addnodes.pending_xref))):
        if path := target(app, node):
            mentions[path].add(here)
            page = page_of(path, (Path(app.srcdir) / path).is_dir())
            text = [child for part in node.children for child in part.children]
            node.replace_self(nodes.reference("", "", *text, refuri=link(here, page), internal=True))


def target(app: Any, node: Any) -> str | None:
    """The file or folder that a node links to, as seen from the repository; None for a page, and for nothing."""
    beside = "" if node.get("refdomain") == "doc" else posixpath.dirname(app.env.docname)
    name = node["reftarget"] + (".md" if node.get("refdomain") == "doc" else "")
    path = posixpath.normpath(posixpath.join(beside, name))
    is_page = path.endswith(".md") and path.removesuffix(".md") in app.env.found_docs
    exists = path != "." and not path.startswith("..") and (Path(app.srcdir) / path).exists()
    return path if exists and not is_page and not is_download(Path(app.srcdir) / path) else None


def is_download(path: Path) -> bool:
    """True for a file that nobody wants to read as it is."""
    return path.is_file() and (path.suffix == ".ipynb" or path.stat().st_size > LONGEST)


def pages(app: Any) -> Iterator[tuple[str, dict[str, str], str]]:
    """The pages of all files and folders that are mentioned, and of the files in these folders."""
    root, mentions = Path(app.srcdir), app.env.__dict__.get("mentions", {})
    waiting, done = sorted(mentions), set[str]()
    while waiting:
        path = waiting.pop()
        page = page_of(path, (root / path).is_dir())
        if path in done or page in app.env.found_docs:  # the page of the folder docs/ is its index.md
            continue
        done.add(path)
        said = mentioned(app, page, sorted(mentions.get(path, ())))
        if (root / path).is_dir():
            inside = [p.relative_to(root).as_posix() for p in sorted((root / path).iterdir()) if belongs(p)]
            waiting += inside
            items = "".join(item(page, p, (root / p).is_dir()) for p in inside)
            body = f"<h1>{escape(path)}/</h1>{said}<ul>{items}</ul>"
        else:
            body = f"<h1>{escape(path)}</h1>{said}{coloured(root / path)}"
        yield page, {"title": escape(path), "body": body}, "page.html"


def item(page: str, path: str, folder: bool) -> str:
    """The line of a file or folder on the page of the folder that has it."""
    name = posixpath.basename(path) + "/" * folder
    return f'<li><a href="{link(page, page_of(path, folder))}">{escape(name)}</a></li>'


def belongs(path: Path) -> bool:
    """True if a folder's page lists this file or folder: one of the repository, not one that was compiled."""
    if path.is_dir():
        return any(belongs(p) for p in path.iterdir())
    return path.suffix in SHOWN and "compiled" not in path.parts and not is_download(path)


def mentioned(app: Any, page: str, by: list[str]) -> str:
    """A line with the pages that link to a file."""
    links = (f'<a href="{link(page, name)}">{escape(app.env.titles[name].astext())}</a>' for name in by)
    return f'<p class="mentions">Mentioned in: {", ".join(links)}</p>' if by else ""


def coloured(path: Path) -> str:
    """The text of a file as HTML, in which line 12 has the anchor L12, as on GitHub."""
    text = path.read_text(encoding="utf-8")
    try:
        lexer = get_lexer_for_filename(path.name)
    except ClassNotFound:
        lexer = BashLexer() if text.startswith("#!") else TextLexer()
    html = highlight(text, lexer, HtmlFormatter(linenos="inline", linespans="L", wrapcode=True))
    return f'<div class="source">{html.replace(chr(34) + "L-", chr(34) + "L")}</div>'


def setup(app: Any) -> dict[str, bool]:
    """Tell Sphinx about these pages. (In one process: what is noted while pages are read is not merged.)"""
    app.connect("doctree-read", link_sources, priority=100)  # before Sphinx copies these files as downloads
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
