"""Two tokenizations of one text to the finest spans that they share."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pear.align.roles import ROLES, Roles
from pear.align.spans import NO_BYTES, Spans


class Alignment(NamedTuple):
    """For each of the C completion tokens of the student, its span and the behaviour policy's log-prob of that span."""

    block_ids: np.ndarray  # (C,) int32; spans are numbered from 0 in order, -1: in no span, so without a ratio
    behavior_logprobs: np.ndarray  # (C,) float64; a span's total at its first token, 0 elsewhere
    shared: float  # share of the student's tokens that are in a span
    left_out: float  # the behaviour policy's log-prob of the tokens that are in no span


def align(student: Spans, behavior: Spans, logprobs: Sequence[float], roles: Roles = ROLES) -> Alignment:
    """The spans of a student's tokens whose bytes the behaviour policy's tokens make as well, and their log-probs.

    A span ends wherever both tokenizations have a boundary, and exists where both cover all of its bytes. A structural
    token is a span of its own where the other side has one of the same role or, behind what was matched before it, of
    the same surface, at the same place. No log-prob is lost: `behavior_logprobs.sum() + left_out` is the total.

    Args:
        student, behavior: the tokens of both in the same text
        logprobs: (C',) the behaviour policy's, one for each of its tokens
        roles: the names among the marks that are roles; those that `spans_of` had

    Raises:
        ValueError: not one log-prob for each of the behaviour policy's tokens.
    """
    if len(logprobs) != len(behavior.extents):
        raise ValueError(f"{len(behavior.extents)} tokens of the behaviour policy, but {len(logprobs)} log-probs")
    logprobs = np.asarray(logprobs, dtype=np.float64).reshape(-1)
    pairs = _match_marks(student, behavior, roles)
    ours, theirs = _Side(student, {i for i, _ in pairs}), _Side(behavior, {j for _, j in pairs})

    cuts = np.intersect1d(ours.boundaries, theirs.boundaries)  # ascending
    shared = (ours.covered(cuts) == np.diff(cuts)) & (theirs.covered(cuts) == np.diff(cuts))
    sums = np.zeros(len(cuts))
    span_of_theirs = theirs.spans(cuts, shared)
    np.add.at(sums, span_of_theirs[span_of_theirs >= 0], logprobs[span_of_theirs >= 0])

    keys = ours.spans(cuts, shared)  # (C,) a number for each span; marks get numbers above
    mark_of = {i: j for i, j in pairs}
    for i in mark_of:
        keys[i] = len(cuts) + i
    block_ids = np.full(len(keys), -1, dtype=np.int32)
    totals = np.zeros(len(keys))
    last, count = -1, -1
    for i in np.flatnonzero(keys >= 0):
        key = keys[i]
        if key != last:
            count, last = count + 1, key
            totals[i] = logprobs[mark_of[i]] if i in mark_of else sums[key]
        block_ids[i] = count
    counted = span_of_theirs >= 0
    counted[[j for _, j in pairs]] = True
    share = float(np.mean(block_ids >= 0)) if len(block_ids) else 0.0
    return Alignment(block_ids, totals, share, float(logprobs[~counted].sum()))


class _Side:
    """The tokens of text of one side. A token without bytes of its own goes with the next one that has some."""

    def __init__(self, spans: Spans, matched: set[int]):
        extents = np.array(spans.extents, dtype=np.int64).reshape(-1, 2)
        self.begin, self.end = extents[:, 0], extents[:, 1]
        full = self.end > self.begin
        self.holder = np.full(len(extents), -1)  # (C,) which token's bytes it goes with
        self.holder[full] = np.flatnonzero(full)
        for i in range(len(extents) - 1, -1, -1):
            if not full[i] and i not in matched and spans.marks.get(i, NO_BYTES).startswith(NO_BYTES):
                after = self.holder[i + 1] if i + 1 < len(extents) else -1
                if after >= 0 and self.begin[after] == self.begin[i]:
                    self.holder[i] = after
        self.starts, self.stops = self.begin[full], self.end[full]
        self.boundaries = np.union1d(self.starts, self.stops)
        self.sizes = np.concatenate([[0], np.cumsum(self.stops - self.starts)])

    def covered(self, cuts: np.ndarray) -> np.ndarray:
        """Bytes that the tokens have between neighbouring cuts, all of which are boundaries of this side."""
        return np.diff(self.sizes[np.searchsorted(self.starts, cuts)])

    def spans(self, cuts: np.ndarray, shared: np.ndarray) -> np.ndarray:
        """(C,) the number of the span that each token is in, -1 for none."""
        found = np.full(len(self.holder), -1, dtype=np.int64)
        held = self.holder >= 0
        at = np.searchsorted(cuts, self.begin[self.holder[held]], side="right") - 1
        inside = (at >= 0) & (at < len(shared))
        inside[inside] = shared[at[inside]]
        found[held] = np.where(inside, at, -1)
        return found


def _match_marks(student: Spans, behavior: Spans, roles: Roles) -> list[tuple[int, int]]:
    """Pairs of marked tokens, ascending on both sides: see `align`."""
    ours, theirs = _by_place(student), _by_place(behavior)
    pairs: list[tuple[int, int]] = []
    for place in sorted(ours.keys() & theirs.keys()):
        pairs.extend(_match_one_place(ours[place], theirs[place], roles))
    return pairs


def _by_place(spans: Spans) -> dict[int, list[tuple[int, str]]]:
    places: dict[int, list[tuple[int, str]]] = {}
    for i in sorted(spans.marks):
        places.setdefault(spans.extents[i][0], []).append((i, spans.marks[i]))
    return places


def _match_one_place(ours: list[tuple[int, str]], theirs: list[tuple[int, str]], roles: Roles) -> list[tuple[int, int]]:
    """Marks that stand between the same two bytes on both sides.

    From the last match on, marks match while they are the same; where they part, the next match is of two that play one
    role, the nearest such pair. So a surface matches where nothing but matches came before it, or since a role's.
    """
    pairs = []
    i = j = 0
    while True:
        while i < len(ours) and j < len(theirs) and ours[i][1] == theirs[j][1]:
            pairs.append((ours[i][0], theirs[j][0]))
            i, j = i + 1, j + 1
        first = {}  # where each role comes next on the other side
        for k in range(len(theirs) - 1, j - 1, -1):
            if theirs[k][1] in roles:
                first[theirs[k][1]] = k
        near = [(k + first[role], role, k) for k, (_, role) in enumerate(ours[i:], i) if role in first]
        if not near:
            return pairs
        total, _, i = min(near)
        j = total - i
