"""Text as a person should see it: each token's part of it, and nothing invisible or that turns the line around."""

import unicodedata
from codecs import getincrementaldecoder
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from pear.align import Unaligned
from pear.align.pieces import pieces_of

_JOINERS = "\u200c\u200d"  # belong to words and emoji
_SIGNS = {"\n": "⏎\n", "\t": "⇥", "\r": "␍"}


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text. A character of several tokens stands at its last one."""
    pieces, texts = pieces_of(tokenizer), []
    gap = " " if pieces.kind == "plain" and " " in tokenizer.decode(ids[:2]).strip() else ""  # of a list of words
    decode = getincrementaldecoder("utf-8")("replace").decode
    for number, token in enumerate(ids, start=1):
        try:
            surface = pieces.surface(int(token))
        except Unaligned:  # an id that no token has
            texts.append(f"⟨{token}⟩")
            continue
        text = decode(surface, number == len(ids))
        texts.append((text if text or not surface else f"⟨{surface.hex(' ').upper()}⟩") + gap)
    return texts


def visible(text: str) -> str:
    """The text with a sign for whatever has no shape of its own, changes direction, or is no character at all."""
    return "".join(_sign(character, len(text)) for character in text)


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


def one_line(text: str) -> str:
    """`visible` text on one line."""
    return visible(text).replace("\n", "")
