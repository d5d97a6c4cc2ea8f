"""The site of the documentation: its navigation, its checker of links, and a small site that is really built."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.scripts import ROOT

sys.path.insert(0, str(ROOT / "docs" / "site"))
import doors
import links

SITE = ROOT / "docs" / "site"

INDEX = """# Home

- [Overview](../README.md): all of it

## Learn
For readers.

- [One](one.md): the first
- [Two](two.md): the [other](one.md)

## This site
It has no pages.
"""


def test_the_doors_are_read_from_the_index():
    assert doors.doors(INDEX) == [
        ("", [("Overview", "../README.md")]),
        ("Learn", [("One", "one.md"), ("Two", "two.md")]),
    ]


def test_a_page_is_named_by_its_place_in_the_repository():
    assert doors.docname("data.md") == "/docs/data"
    assert doors.docname("../README.md") == "/README"


def write(folder: Path, **pages: str) -> Path:
    """A site with these pages."""
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text)
    return folder


def test_a_sound_site_has_no_faults(tmp_path):
    (tmp_path / "a picture.svg").write_text("<svg/>")
    index = '<meta http-equiv="refresh" content="0; url=one.html">'
    one = '<a href="two.html#end"></a><a href="#"></a><a href="https://a.b/c"></a><img src="a%20picture.svg">'
    assert links.faults(write(tmp_path, index=index, one=one, two='<p id="end">', search="")) == []


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        ('<a href="three.html">', "index.html: three.html: no such file"),
        ('<img src="three.png">', "index.html: three.png: no such file"),
        ('<a href="one.html#middle">', "index.html: one.html#middle: no such anchor"),
        ('<a href="#middle">', "index.html: #middle: no such anchor"),
        ('<script src="https://a.b/c.js"></script>', "index.html: loads https://a.b/c.js"),
        ('<link rel="stylesheet" href="//a.b/c.css">', "index.html: loads //a.b/c.css"),
    ],
)
def test_each_fault_of_a_page_is_noticed(tmp_path, broken, fault):
    site = write(tmp_path, index=f'<a href="one.html#end">{broken}', one='<p id="end">')
    assert links.faults(site) == [fault]


def test_a_page_out_of_reach_is_noticed_even_if_another_one_links_to_it(tmp_path):
    site = write(tmp_path, index="", one='<a href="two.html">', two='<a href="one.html">')
    assert links.faults(site) == ["one.html: no page links to it", "two.html: no page links to it"]


def test_mathematics_keeps_tex_s_spaces_and_refuses_what_it_cannot_write():
    pytest.importorskip("latex2mathml", reason="make .venv/.site installs what builds the site")
    from mathml import mathml

    space = '<mspace width="0.167em" />'
    assert f"<mi>log</mi>{space}<mi>x</mi>" in mathml(r"\log x", "inline")
    assert space not in mathml(r"\log(x) + \log\left(x\right)", "inline")
    assert f"</msub>{space}<mi>x</mi>" in mathml(r"\log_2 x", "inline")
    assert "&#x0003C;" in mathml("a < b", "inline")
    aligned = mathml(r"\begin{aligned} a &= b \\ c &= d \end{aligned}", "block")
    assert (aligned.count("<mtr"), aligned.count("<mtd")) == (2, 4)
    for code in (r"\unheard{x}", r"\begin{unheard} x \end{unheard}"):
        with pytest.raises(ValueError, match=r"unknown .*unheard"):
            mathml(code, "inline")


# --- a small site, built by Sphinx with the settings of the real one --------------------------------


def build(folder: Path, **pages: str) -> subprocess.CompletedProcess[str]:
    """Build a site from these pages of docs/, a README, and a program that they may link to."""
    pytest.importorskip("sphinx", reason="make .venv/.site installs what builds the site")
    pytest.importorskip("furo")
    shutil.copytree(SITE, folder / "docs" / "site", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "README.md").write_text("# The overview\n\nTo [the index](docs/index.md#learn).\n")
    (folder / "mpo").mkdir()
    (folder / "mpo" / "sums.py").write_text("def add(a, b):\n    return a + b\n")
    (folder / "mpo" / "sums.ipynb").write_text('{"cells": []}')
    pages = {"index": INDEX, "two": "# Two\n", **pages}
    for name, text in pages.items():
        (folder / "docs" / f"{name}.md").write_text(text)
    command = [sys.executable, "-m", "sphinx", "--builder", "html", "--conf-dir", "docs/site", "--fail-on-warning"]
    command += ["--keep-going", "--quiet", "--doctree-dir", "trees", ".", "out"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def small_site(tmp_path_factory) -> Path:
    """The folder of a site that was built without a warning."""
    folder = tmp_path_factory.mktemp("site")
    one = """# One
See [the sum](../mpo/sums.py#L2), [the folder](../mpo), [two](two.md), [all](../docs),
[a notebook](../mpo/sums.ipynb) and [the end](#the-end).

It costs $5 or $6. With $x^2 + \\beta$ and:

$$D_{KL} = \\sum_i p_i \\log \\frac{p_i}{q_i}$$

## The end
- {not}`a role`
"""
    done = build(folder, one=one)
    assert (done.returncode, done.stderr) == (0, "")
    assert links.faults(folder / "out") == []
    return folder / "out"


def test_a_link_to_a_file_leads_to_a_page_with_its_lines(small_site):
    page = (small_site / "docs" / "one.html").read_text()
    assert 'href="../mpo/sums.py.html"' in page
    assert 'href="../mpo/index.html"' in page
    assert re.search('href="index.html">(<[^>]*>)?all<', page)
    assert "For readers." in (small_site / "docs" / "index.html").read_text()  # still the home page
    source = (small_site / "mpo" / "sums.py.html").read_text()
    assert 'id="L2"' in source
    assert '<a href="../docs/one.html">One</a>' in source  # the page that mentions it
    assert 'href="sums.py.html"' in (small_site / "mpo" / "index.html").read_text()


def test_a_notebook_is_a_download(small_site):
    link = re.search(r'href="([^"]*sums.ipynb)"', (small_site / "docs" / "one.html").read_text())[1]
    assert (small_site / "docs" / link).read_text() == '{"cells": []}'
    assert "ipynb" not in (small_site / "mpo" / "index.html").read_text()


def test_mathematics_is_mathml_and_prices_are_text(small_site):
    page = (small_site / "docs" / "one.html").read_text()
    assert page.count("<math") == 2
    assert "<mfrac>" in page
    assert "It costs $5 or $6." in page


def test_the_navigation_has_the_doors_in_order_and_the_search_needs_no_server(small_site):
    page = (small_site / "docs" / "two.html").read_text()
    labels = ["Overview", "Learn", "One", "Two"]
    places = [page.index(f">{label}<", page.index("sidebar-tree")) for label in labels]
    assert places == sorted(places)
    assert "searchindex.js" in (small_site / "search.html").read_text()
    assert "url=docs/index.html" in (small_site / "index.html").read_text()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[gone](gone.md)", "gone.md"),
        ("[gone](../mpo/gone.py)", "gone.py"),
        ("[gone](two.md#gone)", "gone"),
        ("$\\unheard{x}$", "unheard"),
    ],
)
def test_a_fault_in_a_page_stops_the_build(tmp_path, text, fault):
    done = build(tmp_path, one=f"# One\n{text}\n")
    assert done.returncode != 0
    assert "one.md:2: WARNING: " in done.stderr
    assert fault in done.stderr


def test_a_page_behind_no_door_stops_the_build(tmp_path):
    done = build(tmp_path, one="# One\n", orphan="# Orphan\n")
    assert done.returncode != 0
    assert "orphan.md" in done.stderr
