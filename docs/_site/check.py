"""`python docs/_site/check.py build/site`: links and anchors of the built pages lead somewhere, and nothing is loaded
from elsewhere. MkDocs checks the links of the Markdown; this one reads what came of it, the API's pages included.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("link", "href")}
NOT_LOADED = {"canonical", "prev", "next", "edit"}  # of <link rel=...>


class Page(HTMLParser):
    def __init__(self, path: Path):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[tuple[str, bool]] = []  # where to, and whether it is loaded with the page
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value is not None}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        for name in ("href", "src"):
            if name in found:
                loaded = (tag, name) in LOADED and found.get("rel") not in NOT_LOADED
                self.links.append((found[name], loaded))


def problems(site: Path) -> list[str]:
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    found = []
    for path, page in pages.items():
        here = path.relative_to(site.resolve())
        for link, loaded in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if loaded and parts.scheme != "data":
                    found.append(f"{here} loads {link}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                found.append(f"{here}: no {link}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{here}: no anchor {link}")
    return found if pages else [f"{site}: no page"]


if __name__ == "__main__":
    told = problems(Path(sys.argv[1]))
    print("\n".join(told), file=sys.stderr, end="\n" if told else "")
    sys.exit(bool(told))
