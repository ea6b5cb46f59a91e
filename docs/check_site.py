"""Checks the built pages: inner links and anchors lead somewhere, and no page needs a network.

python docs/check_site.py build/docs
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
"""Tags that fetch what they name when the page is opened."""

NOT_FETCHED = {"canonical", "index", "search", "next", "prev", "author"}
"""What a ``<link>`` may only name."""


class Page(HTMLParser):
    """One page: its anchors, where it links to, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect what one tag has."""
        found = {key: value for key, value in attrs if value}
        self.anchors |= {found[key] for key in ("id", "name") if key in found}
        if tag == "a" and "href" in found:
            self.links.add(found["href"])
        if LOADS.get(tag, "") in found and found.get("rel") not in NOT_FETCHED:
            self.loads.add(found[LOADS[tag]])


def problems(site: Path) -> list[str]:
    """What is wrong with a built site, a line each."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    found = []
    for page in pages.values():
        where = page.path.relative_to(site)
        found += [f"{where}: loads {url}" for url in sorted(page.loads) if urlsplit(url).netloc]
        for link in sorted(page.links | page.loads):
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (page.path.parent / unquote(url.path) if url.path else page.path).resolve()
            if not target.exists():
                found.append(f"{where}: {link} is no file")
                continue
            known = pages[target].anchors if target in pages else None
            if url.fragment and known is not None and unquote(url.fragment) not in known:
                found.append(f"{where}: {link} is no anchor")
    return found


if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]))
    print(*wrong, sep="\n", end="\n" if wrong else "")
    sys.exit(bool(wrong))
