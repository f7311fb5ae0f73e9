"""All completion tokens of the rows looked at, in one place, and the weights that `pear_kernels` gives them."""

from typing import NamedTuple

import numpy as np
import torch

from pear_kernels import pear_weights
from pear_kernels.options import PEAROptions


class Tokens(NamedTuple):
    """N completion tokens of S rows, one row after the other."""

    logprobs: np.ndarray  # (N,) float64, the student's
    behavior_logprobs: np.ndarray  # (N,) float64; of a span of several tokens its total, at its first token
    starts: np.ndarray  # (S + 1,) int64: row s has the tokens starts[s] up to starts[s + 1]
    spans: np.ndarray | None = (
        None  # (N,) int32: what has one ratio, ascending in a row; -1: no ratio. None: each token
    )
    aligned: np.ndarray | None = None  # (S,) bool: rows of another tokenizer, whose spans are the blocks. None: no row

    def of_rows(self, chosen: np.ndarray) -> "Tokens":
        """Those of some rows: (S,) bool."""
        at = chosen[self.rows]
        starts = np.cumsum([0, *self.lengths[chosen]])
        spans = None if self.spans is None else self.spans[at]
        aligned = None if self.aligned is None else self.aligned[chosen]
        return Tokens(self.logprobs[at], self.behavior_logprobs[at], starts, spans, aligned)

    @property
    def lengths(self) -> np.ndarray:
        """(S,) completion tokens of each row."""
        return np.diff(self.starts)

    @property
    def rows(self) -> np.ndarray:
        """(N,) the row of each token."""
        return np.repeat(np.arange(len(self.starts) - 1), self.lengths)

    @property
    def following(self) -> np.ndarray:
        """(N,) how many tokens of its row come after each."""
        return np.repeat(self.starts[1:], self.lengths) - 1 - np.arange(len(self.logprobs))

    @property
    def has_ratio(self) -> np.ndarray:
        """(N,) bool."""
        return np.ones(len(self.logprobs), dtype=bool) if self.spans is None else self.spans >= 0


def log_ratios(tokens: Tokens, options: PEAROptions | None = None) -> np.ndarray:
    """(N,) log pi - log pi_b of each token, before any clip; of a span, its mean a token; NaN where there is none.

    With options that clip whole blocks, of a block its mean.
    """
    difference = tokens.logprobs - tokens.behavior_logprobs
    ids = tokens.spans
    if options is not None and options.clip_blocks and options.level == "block":
        ids = block_ids(tokens, options)
    if ids is None:
        return difference
    found = np.full(len(difference), np.nan)
    where = np.flatnonzero(ids >= 0)
    if not len(where):
        return found
    rows, ids = tokens.rows[where], ids[where]
    first = np.flatnonzero(np.diff(rows, prepend=-1) | np.diff(ids, prepend=-1))
    sizes = np.diff(first, append=len(where))
    found[where] = np.repeat(np.add.reduceat(difference[where], first) / sizes, sizes)
    return found


def block_ids(tokens: Tokens, options: PEAROptions) -> np.ndarray:
    """(N,) int32: the spans; at level block, in rows of the student's own tokens, block_size positions each."""
    spans = tokens.spans
    if spans is None:
        spans = np.arange(len(tokens.logprobs)) - tokens.starts[tokens.rows]
    if options.level == "block":
        own = np.ones(len(tokens.starts) - 1, dtype=bool) if tokens.aligned is None else ~tokens.aligned
        spans = np.where(own[tokens.rows] & (spans >= 0), spans // options.block_size, spans)
    return spans.astype(np.int32)


def weights(tokens: Tokens, options: PEAROptions) -> np.ndarray:
    """(N,) float64: the weights G under these options, as `pear sft` would have them before its first step.

    With `normalize="batch"` all rows here are the batch.
    """
    given = options.asdict()
    if tokens.spans is not None:
        given["block_ids"] = torch.from_numpy(block_ids(tokens, options))
        if options.level != "sequence":
            given["level"] = "block"
    found = pear_weights(
        torch.from_numpy(tokens.logprobs),
        torch.from_numpy(tokens.behavior_logprobs),
        cu_seqlens=torch.from_numpy(tokens.starts),
        **given,
    )
    return found.numpy()
