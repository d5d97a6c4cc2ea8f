"""Run scripts of cells, and write what each shows as a page of docs/ and as a notebook: make book

A script is Python. `# %%` begins a cell of code, and `# %% [markdown]` one of text, whose lines are comments. The page
has the text and what the code shows; of the code itself, only cells that begin with `# %% shown`. The notebook has all.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpo.runtime.entry import run_plain
from mpo.runtime.errors import InputError
from mpo.runtime.files import write_text
from mpo.runtime.flags import parse

HERE = Path(__file__).parent


@dataclass
class Cell:
    """A cell of a script, and what it showed."""

    kind: str  # markdown, code, or shown: code that the page has, too
    text: str
    printed: str = ""
    value: Any = None  # of its last expression

    @property
    def is_picture(self) -> bool:
        """Whether it shows a picture, which a page has in a file of its own."""
        return hasattr(self.value, "_repr_svg_")


def cells_of(script: str) -> list[Cell]:
    """The cells of a script; what is before the first one, its docstring, is none."""
    cells = []
    for part in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        head, _, text = part.partition("\n")
        kind = "markdown" if "[markdown]" in head else "shown" if "shown" in head else "code"
        if kind == "markdown":
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in text.splitlines())
        cells.append(Cell(kind, text.strip("\n")))
    return cells


def run_cells(cells: Sequence[Cell], name: str) -> None:
    """Run the code in one namespace, in order, and keep what it prints and the value of its last expression."""
    space: dict[str, Any] = {"__name__": name}
    for number, cell in enumerate(cells):
        if cell.kind == "markdown":
            continue
        tree = ast.parse(cell.text)
        end = tree.body[-1]
        last = ast.Expression(end.value) if isinstance(end, ast.Expr) else None
        tree.body = tree.body[:-1] if last else tree.body
        out, begin = io.StringIO(), time.monotonic()
        with contextlib.redirect_stdout(out):
            exec(compile(tree, f"{name}, cell {number}", "exec"), space)
            cell.value = None if last is None else eval(compile(last, f"{name}, cell {number}", "eval"), space)
        cell.printed = out.getvalue()
        seconds = time.monotonic() - begin
        print(f"{name}: cell {number + 1} of {len(cells)}, {seconds:.1f} s", file=sys.stderr, flush=True)


def pictures(cells: Sequence[Cell], name: str) -> dict[str, str]:
    """The pictures of a page: the name of each file, and its content."""
    svgs = [cell.value._repr_svg_() for cell in cells if cell.is_picture]
    return {f"{name}-{i}.svg": svg for i, svg in enumerate(svgs, 1)}


def shown(cell: Cell, files: Iterator[str]) -> Iterator[str]:
    """What a page has of a cell, as pieces of Markdown. `files` names the file of the next picture."""
    if cell.kind == "markdown":
        yield cell.text
    if cell.kind == "shown":
        yield f"```python\n{cell.text}\n```"
    if cell.printed.strip():
        yield f"```text\n{cell.printed.rstrip()}\n```"
    if cell.is_picture:
        yield f"![{cell.value.title}](figures/{next(files)})"
    elif hasattr(cell.value, "_repr_markdown_"):
        yield cell.value._repr_markdown_()
    elif cell.value is not None:
        yield f"```text\n{cell.value!r}\n```"


def page(cells: Sequence[Cell], name: str, files: Iterable[str]) -> str:
    """The page, and a line that says what wrote it. `files` are the names of its pictures, in order."""
    names = iter(files)
    pieces = [piece for cell in cells for piece in shown(cell, names)]
    return "\n\n".join(pieces) + f"\n\n<!-- Written by notebooks/{name}.py (make book); edit that file. -->\n"


def outputs(cell: Cell) -> list[dict[str, Any]]:
    """What a cell showed, in the notebook's format."""
    entries: list[dict[str, Any]] = []
    if cell.printed:
        entries.append({"output_type": "stream", "name": "stdout", "text": cell.printed})
    forms = {"image/svg+xml": "_repr_svg_", "text/markdown": "_repr_markdown_"}
    data = {kind: getattr(cell.value, form)() for kind, form in forms.items() if hasattr(cell.value, form)}
    if cell.value is not None:
        data["text/plain"] = repr(cell.value)
        entries.append({"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": data})
    return entries


def notebook(cells: Sequence[Cell]) -> str:
    """The notebook, in version 4.5 of its format. Links lead from its folder, not from docs/."""
    entries = []
    for number, cell in enumerate(cells):
        entry: dict[str, Any] = {"id": f"cell-{number}", "metadata": {}}
        if cell.kind == "markdown":
            links = r"\]\((?!https?:|\.\./|#)([^)]*)\)"
            entry |= {"cell_type": "markdown", "source": re.sub(links, r"](../docs/\1)", cell.text)}
        else:
            code = {"cell_type": "code", "source": cell.text, "execution_count": None, "outputs": outputs(cell)}
            entry |= code
        entries.append(entry)
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    book = {"cells": entries, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"


@dataclass(frozen=True, kw_only=True)
class BookConfig:
    """Write pages and notebooks from the scripts in notebooks/."""

    scripts: str = "walkthrough,swap_a_loss"  # which
    docs: str = "docs"  # the folder of the pages
    notebooks: str = "notebooks"  # the folder of the notebooks


def main(config: BookConfig) -> None:
    """Run each script, then write its page, the page's pictures, and its notebook. Raises InputError for no script."""
    for name in config.scripts.split(","):
        source, docs = HERE / f"{name}.py", Path(config.docs)
        if not source.exists():
            raise InputError(f"--scripts {config.scripts}: there is no notebooks/{name}.py")
        cells = cells_of(source.read_text(encoding="utf-8"))
        run_cells(cells, name)
        files = pictures(cells, name)
        for file, content in files.items():
            write_text(docs / "figures" / file, content)
        write_text(docs / f"{name}.md", page(cells, name, files))
        write_text(Path(config.notebooks) / f"{name}.ipynb", notebook(cells))
        print(f"written: {docs / name}.md, {Path(config.notebooks) / name}.ipynb")


if __name__ == "__main__":
    run_plain(lambda argv: main(parse(BookConfig, argv)))
