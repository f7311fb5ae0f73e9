"""Text as a person should see it: each token's part of it, and nothing invisible or that turns the line around."""

from codecs import getincrementaldecoder
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from pear.align import Unaligned
from pear.align.pieces import pieces_of
from pear.shown import visible


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


def one_line(text: str) -> str:
    """`visible` text on one line."""
    return visible(text).replace("\n", "")
