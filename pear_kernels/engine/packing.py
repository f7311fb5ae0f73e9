"""Which tokens count, where each stands in its sequence, and where the walk cuts them into chunks.

Everything after this file works on the *compact* order: the tokens that count (target is not `ignore_index`), sequence
after sequence, without prompt, padding or anything else that is ignored. Therefore padding, prompts and neighbours in a
pack cannot change a result, and ignored tokens never reach a matrix product.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

ROW_MULTIPLE = 128  # chunks are a multiple of this many rows, which suits every matrix unit


class Pack:
    """The tokens that count, in compact order: sequence after sequence, without prompt, padding or ignored tokens.

    A *static* pack has as many rows as the caller has tokens, whatever their values, so that no host sync is needed to
    make it or to walk it. The ignored tokens follow those that count, as ghosts. A ghost is a sequence of its own;
    whatever is taken for it, or unpacked from it, is 0, and so is its coefficient.

    What depends on the sequences is made when it is first asked for: some losses never do.
    """

    def __init__(self, index: Tensor, size: int, cu_seqlens: Tensor | None = None, counts: Tensor | None = None):
        self.index = index  # (n,) int64, place in the caller's flat (N,) tensors
        self.size = size  # N
        self.cu_seqlens = cu_seqlens  # (S+1,), the caller's; None: all tokens are one sequence
        self.counts = counts  # (n,) bool, False at ghosts; None where there are none: the pack is not static

    @functools.cached_property
    def bounds(self) -> Tensor:
        """(S+1,) int64, the sequences' bounds in the caller's order."""
        if self.cu_seqlens is None:
            return torch.arange(2, device=self.index.device) * self.size
        return self.cu_seqlens.long()

    @functools.cached_property
    def sequence(self) -> Tensor:
        """(n,) int64, which sequence a token belongs to."""
        return torch.searchsorted(self.bounds[1:], self.index, right=True)

    @functools.cached_property
    def edges(self) -> Tensor:
        """(S+1,) int64, the sequences' bounds in compact order; no ghost is in any."""
        # `index` ascends, so no prefix sum over all N tokens is needed
        index = self.index if self.counts is None else self.index.masked_fill(~self.counts, self.size)
        return torch.searchsorted(index, self.bounds)

    @functools.cached_property
    def start(self) -> Tensor:
        """(n,) int64, compact index of the first token of its sequence: start[i] <= i < stop[i]."""
        return self._or_own(self.edges[self.sequence], 0)

    @functools.cached_property
    def stop(self) -> Tensor:
        """(n,) int64, one past the last token of its sequence."""
        return self._or_own(self.edges[1:][self.sequence], 1)

    def _or_own(self, place: Tensor, beyond: int) -> Tensor:
        """`place` (n,), and for a ghost its own plus `beyond`."""
        if self.counts is None:
            return place
        return torch.where(self.counts, place, torch.arange(self.tokens, device=place.device) + beyond)

    @functools.cached_property
    def lengths(self) -> Tensor:
        """(S,) int64, tokens that count in each sequence."""
        return self.edges.diff()

    @property
    def tokens(self) -> int:
        """n, the rows of the pack, ghosts included."""
        return self.index.numel()

    @property
    def counted(self) -> int | Tensor:
        """How many tokens count; in a static pack () int64, which only the device knows."""
        return self.tokens if self.counts is None else self.counts.sum()

    def take(self, values: Tensor, begin: int = 0, end: int | None = None) -> Tensor:
        """Rows [begin, end) in compact order of the caller's `values` (N, ...); a view where that is their order."""
        if self.counts is not None:
            counts = self.counts[begin:end].view(-1, *[1] * (values.dim() - 1))
            return values[self.index[begin:end]].masked_fill_(~counts, 0)  # not a product: a ghost may hold NaN
        return values[begin:end] if self.tokens == len(values) else values[self.index[begin:end]]

    def zero_ghosts(self, compact: Tensor, begin: int = 0, end: int | None = None) -> Tensor:
        """`compact` (end - begin,), values of these rows, with 0 for ghosts."""
        return compact if self.counts is None else compact.masked_fill(~self.counts[begin:end], 0)

    def sums(self, values: Sequence[Tensor], among: Tensor | None = None) -> Tensor:
        """(k,) float64: the sum of each of k `values` (n,) over the tokens that count, or over `among` (n,) bool."""
        stacked = torch.stack([value.double() for value in values])
        among = self.counts if among is None else among
        return (stacked if among is None else torch.where(among, stacked, 0.0)).sum(1)

    def sequence_sums(self, values: Tensor) -> Tensor:
        """(S,) the sum of `values` (n,) over the tokens that count of each sequence, in an order that repeats."""
        return torch.segment_reduce(values, "sum", lengths=self.lengths, unsafe=True, initial=0.0)


def pack_tokens(
    valid: Tensor, cu_seqlens: Tensor | None, static: bool | None = None, tokens: int | None = None
) -> Pack:
    """Compact order of the tokens with `valid` (N,) bool, in the sequences bounded by `cu_seqlens` (S+1,), or in one.

    Listing the tokens that count takes one host sync for their number, and saves the products of the ignored ones; with
    that number given as `tokens` there is no sync. A `static` pack needs none and drops nothing; None: static while a
    CUDA graph is captured, where a sync is an error.
    """
    size = valid.numel()
    if not (capturing() if static is None else static):
        index = (valid.nonzero() if tokens is None else valid.nonzero_static(size=tokens)).squeeze(1)
        return Pack(index, size, cu_seqlens)
    before = valid.cumsum(0)  # (N,): tokens that count up to each
    token = torch.arange(size, device=valid.device)
    counted = before[-1:]
    place = torch.where(valid, before - 1, counted + token - before)  # ghosts follow the last that counts
    return Pack(torch.empty_like(token).scatter_(0, place, token), size, cu_seqlens, token < counted)


def capturing() -> bool:
    """Whether the current CUDA stream records a graph, where a host sync is an error."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def unpack(compact: Tensor, pack: Pack, size: int, dtype: torch.dtype | None = None) -> Tensor:
    """(n,) in compact order to a new (size,) in the caller's order and `dtype`, 0 at ignored tokens."""
    dtype = dtype or compact.dtype
    if pack.counts is None and pack.tokens == size:
        return compact.to(dtype, copy=True)
    compact = pack.zero_ghosts(compact).to(dtype)
    return compact.new_zeros(size).index_copy_(0, pack.index, compact)


def with_chunk(whole: Tensor, begin: int, end: int, chunk: Tensor) -> Tensor:
    """`whole` (n,) with `chunk` in [begin, end). A chunk of all rows replaces it, which saves a copy."""
    if chunk.shape == whole.shape and chunk.dtype == whole.dtype and chunk.is_contiguous():
        return chunk
    whole[begin:end] = chunk
    return whole


def chunk_rows(workspace_bytes: int, bytes_per_row: int) -> int:
    """Most rows that a workspace holds: a multiple of 128 if it holds 128 rows or more, and at least 1."""
    rows = max(1, workspace_bytes // bytes_per_row)
    return rows - rows % ROW_MULTIPLE if rows >= ROW_MULTIPLE else rows


def cut(begin: int, end: int, rows: int) -> list[tuple[int, int]]:
    """[begin, end) in chunks of at most `rows`, nearly equal, so that no product runs on a few rows at the end."""
    if end == begin:
        return []
    pieces = -(-(end - begin) // rows)
    size = -(-(end - begin) // pieces)
    if size > ROW_MULTIPLE:
        size += -size % ROW_MULTIPLE
        size = min(size, rows)
    return [(left, min(left + size, end)) for left in range(begin, end, size)]


def cut_at_sequences(
    lengths: Sequence[int], rows: int, coupled: Sequence[bool] | None = None
) -> tuple[list[tuple[int, int]], list[list[tuple[int, int]]]]:
    """For a coupled loss: chunks of whole sequences, and the sequences longer than a chunk.

    Returns `(whole, long)`: `whole` are chunks [begin, end) that end where sequences end; each entry of `long` is the
    list of chunks of one sequence of more than `rows` tokens. The chunks of a long sequence that is not coupled (by
    `coupled`, one flag per sequence; None: all are) are in `whole`.
    """
    whole: list[tuple[int, int]] = []
    long: list[list[tuple[int, int]]] = []
    begin = end = 0  # the open chunk
    for i, length in enumerate(lengths):
        if end + length - begin > rows:
            if end > begin:
                whole.append((begin, end))
            begin = end
        end += length
        if length > rows:
            if coupled is None or coupled[i]:
                long.append(cut(begin, end, rows))
            else:
                whole += cut(begin, end, rows)
            begin = end
    if end > begin:
        whole.append((begin, end))
    return whole, long
