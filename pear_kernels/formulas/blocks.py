"""Which tokens have a log-ratio, and where the blocks lie whose log-ratios count together."""

from typing import NamedTuple

import torch
from torch import Tensor

from pear_kernels import checks
from pear_kernels.engine.packing import Pack

NO_RATIO = checks.NO_RATIO  # the block id of a token without a log-ratio


class Blocks(NamedTuple):
    """The blocks of one pack, in compact order. A block lies in one sequence, and the next begins where it stops."""

    stop: Tensor  # (n,) int64, one past the last token of each token's block
    before: Tensor  # (n + 1,) int64, tokens with a log-ratio before each token
    carries: Tensor | None = None  # (n,) bool, whether a token has a log-ratio; None: all have

    def start(self) -> Tensor:
        """(n,) int64, the first token of each token's block."""
        return torch.searchsorted(self.stop, self.stop)

    def ratios(self, begin: Tensor, end: Tensor) -> Tensor:
        """Tokens with a log-ratio in each [begin, end), as float64."""
        return (self.before[end] - self.before[begin]).double()


def of_size(pack: Pack, size: int) -> Blocks:
    """Blocks of `size` tokens, the last one of a sequence being what is left."""
    token = torch.arange(pack.tokens + 1, device=pack.start.device)
    stop = token[:-1] + size - (token[:-1] - pack.start) % size
    return Blocks(torch.minimum(stop, pack.stop), token)


def of_ids(pack: Pack, block_ids: Tensor) -> Blocks:
    """Blocks of equal `block_ids` (n,), which ascend within a sequence.

    A token without a log-ratio joins the block before it; those before the first block are one without any ratio.
    """
    key = checks.block_key(block_ids, pack.start).cummax(0).values  # ascends over the pack; a block's tokens share one
    carries = block_ids > NO_RATIO
    before = torch.nn.functional.pad(carries.cumsum(0), (1, 0))
    return Blocks(torch.searchsorted(key, key, right=True), before, carries)
