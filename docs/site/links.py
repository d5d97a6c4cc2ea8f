"""Check a built site: python docs/site/links.py build/site

Every link and every picture leads to a file of the site, every anchor exists, no page is out of reach from the first
one, and nothing that a page shows is loaded from elsewhere. Prints each fault, and exits with status 1 if there is one.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {("img", "src"), ("script", "src"), ("link", "href"), ("source", "src"), ("iframe", "src"), ("object", "data")}
NOT_PAGES = {"search.html", "404.html"}  # reached by a form, or by nobody


class Page(HTMLParser):
    """The anchors of a page, and its links as (tag, attribute, target)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[tuple[str, str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep what the tag links to, and its name."""
        values = {name: value for name, value in attrs if value is not None}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "meta" and values.get("http-equiv", "").lower() == "refresh":
            self.links.append(("a", "href", values["content"].partition("url=")[2]))
        self.links += [(tag, name, values[name]) for name in ("href", "src", "data") if name in values]


def faults(site: Path) -> list[str]:
    """One line for each fault of the site in this folder."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    lines, linked = [], {(site / "index.html").resolve(): set[Path]()}
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        linked.setdefault(path, set())
        for tag, attribute, target in page.links:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if (tag, attribute) in LOADED and parts.scheme != "data":
                    lines.append(f"{name}: loads {target}")
                continue
            leads_to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not leads_to.is_file():
                lines.append(f"{name}: {target}: no such file")
            elif leads_to in pages:
                linked[path].add(leads_to)
                if parts.fragment and unquote(parts.fragment) not in pages[leads_to].anchors:
                    lines.append(f"{name}: {target}: no such anchor")
    reached = reach(linked, (site / "index.html").resolve())
    orphans = [p.relative_to(site.resolve()) for p in pages if p not in reached and p.name not in NOT_PAGES]
    return lines + [f"{name}: no page links to it" for name in orphans]


def reach(linked: dict[Path, set[Path]], start: Path) -> set[Path]:
    """The pages to which links lead from the first one, directly or through others."""
    reached, waiting = {start}, [start]
    while waiting:
        new = linked.get(waiting.pop(), set()) - reached
        reached |= new
        waiting += new
    return reached


def main() -> None:
    """Print the faults of the site in the folder named on the command line."""
    site = Path(sys.argv[1])
    if not (site / "index.html").is_file():
        sys.exit(f"links.py: error: {site}: no index.html there")
    lines = faults(site)
    print("\n".join(lines) or f"{site}: {len(list(site.rglob('*.html')))} pages, every link leads somewhere")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
