"""How Sphinx builds the site from README.md and docs/*.md (make site). The order of the pages is in docs/index.md.

Sphinx reads Markdown by GitHub's rules (CommonMark, with MyST), warns of links and anchors that lead nowhere and of
pages behind no door, and its search works from a folder without a server.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import doors

ROOT = Path(__file__).parents[2]

project = "Mixed Preference Optimization"
author = ""
extensions = ["myst_parser", "sphinx.ext.githubpages", "mathml", "sources"]

# The folders of the site are those of the repository, so a relative link means the same on both.
include_patterns = ["README.md", "docs/*.md"]
exclude_patterns = [p.name for p in ROOT.iterdir() if p.name not in ("README.md", "docs")] + [
    "docs/site",
    "docs/figures",
]
root_doc = "docs/index"
html_additional_pages = {"index": "to_index.html"}

# Markdown as GitHub reads it
myst_enable_extensions = ["alert", "dollarmath", "html_image", "strikethrough", "tasklist"]
myst_disable_syntax = ["myst_role", "myst_line_comment", "myst_block_break", "myst_target"]
myst_dmath_allow_space = False  # "$5 or $6" is no mathematics
myst_dmath_allow_digits = False
myst_fence_as_directive = ["math"]
myst_heading_anchors = 6
highlight_language = "text"
html_math_renderer = "mathml"

html_theme = "furo"
html_title = project
html_static_path = ["static"]
html_css_files = ["site.css"]
templates_path = ["templates"]
html_show_sphinx = False
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False
html_use_index = False
html_domain_indices = False
pygments_style = "default"
pygments_dark_style = "github-dark"


def add_contents(app: Any, page: str, text: list[str]) -> None:
    """Give the home page the tables of contents that follow from its lists."""
    if page == root_doc:
        text[0] += doors.contents(text[0])


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", add_contents)
