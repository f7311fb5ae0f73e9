"""Where in a rendered text each of the last tokens of a row stands, walking from the end."""

from itertools import accumulate

from pear.align.errors import Unaligned
from pear.align.normalize import normalize
from pear.align.pieces import SPACE, Pieces


def locate(ids: list[int], start: int, text: str, pieces: Pieces) -> list[tuple[int, int]]:
    """The bytes `[begin, end)` of `text` for each of `ids[start:]`, ascending and without holes.

    The tokens of a text, spelled out, are the text, as it is or as the tokenizer's normalizer leaves it; so the last of
    them are its end. Everything is checked against the text byte by byte. A token that ends within a character sequence
    that the normalizer rewrote has no bytes: those of the sequence belong to the token that ends it.

    Raises:
        Unaligned: the tokens spell another text.
    """
    try:
        exact = text.encode()
    except UnicodeEncodeError:
        raise Unaligned("the text holds a lone surrogate, which no UTF-8 can hold") from None
    surfaces = [pieces.surface(token) for token in ids[start:]]
    spelled = b"".join(surfaces)
    if exact.endswith(spelled):
        return _follow(surfaces, len(exact) - len(spelled))

    try:
        return _match(ids, start, exact, surfaces, pieces)
    except _Mismatch as error:
        if pieces.normalizer is None and pieces.kind != "spaces":
            raise Unaligned(_explain(error, ids, pieces)) from None
    change = pieces.normalizer.normalize_str if pieces.normalizer is not None else str
    fold = pieces.kind == "spaces"
    used = sorted({pieces.added[token].content for token in ids[start:] if token in pieces.added})
    normalized = normalize(text, lambda part: change(part).replace(SPACE, " ") if fold else change(part), used)
    try:
        found = _match(ids, start, normalized.data, surfaces, pieces)
    except _Mismatch as error:
        raise Unaligned(_explain(error, ids, pieces)) from None
    return _to_original(found, normalized)


def _follow(surfaces: list[bytes], at: int) -> list[tuple[int, int]]:
    ends = list(accumulate(map(len, surfaces), initial=at))
    return list(zip(ends, ends[1:], strict=False))


def _to_original(found, normalized) -> list[tuple[int, int]]:
    """Places in the normalized bytes to places in the original ones; see `locate` for what ends within a cluster."""
    places = []
    reached = None
    for begin, end in found:
        if reached is None:
            reached = normalized.original(begin)
            if reached is None:
                raise Unaligned("the completion's first token starts within characters that the normalizer composes")
        stop = normalized.original(end)
        stop = reached if stop is None else stop
        places.append((reached, stop))
        reached = stop
    return places


class _Mismatch(Exception):
    def __init__(self, index: int, at: int, text: bytes, spelled: bytes):
        super().__init__()
        self.index, self.at, self.text, self.spelled = index, at, text, spelled


def _match(ids: list[int], start: int, text: bytes, surfaces: list[bytes], pieces: Pieces) -> list[tuple[int, int]]:
    """`_walk`, with as few special tokens at the end as possible that the tokenizer appended to the text."""
    first_error = None
    for appended in range(len(surfaces) + 1):
        if appended and not getattr(pieces.added.get(ids[-appended]), "special", False):
            break
        try:
            return _walk(ids, start, text, surfaces, pieces, appended)
        except _Mismatch as error:
            first_error = first_error or error
    raise first_error


def _walk(
    ids: list[int], start: int, text: bytes, surfaces: list[bytes], pieces: Pieces, appended: int
) -> list[tuple[int, int]]:
    """Match `surfaces` with the end of `text`, from the last added token to the first.

    Between two added tokens the surfaces are the text, or the text behind a dummy space. What an added token strips
    (`lstrip`, `rstrip`) belongs to it. The tokenizer itself put the last `appended` tokens there, and special tokens at
    a row's very start that the text does not have: they stand for nothing.
    """
    places: list[tuple[int, int]] = [(0, 0)] * len(surfaces)
    added = [pieces.added.get(token) for token in ids[start:]]
    pos, i = len(text), len(surfaces) - appended
    places[i:] = [(pos, pos)] * appended
    while i:
        first = i
        while first and added[first - 1] is None:
            first -= 1
        before = added[first - 1] if first else (pieces.added.get(ids[start - 1]) if start else None)
        fresh = before is not None or start + first == 0
        if first < i:  # tokens of text
            spelled = b"".join(surfaces[first:i])
            skip = _dummy(text, pos, spelled, before, fresh and pieces.dummy_prefix, at_start=start + first == 0)
            if skip is None:
                raise _Mismatch(start + first, pos, text, spelled)
            begin = pos - len(spelled) + skip
            own = surfaces[first:i]
            if skip:  # the dummy prefix is the first token's first byte, or all of it
                holder = next(j for j, surface in enumerate(own) if surface)
                own[holder] = own[holder][skip:]
            places[first:i] = _follow(own, begin)
            pos, i = begin, first
        if i:
            token, content = added[i - 1], surfaces[i - 1]
            end = pos
            if token.rstrip:
                while not text[:pos].endswith(content) and pos and text[pos - 1 : pos].isspace():
                    pos -= 1
            if not text.endswith(content, 0, pos):
                if token.special and start == 0 and all(a is not None and a.special for a in added[:i]):
                    return places  # put in front by the tokenizer
                raise _Mismatch(start + i - 1, pos, text, content)
            pos -= len(content)
            if token.lstrip:
                while pos and text[pos - 1 : pos].isspace():
                    pos -= 1
            i -= 1
            places[i] = (pos, end)
    return places


def _dummy(text: bytes, pos: int, spelled: bytes, before, allowed: bool, at_start: bool) -> int | None:
    """How many bytes of `spelled`, which ends at `pos` of `text`, are a dummy prefix: 0, 1, or None if neither fits."""
    fits = [skip for skip in (0, 1) if text.endswith(spelled[skip:], 0, pos)]
    if not (allowed and spelled.startswith(b" ")):
        fits = [skip for skip in fits if skip == 0]
    if len(fits) < 2:
        return fits[0] if fits else None
    for skip in fits:  # both fit: the one before which the token before ends, or nothing stands
        at = pos - len(spelled) + skip
        if at == 0 if at_start else before is not None and text.endswith(before.content.encode(), 0, at):
            return skip
    return 0


def _explain(error: _Mismatch, ids: list[int], pieces: Pieces) -> str:
    """Where text and tokens part, seen from the end."""
    unknown = getattr(pieces.tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in ids[error.index :]:
        return "the tokens hold the tokenizer's token for unknown text: the text is lost there"
    text, spelled = error.text[: error.at], error.spelled
    common = 0
    while common < min(len(text), len(spelled)) and text[-1 - common] == spelled[-1 - common]:
        common += 1
    end = -common or None
    shown = [part[:end][-20:].decode(errors="backslashreplace") for part in (text, spelled)]
    return f"the tokens do not spell the text: it has {shown[0]!r} where they have {shown[1]!r}"
