"""What each token stands for: the bytes that it puts into a text, as its kind of tokenizer spells them."""

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from transformers import PreTrainedTokenizerBase

from pear.align.errors import Unaligned

SPACE = "▁"  # U+2581, SentencePiece's space
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_WORDPIECE = "##"


def _byte_level_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte (GPT-2's `bytes_to_unicode`, turned around).

    Printable characters of Latin-1 stand for themselves, the other bytes for the characters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


@dataclass
class Pieces:
    """The bytes of every token of one tokenizer."""

    owner: ReferenceType  # to the tokenizer: `Pieces` are kept as long as it lives, and must not keep it alive
    kind: str  # "bytes" (byte-level BPE), "spaces" (SentencePiece), "words" (WordPiece) or "plain"
    byte_fallback: bool  # <0xAB> is the byte AB
    dummy_prefix: bool  # a space may be put before text that has none: at the start, and after an added token
    added: dict[int, Any]  # the added tokens by id: each stands for its own content, `lstrip` and `rstrip` eat spaces
    normalizer: Callable[[str], str] | None  # without the parts that `surface` undoes
    known: dict[int, bytes] = field(default_factory=dict)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.owner()

    def surface(self, token: int) -> bytes:
        """The bytes that a token puts into the (normalized) text; a dummy prefix is part of them."""
        found = self.known.get(token)
        if found is None:
            found = self.known[token] = self._spell(token)
        return found

    def silent(self, token: int) -> bool:
        """Whether a tokenizer may put this token around a text that does not have it."""
        return token != self.tokenizer.unk_token_id and getattr(self.added.get(token), "special", False)

    def _spell(self, token: int) -> bytes:
        if token in self.added:
            return self.added[token].content.encode()
        piece = None
        with contextlib.suppress(IndexError, KeyError, OverflowError):  # tokenizers in Python raise what they like
            piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            raise Unaligned(f"token {token} is not in the tokenizer's vocabulary of {len(self.tokenizer)}")
        if isinstance(piece, bytes):
            return piece
        if self.kind == "bytes" and all(c in _ALPHABET for c in piece):
            return bytes(_ALPHABET[c] for c in piece)
        if self.byte_fallback and (byte := _BYTE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        if self.kind == "spaces":
            piece = piece.replace(SPACE, " ")
        elif self.kind == "words":
            piece = piece[len(_WORDPIECE) :] if piece.startswith(_WORDPIECE) else " " + piece
        return piece.encode()


_CACHE: WeakKeyDictionary = WeakKeyDictionary()


def pieces_of(tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """The `Pieces` of a tokenizer, made once and anew when its vocabulary has grown."""
    found = _CACHE.get(tokenizer)
    if found is None or found[0] != len(tokenizer):
        found = _CACHE[tokenizer] = (len(tokenizer), _make(tokenizer))
    return found[1]


def _make(tokenizer: PreTrainedTokenizerBase) -> Pieces:
    added = tokenizer.added_tokens_decoder
    owner = ref(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # tokenizers in Python: SentencePiece's, or by their authors' own rules
        model = getattr(tokenizer, "sp_model", None)
        if model is None:
            return Pieces(owner, "plain", False, False, added, None)
        return Pieces(owner, "spaces", True, True, added, lambda text: _sentencepiece_normalize(model, text))
    decoder, pre_tokenizer, normalizer = (
        _steps(getattr(backend, k)) for k in ("decoder", "pre_tokenizer", "normalizer")
    )
    steps = [*decoder, *pre_tokenizer, *normalizer]
    types = {step["type"] for step in steps}
    byte_fallback = "ByteFallback" in types or getattr(backend.model, "byte_fallback", False)
    if "ByteLevel" in types:
        kind = "bytes"
    elif "Metaspace" in types or byte_fallback or any(SPACE in json.dumps(s, ensure_ascii=False) for s in steps):
        kind = "spaces"
    elif "WordPiece" in types:
        kind = "words"
    else:
        kind = "plain"
    dummy = kind == "words" or "Prepend" in types
    dummy |= any(
        step.get("add_prefix_space") or step.get("prepend_scheme", "never") != "never" for step in pre_tokenizer
    )
    undone = [step for step in normalizer if step["type"] not in ("Prepend", "ByteLevel")]
    return Pieces(owner, kind, byte_fallback, dummy, added, _normalizer(undone))


def _steps(component: Any) -> list[dict[str, Any]]:
    """A component of a fast tokenizer as a flat list of its steps, each as `tokenizers` writes it to JSON."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    return list(_flatten(state))


def _flatten(state: dict[str, Any]):
    if state["type"] != "Sequence":
        yield state
        return
    for key in ("decoders", "pretokenizers", "normalizers"):
        for step in state.get(key, ()):
            yield from _flatten(step)


def _sentencepiece_normalize(model: Any, text: str) -> str:
    """What SentencePiece's normalizer makes of a text amid others: without a dummy space, none at its ends lost."""
    guarded = model.normalize(f"|{text}|")
    return guarded[guarded.index("|") + 1 : guarded.rindex("|")]


def _normalizer(steps: list[dict[str, Any]]) -> Callable[[str], str] | None:
    if not steps:
        return None
    from tokenizers import normalizers

    made = normalizers.Sequence([])
    made.__setstate__(json.dumps({"type": "Sequence", "normalizers": steps}).encode())
    return made.normalize_str
