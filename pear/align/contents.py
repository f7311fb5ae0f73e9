"""Where in a rendered chat the contents of the completion's messages stand, found by rendering it with stand-ins."""

import copy
import itertools
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pear.align.errors import Unaligned
from pear.chat import TemplateLimit

Render = Callable[[list[dict[str, Any]]], str]  # the completion's messages to the text of the whole chat


@dataclass
class Region:
    """A run of characters that the rendered text and the completion's text share."""

    begin: int  # in the rendered text
    end: int
    at: int  # where it starts in the completion's text
    close: int  # where in the completion's text what stands behind it belongs: the end of its content


@dataclass
class _Leaf:
    """A string within the messages."""

    message: int
    keys: tuple[Any, ...]  # the way to it within the message
    text: str
    at: int  # where it starts in the completion's text


@dataclass
class _Cut:
    """A part of a leaf that a stand-in replaces: all of it, or what is between two think tags."""

    leaf: _Leaf
    begin: int
    end: int


@dataclass
class _Found:
    """A cut in the rendered text: `rendered[begin:end] == leaf.text[at : at + end - begin]`."""

    number: int  # of the cut
    cut: _Cut
    begin: int
    end: int
    at: int


def contents_of(messages: list[dict[str, Any]]) -> list[str]:
    """The strings that make the completion's text, in order: of each message `reasoning_content`, then `content`.

    Raises:
        Unaligned: a content that is neither a string nor a list of parts of text.
    """
    return [leaf.text for leaf in leaves_of(messages)]


def leaves_of(messages: list[dict[str, Any]]) -> list[_Leaf]:
    """The strings that make the completion's text, with the message and key of each."""
    leaves: list[_Leaf] = []
    at = 0
    for i, message in enumerate(messages):
        for keys, text in _strings(message, i):
            leaves.append(_Leaf(i, keys, text, at))
            at += len(text)
    return leaves


def _strings(message: dict[str, Any], number: int) -> Iterator[tuple[tuple[Any, ...], str]]:
    for key in ("reasoning_content", "content"):
        value = message.get(key)
        if isinstance(value, str):
            yield (key,), value
        elif isinstance(value, list):
            for j, part in enumerate(value):
                if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                    raise Unaligned(f"part {j} of `{key}` of completion message {number} is no text")
                yield (key, j, "text"), part["text"]
        elif value is not None:
            raise Unaligned(f"`{key}` of completion message {number} is no string")


def find_contents(messages: list[dict[str, Any]], rendered: str, render: Render, tags: list[str]) -> list[Region]:
    """The regions of `rendered` that hold the contents of the completion's `messages`, ascending on both sides.

    The chat is rendered again with a stand-in for each content. What is around the stand-ins is the template's, and
    with the contents put back - whole, or with white space at their ends stripped - it must give `rendered`. Some
    templates take a content apart at its think tags; so does a second try: each part then has a stand-in of its own,
    the tags stay. A content that the template leaves out has no region. Offsets are in characters.

    Raises:
        Unaligned: a content was changed, or stands there twice or out of order, or nothing of them is there.
    """
    leaves = [leaf for leaf in leaves_of(messages) if leaf.text.strip()]
    cuts = [_Cut(leaf, 0, len(leaf.text)) for leaf in leaves]
    found = _reconstruct(messages, cuts, rendered, render)
    if found is None and any(tag in leaf.text for leaf in leaves for tag in tags):
        cuts = [cut for leaf in leaves for cut in _between(leaf, tags)]
        found = _reconstruct(messages, cuts, rendered, render)
    if found is None:
        raise Unaligned("the chat template rewrites the completion's contents: the rendered chat does not have them")
    if leaves and not found:
        raise Unaligned("the chat template leaves out the completion's contents")
    regions = sorted([*map(_region, found), *_tags(found, cuts, rendered, tags)], key=lambda region: region.begin)
    for region, after in zip(regions, [*regions, None][1:], strict=True):
        leaf = leaves[bisect_right(leaves, region.at, key=lambda leaf: leaf.at) - 1]
        end = leaf.at + len(leaf.text)
        region.close = end if after is None or after.at >= end else region.at + region.end - region.begin
    return regions


def _region(found: _Found) -> Region:
    at = found.cut.leaf.at + found.at
    return Region(found.begin, found.end, at, at)


def _between(leaf: _Leaf, tags: list[str]) -> list[_Cut]:
    """The parts of a leaf around its think tags, without the white space next to the tags; blank ones are none."""
    edges, at = [0], 0
    for match in re.finditer("|".join(map(re.escape, tags)), leaf.text):
        edges += [match.start(), match.end()]
    edges.append(len(leaf.text))
    cuts = []
    for at, end in zip(edges[::2], edges[1::2], strict=True):
        part = leaf.text[at:end]
        if part.strip():
            begin = at + len(part) - len(part.lstrip()) if at else at
            stop = at + len(part.rstrip()) if end < len(leaf.text) else end
            cuts.append(_Cut(leaf, begin, stop))
    return cuts


def _reconstruct(
    messages: list[dict[str, Any]], cuts: list[_Cut], rendered: str, render: Render
) -> list[_Found] | None:
    """Where the cuts stand in `rendered`, by a rendering with stand-ins; None if the two do not fit together."""
    guard = next(c for c in map(chr, range(0xE000, 0xF8FF)) if c not in rendered)
    stand_ins = copy.deepcopy(messages)
    for _, own in itertools.groupby(enumerate(cuts), key=lambda numbered: numbered[1].leaf.at):
        text, at = "", 0
        for number, cut in own:
            text += cut.leaf.text[at : cut.begin] + f"{guard}{number}{guard}"
            leaf, at = cut.leaf, cut.end
        holder: Any = stand_ins[leaf.message]
        for key in leaf.keys[:-1]:
            holder = holder[key]
        holder[leaf.keys[-1]] = text + leaf.text[at:]
    try:
        parts = re.split(f"{guard}([0-9]+){guard}", render(stand_ins))
    except TemplateLimit:
        raise
    except Exception as error:  # templates are code of the tokenizer's authors; they raise what they like
        raise Unaligned(f"the chat template refuses another content in the completion's place: {error}") from error
    numbers = [int(number) for number in parts[1::2]]
    if guard in "".join(parts[::2]) or sorted(set(numbers)) != numbers:
        return None
    return _fill(parts[::2], numbers, cuts, rendered)


def _fill(literals: list[str], numbers: list[int], cuts: list[_Cut], rendered: str) -> list[_Found] | None:
    """Read `rendered` as literal, cut, literal, ..., literal; where it does not go on, the last cut is read anew."""
    if not rendered.startswith(literals[0]):
        return None
    pos = len(literals[0])  # behind a literal
    found: list[_Found] = []
    others: list[Iterator[_Found]] = []  # for each cut that is read, what else it could be
    while len(found) < len(numbers) or pos < len(rendered):
        if len(found) < len(numbers):
            number = numbers[len(found)]
            others.append(_readings(number, cuts[number], rendered, pos, literals[len(others) + 1]))
        elif found:
            found.pop()
        while others and (reading := next(others[-1], None)) is None:
            others.pop()
            if found:
                found.pop()
        if not others:
            return None
        found.append(reading)
        pos = reading.end + len(literals[len(found)])
    return found


def _readings(number: int, cut: _Cut, rendered: str, pos: int, literal: str) -> Iterator[_Found]:
    """The cut at `pos`, before `literal`: whole, or without some of the white space at its ends."""
    text = cut.leaf.text[cut.begin : cut.end]
    core = text.strip()
    lead = len(text) - len(text.lstrip())
    trail = len(text) - lead - len(core)
    for left in range(lead, -1, -1):
        shown = text[lead - left : lead] + core
        if rendered.startswith(shown, pos):
            for right in range(trail, -1, -1):
                end = pos + len(shown) + right
                if rendered.startswith(text[len(text) - trail :][:right] + literal, pos + len(shown)):
                    yield _Found(number, cut, pos, end, cut.begin + lead - left)


def _tags(found: list[_Found], cuts: list[_Cut], rendered: str, tags: list[str]) -> Iterator[Region]:
    """Regions for the tags around the cuts, with the white space next to them where the template has left it alone."""
    for i, after in enumerate([*found, None]):
        before = found[i - 1] if i else None
        begin, end = (before.end if before else 0), (after.begin if after else len(rendered))
        gap = rendered[begin:end]
        if before and after and before.cut.leaf is after.cut.leaf and after.number == before.number + 1:
            leaf, first = before.cut.leaf, before.cut.end
            own = leaf.text[first : after.cut.begin]
            if own == gap:
                yield Region(begin, end, leaf.at + first, 0)
                continue
            for tag in tags:
                if own.count(tag) == gap.count(tag) == 1:
                    at = begin + gap.index(tag)
                    yield Region(at, at + len(tag), leaf.at + first + own.index(tag), 0)
            continue
        if before and (tail := _tail(before, cuts).rstrip()):
            tag = tail.lstrip()
            at = len(gap) - len(gap.lstrip())
            if gap.startswith(tag, at):
                first = before.cut.leaf.at + before.cut.end + len(tail) - len(tag)
                same = gap[:at] == tail[: -len(tag)]
                yield Region(begin + (0 if same else at), begin + at + len(tag), first - (at if same else 0), 0)
                begin, gap = begin + at + len(tag), gap[at + len(tag) :]
        if after and (head := _head(after, cuts).lstrip()):
            tag = head.rstrip()
            shown = gap.rstrip()
            if shown.endswith(tag):
                space = gap[len(shown) :] if gap[len(shown) :] == head[len(tag) :] else ""
                first = end - len(gap) + len(shown) - len(tag)
                yield Region(first, first + len(tag + space), after.cut.leaf.at + after.cut.begin - len(head), 0)


def _tail(found: _Found, cuts: list[_Cut]) -> str:
    """What the leaf has between this cut and the next, or its end."""
    after = cuts[found.number + 1] if found.number + 1 < len(cuts) else None
    end = after.begin if after and after.leaf is found.cut.leaf else len(found.cut.leaf.text)
    return found.cut.leaf.text[found.cut.end : end]


def _head(found: _Found, cuts: list[_Cut]) -> str:
    """What the leaf has between the cut before, or its start, and this one."""
    before = cuts[found.number - 1] if found.number else None
    begin = before.end if before and before.leaf is found.cut.leaf else 0
    return found.cut.leaf.text[begin : found.cut.begin]
