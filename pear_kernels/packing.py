"""Which tokens count, where each stands in its response, and where the walk cuts them into chunks.

Everything after this file works on the *compact* order: the tokens that count (target is not `ignore_index`), sequence
after sequence, without prompt, padding or anything else that is ignored. That is why padding, prompts and the
neighbours in a pack cannot change a result, and why ignored tokens never reach a matrix product.
"""

from typing import NamedTuple

import torch
from torch import Tensor

ROW_MULTIPLE = 128  # chunks are a multiple of this many rows, which suits every matrix unit


class Pack(NamedTuple):
    """The n tokens that count, in order. `start[i] <= i < stop[i]` are the compact bounds of token i's sequence."""

    index: Tensor  # (n,) int64, where each token stands in the caller's flat (N,) tensors
    sequence: Tensor  # (n,) int64, which sequence it belongs to
    start: Tensor  # (n,) int64, compact index of the first token of its sequence
    stop: Tensor  # (n,) int64, one past the last token of its sequence
    lengths: Tensor  # (S,) int64, tokens that count in each sequence

    @property
    def tokens(self) -> int:
        return self.index.numel()


def pack_tokens(valid: Tensor, cu_seqlens: Tensor) -> Pack:
    """Compact order of the tokens with `valid` (N,) bool, in the sequences bounded by `cu_seqlens` (S+1,)."""
    index = valid.nonzero().squeeze(1)
    sequence = torch.searchsorted(cu_seqlens[1:].to(index.dtype), index, right=True)
    lengths = torch.bincount(sequence, minlength=cu_seqlens.numel() - 1)
    stops = lengths.cumsum(0)
    return Pack(index, sequence, (stops - lengths)[sequence], stops[sequence], lengths)


def unpack(compact: Tensor, pack: Pack, size: int) -> Tensor:
    """(n,) in compact order -> (size,) in the caller's order, 0 at the tokens that do not count."""
    return compact.new_zeros(size).index_copy_(0, pack.index, compact)


def chunk_rows(workspace_bytes: int, bytes_per_row: int) -> int:
    """Most rows a workspace of that many bytes holds: a multiple of 128 wherever 128 fit, and at least 1."""
    rows = max(1, workspace_bytes // bytes_per_row)
    return rows - rows % ROW_MULTIPLE if rows >= ROW_MULTIPLE else rows


def cut(begin: int, end: int, rows: int) -> list[tuple[int, int]]:
    """[begin, end) in chunks of at most `rows`, nearly equal, so that no product runs on a sliver at the tail."""
    if end == begin:
        return []
    pieces = -(-(end - begin) // rows)
    size = -(-(end - begin) // pieces)
    if size > ROW_MULTIPLE:
        size += -size % ROW_MULTIPLE
        size = min(size, rows)
    return [(left, min(left + size, end)) for left in range(begin, end, size)]


def cut_at_sequences(lengths: list[int], rows: int) -> tuple[list[tuple[int, int]], list[list[tuple[int, int]]]]:
    """For weights that need their whole sequence: chunks of whole sequences, and the sequences longer than a chunk.

    Returns `(whole, long)`: `whole` are chunks [begin, end) that end where sequences end; each entry of `long` is the
    list of chunks of one sequence of more than `rows` tokens.
    """
    whole: list[tuple[int, int]] = []
    long: list[list[tuple[int, int]]] = []
    begin = end = 0  # the open chunk
    for length in lengths:
        if end + length - begin > rows:
            if end > begin:
                whole.append((begin, end))
            begin = end
        end += length
        if length > rows:
            long.append(cut(begin, end, rows))
            begin = end
    if end > begin:
        whole.append((begin, end))
    return whole, long
