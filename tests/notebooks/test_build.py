"""A script of cells becomes a page and a notebook, and those in the repository are what their scripts say."""

from __future__ import annotations

import functools
import json
import re
import shutil

import pytest

from mpo.runtime.errors import InputError
from notebooks import build, show
from notebooks.build import BookConfig, cells_of
from tests.support.scripts import ROOT

SCRIPTS = ("walkthrough", "swap_a_loss")
SCRIPT = '''"""A docstring, which is no cell."""

# %% [markdown]
# # Title
#
# See [losses](losses.md) and [code](../mpo/config.py) and [below](#there).

# %%
x = 40
print("hello")

# %% shown
x + 2

# %%
from notebooks.show import Picture, Table
Table(["a", "b"], [["one", 0.125]])

# %%
Picture("a line", lambda axes: axes.plot([0, 1], [0, 1]))
'''
PAGE = """# Title

See [losses](losses.md) and [code](../mpo/config.py) and [below](#there).

```text
hello
```

```python
x + 2
```

```text
42
```

| a   | b    |
|-----|------|
| one | 0.12 |

![a line](figures/sample-1.svg)

<!-- Written by notebooks/sample.py (make book); edit that file. -->
"""


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """The folder in which the sample's page and notebook are."""
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
    (tmp_path / "sample.py").write_text(SCRIPT)
    monkeypatch.setattr(build, "HERE", tmp_path)
    build.main(BookConfig(scripts="sample", docs=str(tmp_path / "docs"), notebooks=str(tmp_path / "books")))
    return tmp_path


def test_a_page_has_the_text_and_what_the_code_shows_but_not_the_code(sample):
    assert (sample / "docs" / "sample.md").read_text() == PAGE
    assert (sample / "docs" / "figures" / "sample-1.svg").read_text().startswith("<svg")


def test_a_notebook_has_the_code_and_its_outputs_and_its_links_lead_from_its_own_folder(sample):
    book = json.loads((sample / "books" / "sample.ipynb").read_text())
    assert [cell["cell_type"] for cell in book["cells"]] == ["markdown", "code", "code", "code", "code"]
    text, hello, number, table, picture = book["cells"]
    assert text["source"].endswith("See [losses](../docs/losses.md) and [code](../mpo/config.py) and [below](#there).")
    assert hello["source"] == 'x = 40\nprint("hello")'
    assert hello["outputs"] == [{"output_type": "stream", "name": "stdout", "text": "hello\n"}]
    assert number["outputs"][0]["data"] == {"text/plain": "42"}
    assert table["outputs"][0]["data"]["text/markdown"].splitlines()[2] == "| one | 0.12 |"
    assert picture["outputs"][0]["data"]["image/svg+xml"].startswith("<svg")


def test_a_notebook_is_valid(sample):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbformat.validate(nbformat.read(sample / "books" / "sample.ipynb", as_version=4))


def test_a_script_that_is_not_there_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"there is no notebooks/missing\.py"):
        build.main(BookConfig(scripts="missing"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_page_and_the_notebook_of_a_script_have_its_text_and_its_code(name):
    """Without this, a script could be changed and its page forgotten."""
    cells = cells_of((ROOT / "notebooks" / f"{name}.py").read_text())
    page = (ROOT / "docs" / f"{name}.md").read_text()
    book = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    assert len(book["cells"]) == len(cells)
    at = 0
    for cell, entry in zip(cells, book["cells"], strict=True):
        if cell.kind == "markdown":
            at = page.find(cell.text, at)
            assert at >= 0, f"the page lacks a text, or has it in another place: {cell.text[:80]}"
            assert entry["cell_type"] == "markdown"
        else:
            assert entry["source"] == cell.text
            assert cell.kind != "shown" or cell.text in page


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_pictures_of_a_page_are_there_and_no_others(name):
    shown = set(re.findall(r"^!\[.*\]\(figures/(.*)\)$", (ROOT / "docs" / f"{name}.md").read_text(), re.MULTILINE))
    assert shown == {path.name for path in (ROOT / "docs" / "figures").glob(f"{name}-*.svg")}


def test_tokens_are_readable_in_a_table():
    assert show.readable(" a|b\n") == "`·a¦b↵`"


def test_the_walkthrough_runs_to_its_end_on_a_small_run(hh_run, tmp_path, monkeypatch):
    """Its other runs, which take minutes, are this run again."""
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
    run = tmp_path / "hh"
    shutil.copytree(hh_run, run)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RUN", str(run))
    monkeypatch.setenv("QUICK", "1")
    monkeypatch.setattr(show, "another_run", lambda source, name, *variables: source)
    monkeypatch.setattr(show, "evaluate", functools.partial(show.evaluate, prompts=8))
    build.main(BookConfig(scripts="walkthrough", docs=str(tmp_path / "docs"), notebooks=str(tmp_path)))
    page = (tmp_path / "docs" / "walkthrough.md").read_text()
    cells = cells_of((ROOT / "notebooks" / "walkthrough.py").read_text())
    assert all(cell.text in page for cell in cells if cell.kind == "markdown")
    scores = [json.loads(line) for line in (run / "split" / "scores.jsonl").read_text().splitlines()]
    assert f"easy: {sum(s['part'] == 'easy' for s in scores)}," in page  # its numbers are this run's
    assert page.count("![") == 3
