"""Which tokens have a log-ratio, and which tokens form a block, whose log-ratios count together."""

from typing import NamedTuple

import torch
from torch import Tensor

from pear_kernels import checks
from pear_kernels.engine.packing import Pack

NO_RATIO = checks.NO_RATIO  # the block id of a token without a log-ratio


class Blocks(NamedTuple):
    """The blocks of one pack, in compact order. Each lies within one sequence, and the next begins where it stops."""

    stop: Tensor  # (n,) int64, one past the last token of each token's block
    before: Tensor  # (n + 1,) int64, number of tokens with a log-ratio before each token
    carries: Tensor | None = None  # (n,) bool, whether a token has a log-ratio; None: all have one

    def start(self) -> Tensor:
        """(n,) int64, the first token of each token's block."""
        return torch.searchsorted(self.stop, self.stop)

    def ratios(self, begin: Tensor, end: Tensor) -> Tensor:
        """Number of tokens with a log-ratio in each [begin, end), as float64."""
        return (self.before[end] - self.before[begin]).double()

    def where_carried(self, values: Tensor, begin: int = 0, end: int | None = None) -> Tensor:
        """`values` of tokens [begin, end), with 0 (or False) for tokens without a log-ratio."""
        return values if self.carries is None else values.masked_fill(~self.carries[begin:end], 0)


def by_size(pack: Pack, size: int) -> Blocks:
    """Blocks of `size` tokens; the last block of a sequence is shorter where `size` does not divide its length."""
    token = torch.arange(pack.tokens + 1, device=pack.start.device)
    stop = token[:-1] + size - (token[:-1] - pack.start) % size
    return Blocks(torch.minimum(stop, pack.stop), token)


def by_ids(pack: Pack, block_ids: Tensor) -> Blocks:
    """Blocks of equal `block_ids` (n,), which ascend within a sequence.

    A token without a log-ratio joins the block before it. Those before a sequence's first block form a block of their
    own, without any log-ratio.
    """
    key = checks.block_key(block_ids, pack.start).cummax(0).values  # ascends over the pack; equal within a block
    carries = block_ids > NO_RATIO
    before = torch.nn.functional.pad(carries.cumsum(0), (1, 0))
    return Blocks(torch.searchsorted(key, key, right=True), before, carries)
