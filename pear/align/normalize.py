"""A text as a normalizer leaves it, and which bytes of the one are which bytes of the other."""

import functools
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass
class Normalized:
    """The bytes of a text after normalization and, for every run that stays as it is or changes, both its places.

    A run that changes is a cluster: characters that are normalized as one. Its inside has no counterpart in the
    original text, so no boundary there means anything.
    """

    data: bytes = b""
    starts: list[int] = field(default_factory=list)  # of the runs in `data`, ascending
    ends: list[int] = field(default_factory=list)
    originals: list[int] = field(default_factory=list)  # where each run starts in the original bytes
    original_ends: list[int] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)  # the run is the same bytes on both sides
    losses: list[tuple[int, str]] = field(default_factory=list)  # where in `data` text was lost, and how; ascending

    def original(self, at: int) -> int | None:
        """The place in the original bytes of the place `at` in `data`; None inside a cluster that was changed."""
        i = bisect_right(self.starts, at) - 1
        if i < 0:
            return 0
        if at >= self.ends[i]:
            return self.original_ends[i]
        if at == self.starts[i] or self.same[i]:
            return self.originals[i] + at - self.starts[i]
        return None

    def cluster(self, at: int) -> int:
        """Where the cluster around the place `at` in `data` starts in the original bytes."""
        return self.originals[bisect_right(self.starts, at) - 1]

    def loss(self, begin: int, end: int) -> str | None:
        """The last text that was lost between two places of `data`, in words."""
        return next((words for at, words in reversed(self.losses) if begin <= at <= end), None)


def normalize(text: str, change: Callable[[str], str], keep: list[str]) -> Normalized:
    """`text` after `change`, cluster by cluster, with `keep` (contents of added tokens) untouched.

    A normalizer may change how characters are written - composed or decomposed, compatible forms, upper or lower case -
    and runs of bytes stay matched through that. Where it drops or replaces characters, the tokens stand for another
    text than the row's: those places are `losses`. A normalizer that looks beyond a cluster gives other bytes than
    `data`, so tokens are to be compared with it.
    """
    runs = Normalized()
    data: list[bytes] = []
    at = original = 0
    for part, kept in _parts(text, keep):
        for old, new in [(part, part)] if kept else _changes(part, change):
            if new != old and _skeleton(new) != _skeleton(old):
                runs.losses.append((at, f"the tokenizer writes {new!r:.40} for {old!r:.40}: text is lost"))
            data.append(new.encode())
            runs.starts.append(at)
            runs.originals.append(original)
            at, original = at + len(data[-1]), original + len(old.encode())
            runs.ends.append(at)
            runs.original_ends.append(original)
            runs.same.append(old == new)
    runs.data = b"".join(data)
    return runs


def _changes(text: str, change: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    """The text cut into runs that stay as they are and clusters that change, each with what it becomes."""
    for run in _cluster_pattern().findall(text):
        new = change(run)
        if new != run and run.isascii():
            yield from ((c, change(c)) for c in run)
            continue
        while new != run and len(run) > 1:  # the first character may have nothing to do with the others
            first, rest = change(run[0]), change(run[1:])
            if first + rest != new:
                break
            yield run[0], first
            run, new = run[1:], rest
        yield run, new


def _parts(text: str, keep: list[str]) -> Iterator[tuple[str, bool]]:
    """The text cut around the strings of `keep`, and whether a part is one of them."""
    if not keep:
        yield text, False
        return
    pattern = "(" + "|".join(map(re.escape, sorted(keep, key=len, reverse=True))) + ")"
    for i, part in enumerate(re.split(pattern, text)):
        if part:
            yield part, bool(i % 2)


def _skeleton(text: str) -> str:
    """What is left of a text when composition, compatible forms and case do not count."""
    return unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())


@functools.cache
def _cluster_pattern() -> re.Pattern:
    joiners = "".join(map(re.escape, sorted(_joiners())))
    # ASCII followed by a joiner belongs to that joiner's cluster
    return re.compile(rf"[\x00-\x7f]+(?![{joiners}])|[\s\S][{joiners}]*")


def _joiners() -> set[str]:
    """Characters that may combine with the one before: marks, and second halves of canonical compositions."""
    seconds, first_of = set(), {}
    for c in map(chr, range(0x80, 0x30000)):
        parts = unicodedata.decomposition(c).split()
        if not parts:
            continue
        if parts[0].startswith("<"):
            first_of[c] = chr(int(parts[1], 16))
        else:
            first_of[c] = chr(int(parts[0], 16))
            if len(parts) == 2:
                seconds.add(chr(int(parts[1], 16)))
    seconds.update(map(chr, (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))))  # Hangul vowels and finals
    joins = seconds | {c for c in map(chr, range(0x80, 0x30000)) if unicodedata.combining(c)}
    return joins | {c for c, first in first_of.items() if first in joins}
