"""Where in a rendered text each of the last tokens of a row stands, walking from the end."""

from itertools import accumulate
from typing import NamedTuple

from pear.align.errors import Unaligned
from pear.align.normalize import Normalized, normalize
from pear.align.pieces import SPACE, Pieces


class Place(NamedTuple):
    """The bytes `[begin, end)` of a text that a token stands for; none where `begin == end`."""

    begin: int
    end: int
    whole: bool = True  # False: tokens before the ones that were asked for have a part of these bytes


def locate(ids: list[int], start: int, text: str, pieces: Pieces) -> list[Place]:
    """The places in the bytes of `text` of each of `ids[start:]`, ascending and without holes.

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
    if exact.endswith(spelled) and (start or len(spelled) == len(exact)):
        return _follow(surfaces, len(exact) - len(spelled))

    try:
        return _match(ids, start, exact, surfaces, pieces)
    except _Mismatch as error:
        if pieces.normalizer is None and pieces.kind != "spaces":
            raise Unaligned(_explain(error, ids, pieces)) from None
    change = pieces.normalizer or str
    fold = pieces.kind == "spaces"
    used = sorted({pieces.added[token].content for token in ids[start:] if token in pieces.added})
    normalized = normalize(text, lambda part: change(part).replace(SPACE, " ") if fold else change(part), used)
    try:
        found = _match(ids, start, normalized.data, surfaces, pieces)
    except _Mismatch as error:
        loss = normalized.loss(error.at - len(error.spelled), error.at)
        raise Unaligned(loss or _explain(error, ids, pieces)) from None
    if found and (loss := normalized.loss(found[0].begin, len(normalized.data))):
        raise Unaligned(loss)
    return _to_original(found, normalized)


def _follow(surfaces: list[bytes], at: int) -> list[Place]:
    ends = list(accumulate(map(len, surfaces), initial=at))
    return list(map(Place, ends, ends[1:]))


def _to_original(found: list[Place], normalized: Normalized) -> list[Place]:
    """Places in the normalized bytes to places in the original ones; see `locate` for what ends within a cluster."""
    places = []
    first = found[0].begin if found else 0
    reached = normalized.original(first)
    whole = reached is not None
    if not whole:  # the tokens before have a part of this cluster
        reached = normalized.cluster(first)
    for _, end, _ in found:
        stop = normalized.original(end)
        if stop is None:
            places.append(Place(reached, reached))
        else:
            places.append(Place(reached, stop, whole))
            reached, whole = stop, True
    return places


class _Mismatch(Exception):
    def __init__(self, index: int, at: int, text: bytes, spelled: bytes):
        super().__init__()
        self.index, self.at, self.text, self.spelled = index, at, text, spelled


def _match(ids: list[int], start: int, text: bytes, surfaces: list[bytes], pieces: Pieces) -> list[Place]:
    """`_walk`, with as few special tokens at the end as possible that the tokenizer appended to the text."""
    first_error = None
    for appended in range(len(surfaces) + 1):
        if appended and not pieces.silent(ids[-appended]):
            break
        try:
            return _walk(ids, start, text, surfaces, pieces, appended)
        except _Mismatch as error:
            first_error = first_error or error
    raise first_error


def _walk(ids: list[int], start: int, text: bytes, surfaces: list[bytes], pieces: Pieces, appended: int) -> list[Place]:
    """Match `surfaces` with the end of `text`, from the last added token to the first.

    Between two added tokens the surfaces are the text, or the text behind a dummy space. What an added token strips
    (`lstrip`, `rstrip`) belongs to it. The tokenizer itself put the last `appended` tokens there, and special tokens at
    a row's very start that the text does not have: they stand for nothing.
    """
    places = [Place(0, 0)] * len(surfaces)
    added = [pieces.added.get(token) for token in ids[start:]]
    pos, i = len(text), len(surfaces) - appended
    places[i:] = [Place(pos, pos)] * appended
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
                while not text.endswith(content, 0, pos) and pos and text[pos - 1 : pos].isspace():
                    pos -= 1
            if not text.endswith(content, 0, pos):
                if start == pos == 0 and all(map(pieces.silent, ids[:i])):
                    return places  # put in front by the tokenizer
                raise _Mismatch(start + i - 1, pos, text, content)
            pos -= len(content)
            if token.lstrip:
                while pos and text[pos - 1 : pos].isspace():
                    pos -= 1
            i -= 1
            places[i] = Place(pos, end)
    if start == 0 and pos:
        raise _Mismatch(0, pos, text, b"")
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
    unknown = pieces.tokenizer.unk_token_id
    if unknown is not None and unknown in ids[error.index :]:
        return "the tokens hold the tokenizer's token for unknown text: the text is lost there"
    text, spelled = error.text[: error.at], error.spelled
    common = 0
    while common < min(len(text), len(spelled)) and text[-1 - common] == spelled[-1 - common]:
        common += 1
    end = -common or None
    shown = [part[:end][-20:].decode(errors="backslashreplace") for part in (text, spelled)]
    return f"the tokens do not spell the text: it has {shown[0]!r} where they have {shown[1]!r}"
