"""Text as a terminal may show it: data, names of files and models, and answers of servers must not control it.

`visible` puts a sign in place of each character that has no shape, moves the cursor, or changes the direction of text:
escape sequences, U+202E, line separators, halves of surrogate pairs. `one_line` is for messages, `many_lines` for text
of several lines. `install` applies the filter to everything that the command line prints.
"""

import logging
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

_JOINERS = "\u200c\u200d"  # belong to words and emoji
_SIGNS = {"\n": "⏎\n", "\t": "⇥", "\r": "␍"}
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def visible(text: str) -> str:
    """The text with a sign for whatever has no shape of its own, changes direction, or is no character at all."""
    if text.isprintable():
        return text
    return "".join(_sign(character, len(text)) for character in text)


def one_line(text: str) -> str:
    """`visible` text on one line: a line end, with the indentation behind it, becomes a space."""
    return visible(re.sub(r"\s*\n\s*", " ", text.strip("\n")))


def many_lines(text: str) -> str:
    """`visible` text that keeps its lines."""
    return "\n".join(visible(line).replace("⇥", "\t") for line in text.split("\n"))


def _sign(character: str, length: int) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if character in _JOINERS and length > 1:
        return character
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"⟨U+{code:04X}⟩"
    return character


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def say(text: str, *, error: bool = False) -> None:
    """Print a line of the command's own: a result on stdout, or an error on stderr."""
    print(one_line(text), file=sys.stderr if error else sys.stdout, flush=True)


def install() -> None:
    """Filter what rich (tables, bars, tracebacks; TRL's samples too), logging and warnings print in this process."""
    from rich.console import Console

    if getattr(Console.render, "filtered", False):
        return
    render, make_record, format_warning = Console.render, logging.getLogRecordFactory(), warnings.formatwarning

    def filtered(self: Console, *args: Any, **kwargs: Any) -> Iterable[Any]:
        return _filtered(render(self, *args, **kwargs))

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make_record(*args, **kwargs)
        try:
            text = made.getMessage()
        except Exception:  # the handler reports it
            return made
        ours = made.name.split(".")[0] == "pear"
        made.msg, made.args = one_line(text) if ours else many_lines(_COLOURS.sub("", text)), ()
        return made

    def warning(*args: Any, **kwargs: Any) -> str:
        return many_lines(format_warning(*args, **kwargs))

    filtered.filtered = True
    Console.render, warnings.formatwarning = filtered, warning
    logging.setLogRecordFactory(record)


def _filtered(segments: Iterable[Any]) -> Iterator[Any]:
    for segment in segments:
        if segment.control or segment.text.isprintable():  # what rich itself sends to the terminal
            yield segment
        else:
            yield segment._replace(text=many_lines(segment.text))
