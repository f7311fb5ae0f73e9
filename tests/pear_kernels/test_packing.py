"""The compact order and the cuts."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pear_kernels.engine.packing import chunk_rows, cut, cut_at_sequences, pack_tokens, unpack


@given(st.lists(st.lists(st.booleans(), max_size=9), min_size=1, max_size=7))
def test_pack_says_what_a_loop_says(sequences):
    valid = torch.tensor([v for s in sequences for v in s], dtype=torch.bool)
    bounds = torch.tensor([0, *map(len, sequences)]).cumsum(0)
    pack = pack_tokens(valid, bounds)
    expected, flat, compact = [], 0, 0
    for s, tokens in enumerate(sequences):
        start = compact
        for v in tokens:
            if v:
                expected.append((flat, s, start, start + sum(tokens)))
                compact += 1
            flat += 1
    found = zip(*(t.tolist() for t in (pack.index, pack.sequence, pack.start, pack.stop)), strict=True)
    assert list(found) == expected
    assert pack.lengths.tolist() == [sum(s) for s in sequences]
    values = torch.arange(1.0, pack.tokens + 1)
    assert torch.equal(unpack(values, pack, len(valid))[valid], values)
    assert not unpack(values, pack, len(valid))[~valid].any()


@given(st.lists(st.lists(st.booleans(), max_size=9), min_size=1, max_size=7))
def test_a_static_pack_is_the_usual_one_and_ghosts(sequences):
    valid = torch.tensor([v for s in sequences for v in s], dtype=torch.bool)
    bounds = torch.tensor([0, *map(len, sequences)], dtype=torch.int32).cumsum(0)
    usual, pack = pack_tokens(valid, bounds), pack_tokens(valid, bounds, static=True)
    n = usual.tokens
    assert pack.tokens == len(valid) and pack.counted == usual.counted == n
    for name in ("index", "sequence", "start", "stop"):
        assert torch.equal(getattr(pack, name)[:n], getattr(usual, name))
    assert torch.equal(pack.lengths, usual.lengths)
    ghosts = torch.arange(n, len(valid))
    assert torch.equal(pack.index[n:], (~valid).nonzero().squeeze(1))
    assert torch.equal(pack.start[n:], ghosts) and torch.equal(pack.stop[n:], ghosts + 1)
    # what is taken for ghosts is 0, in rows and in numbers, and none of it comes back
    rows = torch.randn(len(valid), 3).masked_fill(~valid[:, None], torch.nan)
    assert torch.equal(pack.take(rows)[:n], usual.take(rows)) and not pack.take(rows)[n:].any()
    assert torch.equal(pack.take(rows, 1, 4), pack.take(rows)[1:4])
    values = torch.arange(1.0, len(valid) + 1)
    assert torch.equal(unpack(values, pack, len(valid)), unpack(values[:n], usual, len(valid)))


@given(st.integers(0, 5000), st.integers(1, 2000))
def test_cuts_cover_once_and_have_no_sliver(n, rows):
    chunks = cut(0, n, rows)
    assert [i for begin, end in chunks for i in (begin, end)][1:-1] == [e for _, e in chunks[:-1] for _ in range(2)]
    assert not chunks or (chunks[0][0], chunks[-1][1]) == (0, n)
    sizes = [end - begin for begin, end in chunks]
    assert all(0 < size <= rows for size in sizes)
    assert len(sizes) == -(-n // rows)  # never more chunks than needed
    if sizes and rows % 128 == 0:
        assert sizes[-1] >= max(sizes) - 128 * len(sizes)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 25))
def test_cuts_at_sequences_keep_sequences_whole(lengths, rows):
    whole, long = cut_at_sequences(lengths, rows)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    edges = {*starts, sum(lengths)}
    assert all(begin in edges and end in edges and end - begin <= rows for begin, end in whole)
    assert [(c[0][0], c[-1][1]) for c in long] == [(s, s + n) for s, n in zip(starts, lengths, strict=True) if n > rows]
    covered = sorted([*whole, *(chunk for chunks in long for chunk in chunks)])
    assert [i for begin, end in covered for i in range(begin, end)] == list(range(sum(lengths)))


def test_rows_are_a_multiple_of_128_where_128_fit():
    assert chunk_rows(1000, 1) == 896
    assert chunk_rows(128, 1) == 128
    assert chunk_rows(127, 1) == 127
    assert chunk_rows(3, 10) == 1  # a budget below one row still gets one
