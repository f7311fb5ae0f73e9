"""Where each token of a completion stands in the completion's text, for token rows, chats and tokens from an API."""

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from pear.align.contents import Region, contents_of, find_contents
from pear.align.errors import Unaligned
from pear.align.locate import Place, locate
from pear.align.pieces import Pieces, pieces_of
from pear.align.roles import ROLES, THINK, Roles, names_of
from pear.io import DataError
from pear.rows import TokenizedRow, rendered

NO_BYTES = "no bytes: "  # how the mark of a token of text starts that stands for none of its bytes
JOINT = "joint "  # how the mark of a token starts that joins bytes of the text with others


@dataclass(frozen=True)
class Spans:
    """The tokens of one completion in its text, as bytes of UTF-8.

    `extents[i]` is `(b, e)`: token i of the C that the completion has stands for the bytes [b, e) of its text. They
    ascend; where a token has b == e it has no bytes, and `marks[i]` says what it is:

    - a role (see `pear.align.ROLES`), or the surface of a token that has none: a structural token, which is no part of
      the text but stands at this place of it;
    - "no bytes: SURFACE": a token of the text that is nothing without the next (a dummy space, or the first part of
      characters that a normalizer rewrote);
    - "joint N: SURFACE": a token that joins the N bytes from here with others, of the prompt or the template, or shares
      them with tokens before the completion. No token has these bytes then.
    """

    extents: list[tuple[int, int]]
    marks: dict[int, str] = field(default_factory=dict)

    def of(self, chosen: Sequence[bool]) -> "Spans":
        """Those of some of the tokens: what a tool or the user says in a completion has bytes, and no token of it."""
        numbers = {i: n for n, i in enumerate(itertools.compress(range(len(chosen)), chosen))}
        marks = {numbers[i]: mark for i, mark in self.marks.items() if i in numbers}
        return Spans([self.extents[i] for i in numbers], marks)

    def to_json(self) -> dict[str, Any]:
        """The value of a scored row's `behavior_spans`."""
        return {"bytes": [list(extent) for extent in self.extents], "marks": {str(i): m for i, m in self.marks.items()}}

    @classmethod
    def from_json(cls, value: Any, where: str) -> "Spans":
        """What `to_json` made; other keys (`logprobs`) are not looked at. `where` is "file:line".

        Raises:
            Unaligned: the row says itself that it has none, `{"problem": reason}`.
            DataError: it is something else.
        """
        again = "Score or import the row again."
        if not isinstance(value, dict):
            raise DataError(f"{where}: `behavior_spans` must be an object, got {type(value).__name__}. {again}")
        if "problem" in value:
            raise Unaligned(str(value["problem"]))
        extents, marks = value.get("bytes"), value.get("marks", {})
        if not isinstance(extents, list) or not isinstance(marks, dict):
            raise DataError(f"{where}: `behavior_spans` must have a list `bytes` and an object `marks`. {again}")
        at = 0
        for i, extent in enumerate(extents):
            if not (isinstance(extent, list) and len(extent) == 2 and all(type(x) is int for x in extent)):
                raise DataError(
                    f"{where}: `behavior_spans.bytes[{i}]` must be [begin, end], got {extent!r:.60}. {again}"
                )
            if not at <= extent[0] <= extent[1]:
                raise DataError(
                    f"{where}: `behavior_spans.bytes[{i}]` is {extent}: it must not start before {at}, where the token "
                    f"before ends, nor end before it starts. {again}"
                )
            at = extent[1]
        own: dict[int, str] = {}
        for key, mark in marks.items():
            i = int(key) if key.isascii() and key.isdigit() else -1
            if not 0 <= i < len(extents) or not isinstance(mark, str) or extents[i][0] != extents[i][1]:
                raise DataError(
                    f"{where}: `behavior_spans.marks[{key!r}]` must be a string for one of {len(extents)} tokens "
                    f"that has no bytes, got {mark!r:.60}. {again}"
                )
            own[i] = mark
        return cls([(b, e) for b, e in extents], own)


def spans_of(
    row: dict[str, Any], tokenized: TokenizedRow, tokenizer: PreTrainedTokenizerBase, roles: Roles = ROLES
) -> Spans:
    """Where the completion tokens of a row, as `tokenize_row` made them (or a server that is right), are in its text.

    The completion's text is the string `completion`, or the contents of its messages, joined (`reasoning_content`
    before `content`). The ids need not be the ones that the tokenizer would choose; they must spell the row's text.

    Args:
        row: has `prompt` and `completion`, and for chats what the template needs (`tools`, `chat_template_kwargs`)
        tokenized: the row's `input_ids` and `completion_mask`; from its first 1 on is the completion, in which tokens
            of others (a tool's output) have a 0
        tokenizer: the one whose ids these are
        roles: what structural tokens are called (see `pear.align.read_roles`)

    Raises:
        Unaligned: the tokens do not spell the text, or the chat template rewrites it; with the reason.
    """
    mask = [bool(bit) for bit in tokenized.completion_mask]
    if True not in mask:
        raise Unaligned("the row has no token of a completion")
    start = mask.index(True)
    if isinstance(row["prompt"], str) and not all(mask[start:]):  # nobody but the policy speaks in it
        raise Unaligned("the completion's tokens are not the last ones of the row")
    names = names_of(roles, tokenizer.eos_token)
    text = rendered(row, tokenizer)
    if isinstance(row["prompt"], str):
        begin = len(row["prompt"])
        end = begin + len(row["completion"])
        regions = [Region(begin, end, 0, len(row["completion"]))]
        contents = row["completion"]
    else:
        tags = [token for role in THINK for token in roles.get(role, ())]
        regions = find_contents(
            row["completion"], text, lambda messages: rendered(row | {"completion": messages}, tokenizer), tags
        )
        contents = "".join(contents_of(row["completion"]))
    pieces = pieces_of(tokenizer)
    ids = list(tokenized.input_ids)
    places = _locate(ids, start, text, regions, pieces)
    surfaces = [pieces.surface(token) for token in ids[start:]]
    structural = [token in pieces.added for token in ids[start:]]
    spans = _to_text(places, surfaces, structural, _in_bytes(regions, text, contents), names)
    return spans.of(mask[start:])


def _locate(ids: list[int], start: int, text: str, regions: list[Region], pieces: Pieces) -> list[Place]:
    """`locate`; where a server's tokens stop before the text does - no EOS, or nothing after it - in as much of it."""
    try:
        return _locate_all(ids, start, text, regions, pieces)
    except Unaligned:
        end = regions[-1].end if regions else len(text)
        if ids[-1] in pieces.added:
            content = pieces.added[ids[-1]].content
            end = text.find(content, end) + len(content) if content in text[end:] else len(text)
        if end == len(text):
            raise
        with contextlib.suppress(Unaligned):
            return _locate_all(ids, start, text[:end], regions, pieces)
        raise


def _locate_all(ids: list[int], start: int, text: str, regions: list[Region], pieces: Pieces) -> list[Place]:
    """`locate`; what the contents have before the first token must be the token's before that, and no lost text."""
    places = locate(ids, start, text, pieces)
    if regions and places[0].begin > len(text[: regions[0].begin].encode()):
        locate(ids, start - 1, text, pieces)
    return places


def spans_of_text(tokens: Sequence[bytes | str], contents: str | Sequence[str], roles: Roles = ROLES) -> Spans:
    """Where tokens that came as bytes, from an API without ids, are in the text of a completion.

    Args:
        tokens: each token's bytes (or text), in order; their bytes may cut a character in two
        contents: the completion's text, or the strings that make it (`reasoning_content`, then `content`); beside them
            the tokens may have tokens of `roles` and white space, which is structural

    Raises:
        Unaligned: the tokens spell something else, or there is more than one way to find the contents in them.
    """
    surfaces = [token.encode() if isinstance(token, str) else bytes(token) for token in tokens]
    contents = [contents] if isinstance(contents, str) else list(contents)
    spelled = b"".join(surfaces)
    names = names_of(roles)
    ends = list(itertools.accumulate(map(len, surfaces), initial=0))
    places = list(map(Place, ends, ends[1:]))
    regions = _find_in_tokens(spelled, [part.encode() for part in contents], names)
    return _to_text(places, surfaces, [False] * len(surfaces), regions, names)


# ---------------------------------------------------------------------------------------------------------------------
# From places in what was tokenized to places in the completion's text


def _in_bytes(regions: list[Region], rendered_text: str, contents: str) -> list[Region]:
    """Regions in characters of a rendered text and of the contents, in bytes of both."""

    def offsets(text: str, wanted: set[int]) -> dict[int, int]:
        found, at, size = {}, 0, 0
        for offset in sorted(wanted):
            size += len(text[at:offset].encode())
            found[offset], at = size, offset
        return found

    outer = offsets(rendered_text, {x for r in regions for x in (r.begin, r.end)})
    inner = offsets(contents, {x for r in regions for x in (r.at, r.close)})
    return [Region(outer[r.begin], outer[r.end], inner[r.at], inner[r.close]) for r in regions]


def _find_in_tokens(spelled: bytes, contents: list[bytes], names: dict[str, str]) -> list[Region]:
    """The regions of `spelled` that are the contents; what is around them must be white space and tokens of `names`."""
    around = re.compile(b"(?:\\s|" + b"|".join(re.escape(name.encode()) for name in names) + b")*")

    def read(k: int, pos: int) -> Iterator[list[int]]:
        if k == len(contents):
            if around.fullmatch(spelled, pos):
                yield []
            return
        at = spelled.find(contents[k], pos)
        while at >= 0 and around.fullmatch(spelled, pos, at):
            for rest in read(k + 1, at + len(contents[k])):
                yield [at, *rest]
            at = spelled.find(contents[k], at + 1)

    if b"".join(contents) == spelled:
        starts = [sum(map(len, contents[:k])) for k in range(len(contents))]
    else:
        contents = [content for content in contents if content]
        ways = list(itertools.islice(read(0, 0), 2))
        if len(ways) != 1:
            problem = (
                "the tokens can be read as the text in more than one way" if ways else _difference(spelled, contents)
            )
            raise Unaligned(problem)
        starts = ways[0]
    regions, at = [], 0
    for start, content in zip(starts, contents, strict=True):
        regions.append(Region(start, start + len(content), at, at + len(content)))
        at += len(content)
    return regions


def _difference(spelled: bytes, contents: list[bytes]) -> str:
    text = b"".join(contents)
    same = next(
        (i for i, (a, b) in enumerate(zip(spelled, text, strict=False)) if a != b), min(len(spelled), len(text))
    )
    shown = [part[same : same + 20].decode(errors="backslashreplace") for part in (spelled, text)]
    return f"the tokens do not add up to the text: they have {shown[0]!r} where it has {shown[1]!r}, at byte {same}"


def _to_text(
    places: list[Place],
    surfaces: list[bytes],
    structural: list[bool],
    regions: list[Region],
    names: dict[str, str],
) -> Spans:
    """Spans from the places of tokens and the regions of contents, both ascending, in bytes of what was tokenized."""
    extents: list[tuple[int, int]] = []
    marks: dict[int, str] = {}
    first = 0  # the first region that does not end before the token starts
    closed = 0  # where in the text the regions before it end
    for i, (begin, end, whole) in enumerate(places):
        while first < len(regions) and regions[first].end <= begin:
            closed = regions[first].close
            first += 1
        surface = surfaces[i].decode(errors="backslashreplace")
        stop = first
        while stop < len(regions) and regions[stop].begin < max(end, begin + 1):
            stop += 1
        within = regions[first:stop]
        covered = sum(min(end, region.end) - max(begin, region.begin) for region in within)
        if begin == end:
            at = within[0].at + begin - within[0].begin if within and not structural[i] else closed
            marks[i] = names.get(surface, surface) if structural[i] else NO_BYTES + surface
            extents.append((at, at))
        elif not covered:
            extents.append((closed, closed))
            marks[i] = names.get(surface, surface)
        else:
            at = within[0].at + max(begin - within[0].begin, 0)
            stop = within[-1].at + min(end, within[-1].end) - within[-1].begin
            if whole and covered == end - begin == stop - at:
                extents.append((at, stop))
            else:
                extents.append((at, at))
                marks[i] = f"{JOINT}{covered}: {surface}"
    if any(after[0] < before[1] for before, after in itertools.pairwise(extents)):
        raise Unaligned("the completion's contents are not in the order of the text")
    return Spans(extents, marks)
