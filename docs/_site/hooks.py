"""What MkDocs is told beyond mkdocs.yml: pages that lie outside docs/, links between them, formulas as MathML.

README, CONTRIBUTING, CHANGELOG, the examples and the committed results keep their place in the repository and are pages
of the site as well. So any page may link to any of them by the path that works in the repository.
"""

import posixpath
import re
from html import escape, unescape
from pathlib import Path, PurePosixPath

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
RENAMED = {"README.md": "overview.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
OUTSIDE = ("examples/*.md", "examples/*.py", "experiments/results/**/*", "bench/results/**/*")
KINDS = {".md", ".py", ".png"}
LINK = re.compile(r"(?P<before>\]\()(?P<target>[^()\s#:]+)(?P<anchor>#[^()\s]*)?(?P<after>\))")
FENCED = re.compile(r"^(```|~~~).*?^\1[ ]*$", re.M | re.S)
FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">(?P<tex>.*?)</(?P=tag)>', re.S)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, uri in RENAMED.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    for path in sorted({path for pattern in OUTSIDE for path in ROOT.glob(pattern)}):
        if path.suffix in KINDS and "raw" not in path.parts:
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = repository_path(page.file.src_uri)

    def on_the_site(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link["target"]))
        uri = site_uri(target)
        if files.get_file_from_path(uri) is None:
            return link[0]  # MkDocs says so, and a strict build fails
        uri = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        return link["before"] + uri + (link["anchor"] or "") + link["after"]

    parts, end = [], 0
    for block in FENCED.finditer(markdown):  # code is left as it is
        parts += [LINK.sub(on_the_site, markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join(parts) + LINK.sub(on_the_site, markdown[end:])


def repository_path(uri: str) -> str:
    """Where the page of the site lies in the repository."""
    for name, renamed in RENAMED.items():
        if uri == renamed:
            return name
    return uri if PurePosixPath(uri).parts[0] in ("examples", "experiments", "bench") else f"docs/{uri}"


def site_uri(path: str) -> str:
    """The page of the site that a file of the repository is."""
    return RENAMED.get(path, path.removeprefix("docs/"))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return FORMULA.sub(mathml, html)


def mathml(formula: re.Match) -> str:
    r"""MathML of what arithmatex left as \(...\) or \[...\]."""
    tex = unescape(formula["tex"]).strip()
    if not tex.startswith(("\\(", "\\[")):
        raise ValueError(f"a formula that is neither inline nor displayed: {tex}")
    display = "block" if tex.startswith("\\[") else "inline"
    found = convert(tex[2:-2].strip(), display=display)
    if "\\" in found or "<mi>&</mi>" in found:  # a command that latex2mathml does not know is left as it is
        raise ValueError(f"a formula that latex2mathml cannot read: {tex}")
    return found.replace("<math ", f'<math alttext="{escape(tex[2:-2].strip())}" ', 1)
