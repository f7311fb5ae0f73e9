"""The spans that two tokenizations share, against a search over all ranges of bytes, and what becomes of marks."""

import itertools

import numpy as np
import pytest
from families import FAMILIES, family
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from unicode_text import texts

from pear.align import Spans, Unaligned, align, spans_of
from pear.align.spans import NO_BYTES
from pear.rows import tokenize_row


@st.composite
def cut_texts(draw, size: int = 14, marks: bool = True) -> Spans:
    """A tokenization of a text of `size` bytes: some of them left out, some tokens without bytes, some marks."""
    cuts = sorted(draw(st.sets(st.integers(0, size), min_size=2)))
    extents, named = [], {}
    for begin, end in itertools.pairwise(cuts):
        for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
            kind = draw(st.sampled_from(["end_of_turn", "think_open", "\n", "x", NO_BYTES + "e", NO_BYTES + "f"]))
            if marks or kind.startswith(NO_BYTES):
                named[len(extents)] = kind
                extents.append((begin, begin))
        if draw(st.integers(0, 9)):
            extents.append((begin, end))
    return Spans(extents, named)


def by_brute_force(student: Spans, behavior: Spans) -> list[tuple[int, int]]:
    """All ranges of bytes that both have tokens for, exactly, and that hold no smaller one."""

    def can(spans: Spans) -> set[tuple[int, int]]:
        full = [extent for extent in spans.extents if extent[0] < extent[1]]
        ranges = set()
        for i in range(len(full)):
            for j in range(i, len(full)):
                if all(a[1] == b[0] for a, b in itertools.pairwise(full[i : j + 1])):
                    ranges.add((full[i][0], full[j][1]))
        return ranges

    both = can(student) & can(behavior)
    return sorted(r for r in both if not any(r != s and r[0] <= s[0] and s[1] <= r[1] for s in both))


def check_alignment(student: Spans, behavior: Spans, logprobs: np.ndarray) -> None:
    found = align(student, behavior, logprobs)
    assert found.block_ids.shape == found.behavior_logprobs.shape == (len(student.extents),)
    np.testing.assert_allclose(found.behavior_logprobs.sum() + found.left_out, logprobs.sum(), atol=1e-9)
    ids = [i for i in found.block_ids.tolist() if i >= 0]
    assert ids == sorted(ids) and set(ids) == set(range(len(set(ids))))
    assert found.shared == np.mean(found.block_ids >= 0) if len(found.block_ids) else found.shared == 0

    ranges = by_brute_force(student, behavior)
    in_range: dict[tuple[int, int], list[int]] = {r: [] for r in ranges}
    for t, (begin, end) in enumerate(student.extents):
        if begin < end:
            home = [r for r in ranges if r[0] <= begin and end <= r[1]]
            assert (found.block_ids[t] >= 0) == bool(home)
            if home:
                in_range[home[0]].append(t)
    for (low, high), tokens in in_range.items():
        assert len({found.block_ids[t] for t in tokens}) == 1
        block = found.block_ids[tokens[0]]
        members = np.flatnonzero(found.block_ids == block)
        assert [t for t in members if student.extents[t][0] < student.extents[t][1]] == tokens
        theirs = [j for j, (b, e) in enumerate(behavior.extents) if b < e and low <= b and e <= high]
        if not any(mark.startswith(NO_BYTES) for mark in behavior.marks.values()):
            np.testing.assert_allclose(found.behavior_logprobs[members].sum(), logprobs[theirs].sum(), atol=1e-9)
        assert not found.behavior_logprobs[members[1:]].any()
    assert not found.behavior_logprobs[found.block_ids < 0].any()
    for t, mark in student.marks.items():  # without bytes: alone, where the other side has it, or with what comes next
        if mark.startswith(NO_BYTES) and found.block_ids[t] >= 0:
            members = np.flatnonzero(found.block_ids == found.block_ids[t])
            after = [u for u in members if student.extents[u][0] < student.extents[u][1] and u > t]
            assert len(members) == 1 or student.extents[after[0]][0] == student.extents[t][0]


@settings(max_examples=300)
@given(student=cut_texts(), behavior=cut_texts(), seed=st.integers(0, 99))
def test_spans_are_the_finest_that_both_have(student, behavior, seed):
    logprobs = -np.random.default_rng(seed).exponential(size=len(behavior.extents))
    check_alignment(student, behavior, logprobs)


@settings(max_examples=300)
@given(student=cut_texts(), behavior=cut_texts())
def test_either_side_may_be_the_student(student, behavior):
    """The spans of bytes, and how many marks match, do not depend on who is who."""
    one = align(student, behavior, [0.0] * len(behavior.extents))
    other = align(behavior, student, [0.0] * len(student.extents))
    assert one.block_ids.max(initial=-1) == other.block_ids.max(initial=-1)

    def spans(side: Spans, ids: np.ndarray) -> list[tuple[int, int]]:
        """Each block as the bytes from its first token's to its last one's."""
        blocks = [[side.extents[t] for t in np.flatnonzero(ids == k)] for k in range(ids.max(initial=-1) + 1)]
        return [(block[0][0], block[-1][1]) for block in blocks]

    assert spans(student, one.block_ids) == spans(behavior, other.block_ids)


@settings(max_examples=100)
@given(side=cut_texts())
def test_a_side_with_itself_leaves_nothing_out(side):
    found = align(side, side, np.arange(len(side.extents), dtype=float))
    assert found.block_ids.tolist() == list(range(len(side.extents)))
    assert found.behavior_logprobs.tolist() == list(range(len(side.extents)))


@pytest.mark.parametrize("pair", list(itertools.combinations(FAMILIES, 2)), ids="-".join)
@settings(max_examples=8)
@given(prompt=st.sampled_from(["Q:\n", "x ", ""]), completion=texts, seed=st.integers(0, 9))
def test_every_two_families(pair, prompt, completion, seed):
    row = {"prompt": prompt, "completion": completion}
    try:
        sides = [spans_of(row, tokenize_row(row, family(name), "row"), family(name)) for name in pair]
    except Unaligned:
        assume(False)
    for student, behavior in (sides, sides[::-1]):
        check_alignment(student, behavior, -np.random.default_rng(seed).exponential(size=len(behavior.extents)))


# ---------------------------------------------------------------------------------------------------------------------
# By hand


def test_a_picture():
    """docs/tokenizers.md has this one."""
    student = Spans([(0, 1), (1, 3), (3, 5), (5, 7), (7, 11), (11, 12), (12, 12)], {6: "end_of_turn"})
    behavior = Spans([(0, 3), (3, 7), (7, 9), (9, 11), (11, 12), (12, 12)], {5: "end_of_turn"})
    found = align(student, behavior, [-1.0, -2.0, -4.0, -8.0, -16.0, -32.0])
    assert found.block_ids.tolist() == [0, 0, 1, 1, 2, 3, 4]
    assert found.behavior_logprobs.tolist() == [-1, 0, -2, 0, -12, -16, -32]
    assert found.block_ids.dtype == np.int32
    assert (found.shared, found.left_out) == (1.0, 0.0)


def test_boundary_within_a_character_is_a_boundary():
    student, behavior = Spans([(0, 1), (1, 4)]), Spans([(0, 1), (1, 2), (2, 4)])
    assert align(student, behavior, [-1, -1, -1]).block_ids.tolist() == [0, 1]


def test_tokens_without_bytes_go_with_what_follows():
    """The half of a composed character goes with the token that ends it, on either side."""
    student, behavior = Spans([(0, 1), (1, 1), (1, 4)], {1: NO_BYTES + "\\xc3"}), Spans([(0, 1), (1, 2), (2, 4)])
    assert align(student, behavior, [-1, -2, -4]).behavior_logprobs.tolist() == [-1, -6, 0]
    assert align(student, behavior, [-1, -2, -4]).block_ids.tolist() == [0, 1, 1]
    assert align(behavior, student, [-1, -2, -4]).behavior_logprobs.tolist() == [-1, -6, 0]


def test_bytes_that_one_side_lacks_are_left_out():
    """The template of one side strips the text: 2 bytes at its front."""
    student, behavior = Spans([(0, 3), (3, 5), (5, 6)]), Spans([(2, 3), (3, 5), (5, 6)])
    found = align(student, behavior, [-1, -2, -4])
    assert found.block_ids.tolist() == [-1, 0, 1]
    assert found.behavior_logprobs.tolist() == [0, -2, -4]
    assert found.left_out == -1 and found.shared == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("ours", "theirs", "pairs"),
    [
        (["end_of_turn"], ["end_of_turn"], [(0, 0)]),
        (["end_of_turn", "\n"], ["end_of_turn"], [(0, 0)]),
        (["end_of_turn", "\n"], ["end_of_turn", "\n"], [(0, 0), (1, 1)]),
        (["\n", "end_of_turn"], ["end_of_turn", "\n"], [(1, 0)]),  # `\n` comes behind different things
        (["think_open", "\n"], ["<tag>", "\n", "think_open", "\n"], [(0, 2), (1, 3)]),
        (["{", '"a"', "}"], ["{", '"', 'a"', "}"], [(0, 0)]),  # `}` is not the same: what is before it differs
        (["a", "end_of_turn", "b"], ["a", "x", "end_of_turn", "b"], [(0, 0), (1, 2), (2, 3)]),
        (["x"], ["end_of_turn"], []),
    ],
)
def test_marks_at_one_place(ours, theirs, pairs):
    at = [(5, 5)]
    student, behavior = Spans(at * len(ours), dict(enumerate(ours))), Spans(at * len(theirs), dict(enumerate(theirs)))
    found = align(student, behavior, [-(2.0**j) for j in range(len(theirs))])
    assert {(i, -(2.0**j)) for i, j in pairs} == {
        (i, total) for i, total in enumerate(found.behavior_logprobs.tolist()) if total
    }
    assert [i for i, block in enumerate(found.block_ids) if block >= 0] == [i for i, _ in pairs]


def test_a_role_of_ones_own_matches_only_where_it_is_named():
    ours, theirs = Spans([(0, 0), (0, 0)], {0: "a", 1: "sep"}), Spans([(0, 0), (0, 0)], {0: "b", 1: "sep"})
    assert align(ours, theirs, [-1, -2]).block_ids.tolist() == [-1, -1]
    assert align(ours, theirs, [-1, -2], {"sep": ("|", "/")}).block_ids.tolist() == [-1, 0]


def test_one_log_prob_a_token():
    with pytest.raises(ValueError, match="2 tokens of the behaviour policy, but 1 log-probs"):
        align(Spans([(0, 1)]), Spans([(0, 1), (1, 2)]), [-1.0])
