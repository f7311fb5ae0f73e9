"""The code blocks of a page, with what the comments over them say."""

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

SETUP = re.compile(r"\A<!-- run: setup\n(?P<code>.*)^-->\s*\Z", re.S | re.M)
NOT_RUN = re.compile(r"\A<!-- checked, not run: (?P<reason>\S.*?) -->\s*\Z", re.S)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int  # of its first line of code
    language: str  # "setup": Python that readers do not see; "": none was given
    code: str
    not_run: str | None = None  # why

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """Every block, fenced or indented, in order.

    Raises:
        ValueError: a comment over a block that is misspelt, or over none; a fence that makes no block (in HTML, or
            right under the first line of an admonition), which the site might show as code all the same.
    """
    found: list[Block] = []
    taken: set[int] = set()  # lines of blocks, and of hidden set-up
    reason = None  # of the comment before, until its block comes
    for token in MarkdownIt("commonmark").parse(page.read_text()):
        if token.type in ("fence", "code_block"):
            line = token.map[0] + (2 if token.type == "fence" else 1)
            found.append(Block(page, line, token.info.strip(), token.content, reason))
            taken.update(range(*token.map))
            reason = None
        elif reason is not None:
            raise ValueError(f"{page}: 'checked, not run: {reason}' stands over no block")
        elif token.type == "html_block" and (comment := token.content.strip()).startswith("<!--"):
            line = token.map[0] + 1
            if setup := SETUP.match(comment):
                found.append(Block(page, line + 1, "setup", setup["code"]))
                taken.update(range(*token.map))
            elif not_run := NOT_RUN.match(comment):
                reason = " ".join(not_run["reason"].split())
            elif re.match(r"<!--\s*(run|checked|setup)\b", comment):
                raise ValueError(f"{page}:{line}: not understood: {comment.splitlines()[0]}")
    for number, text in enumerate(page.read_text().splitlines()):
        if number not in taken and (text.strip().startswith(("```", "~~~")) or "<pre" in text):
            raise ValueError(f"{page}:{number + 1}: a fence or <pre> that makes no block: {text.strip()}")
    return found
