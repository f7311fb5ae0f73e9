"""PEAR weights on log-probs: the definition that everything else is tested against (arXiv 2602.01058, section 3).

With the T response tokens of one sequence, `delta_t = clip(log pi(y_t) - log pi_b(y_t), *log_ratio_clip)` and

    token      log G_t = (T - t)   log gamma + sum_{j > t}   delta_j
    block      log G_t = (T - e_k) log gamma + sum_{j > e_k} delta_j     e_k: the last position of t's block of B
    sequence   log G_t =                       sum_{j >= 1}  delta_j

The three are one formula: a sum over the tokens *from* some position on, and gamma to the power of their number. That
position is where the next block begins, or the sequence's first token; token level is block level with B = 1. `log G`
is then clipped to `log_weight_clip`.

Blocks may also be given as one id per token, as when the policy that generated the data has another tokenizer. A token
of id -1 has no log-ratio: it has no delta, does not count as a position, and gets the weight of its place. The other
options here are this package's, against weights that collapse. They are off by default, and each is one line below.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pear_kernels.engine.packing import Pack
from pear_kernels.formulas import blocks
from pear_kernels.options import PEAROptions

MAX_LOG_RATIO = 700.0  # its exp is finite in float64, so that an advantage of 0 times it is 0
TINY = torch.finfo(torch.float64).tiny


def capped_exp(log_ratio: Tensor) -> Tensor:
    """exp of a float64 log-ratio, finite in any case: log-ratios above `MAX_LOG_RATIO` count as that."""
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def compared(comparison: Callable[..., Tensor], values: Tensor, bound: Tensor | float) -> Tensor:
    """(n,) float64 0 and 1 by torch.lt, gt, le, ge, eq: what is to be summed takes no launch to be cast."""
    return comparison(values, bound, out=torch.empty_like(values))


class Terms(NamedTuple):
    """What statistics sum over tokens: (n,) each, or the sums. The Triton kernel adds in this order, then the loss."""

    nll: Tensor  # -log pi
    log_ratio: Tensor  # before its clip
    ratio_below: Tensor  # whether the log-ratio is below its clip
    ratio_above: Tensor  # ... above it
    weight: Tensor  # G
    on_floor: Tensor  # whether log G is at or below the lower end of log_weight_clip
    on_ceiling: Tensor  # ... at or above the upper end
    square: Tensor  # G^2


SUMS = len(Terms._fields) + 1  # the loss comes last


def tokens_a_block(options: PEAROptions, pack: Pack) -> int:
    """B: 1 at token level. A block longer than the pack is cut to the pack's length, which cannot overflow."""
    return 1 if options.level == "token" else min(options.block_size, pack.tokens + 1)


def suffix_sums(values: Tensor, stop: Tensor) -> Tensor:
    """(n,) sum of `values` (n,) over [i, stop[i]), for segments that end at `stop` (n,).

    It is a difference of two sums, in which -inf or NaN would spread to other segments: their positions are summed
    separately.
    """

    def sums(of: Tensor) -> Tensor:
        to_end = torch.zeros(len(of) + 1, dtype=values.dtype, device=values.device)
        to_end[:-1] = of.flip(0).cumsum(0, dtype=values.dtype).flip(0)
        return to_end[:-1] - to_end[stop]

    total = sums(values.where(values.isfinite(), 0.0))
    for spoilt, by in ((values == -torch.inf, -torch.inf), (~(values < torch.inf), torch.nan)):
        total = torch.where(sums(spoilt) > 0, by, total)
    return total


class PEARWeights:
    """The weights of one pack, computed from its last token to its first.

    At token and block level a weight depends on later tokens only, so a walk from right to left always has what it
    needs: `suffix[i]`, the sum of delta from token i to the end of its sequence, for every token already observed.
    (Where blocks are clipped, a block's sum is stored at its first token: weights need only the sums of later blocks.)
    All of it is float64, since a suffix may be a million tokens long.
    """

    def __init__(
        self,
        behavior_logprobs: Tensor,  # (n,)
        pack: Pack,
        options: PEAROptions,
        block_ids: Tensor | None = None,  # (n,), in place of options.block_size
        token_scale: Tensor | None = None,  # (n,), by which `coefficients` multiplies the weights; None: 1
    ):
        self.behavior_logprobs = behavior_logprobs.double()  # (n,)
        self.pack = pack
        self.options = options
        self.block_ids = block_ids
        self.token_scale = torch.ones_like(self.behavior_logprobs) if token_scale is None else token_scale
        zeros = torch.zeros(SUMS + 1 + pack.tokens + 1, dtype=torch.float64, device=behavior_logprobs.device)
        self.counted = zeros[:SUMS]  # `sums` so far, where a backend adds them up chunk by chunk
        # (n + 1,): the last entry stays 0, the sum after the last token. Aligned to 16 bytes, as Triton prefers
        self.suffix = zeros[SUMS + 1 :]
        # (n + 1,), likewise: the sum of log-ratios from a token to the end of its block
        self.inside = torch.zeros_like(self.suffix) if options.clip_blocks else None

    # ---- known before any log-prob

    @functools.cached_property
    def blocks(self) -> blocks.Blocks:
        if self.block_ids is not None:
            return blocks.by_ids(self.pack, self.block_ids)
        return blocks.by_size(self.pack, tokens_a_block(self.options, self.pack))

    @functools.cached_property
    def ratios(self) -> Tensor:
        """(n,) float64: T, the number of tokens with a log-ratio in each token's sequence; at least 1."""
        return self.blocks.ratios(self.pack.start, self.pack.stop).clamp(min=1)

    @functools.cached_property
    def clip_scale(self) -> Tensor | float:
        """(n,) or 1.0: min(1, clip_length / T), by which `log_ratio_clip` is multiplied."""
        return 1.0 if self.options.clip_length is None else (self.options.clip_length / self.ratios).clamp(max=1)

    @functools.cached_property
    def limits(self) -> Tensor:
        """(n,) float64: multiple of `log_ratio_clip` that bounds the sum stored at a token; 0 where none is stored."""
        limits = self.blocks.before.diff().double()  # 1 for a token with a log-ratio, else 0
        if self.options.clip_blocks:
            token = torch.arange(self.pack.tokens, device=self.suffix.device)
            limits = torch.where(self.blocks.start() == token, self.blocks.ratios(token, self.blocks.stop), 0.0)
        return limits if self.options.clip_length is None else limits * self.clip_scale

    @functools.cached_property
    def left(self) -> Tensor:
        """(n,) float64: number of tokens with a log-ratio from the next block to the end of the sequence."""
        return self.blocks.ratios(self.blocks.stop, self.pack.stop)

    # ---- the walk

    def observe(self, begin: int, end: int, logprobs: Tensor) -> None:
        """Take the log-probs (end - begin,) of these tokens. Later tokens of their sequences must come first."""
        low, high = self.options.log_ratio_clip
        value, limits = self.log_ratios(begin, end, logprobs), self.limits[begin:end]
        if self.inside is not None:
            value = self.add_from_right(self.inside, begin, end, value, self.blocks.stop)
        delta = torch.where(limits > 0, value.clamp(min=limits * low, max=limits * high), 0.0)
        self.add_from_right(self.suffix, begin, end, delta, self.pack.stop)

    def log_ratios(self, begin: int, end: int, logprobs: Tensor) -> Tensor:
        """(end - begin,) log pi - log pi_b; 0 for tokens without a log-ratio."""
        ratios = logprobs - self.behavior_logprobs[begin:end]
        return ratios if self.block_ids is None else self.blocks.where_carried(ratios, begin, end)

    @staticmethod
    def add_from_right(into: Tensor, begin: int, end: int, values: Tensor, stop: Tensor) -> Tensor:
        """into[i] = sum over [i, stop[i]) of the values, given for [begin, end); `into` has the sums right of `end`."""
        stop = stop[begin:end]
        # a NaN hidden state affects the tokens before it in its sequence, and no other sequence
        here = suffix_sums(values, stop.clamp(max=end) - begin)
        # a sequence that continues to the right of `end` has its sum from there on already
        into[begin:end] = here + torch.where(stop > end, into[end], 0.0)
        return into[begin:end]

    def summed(self, begin: int, end: int) -> Tensor:
        """(end - begin,) float64: log G without `center` and clip: discount and deltas from the next block on."""
        start, stop = self.pack.start[begin:end], self.pack.stop[begin:end]
        if self.options.level == "sequence":  # deltas of the whole sequence, without a discount
            return self.suffix[start]
        first = self.blocks.stop[begin:end]
        log_g = torch.where(first < stop, self.suffix[first], 0.0)
        return log_g + self.left[begin:end] * math.log(self.options.gamma)

    def log_weights(self, begin: int, end: int) -> Tensor:
        """(end - begin,) float64: log G before its clip."""
        log_g = self.summed(begin, end)
        if self.options.center:  # each delta less the mean over its sequence
            mean = self.suffix[self.pack.start[begin:end]] / self.ratios[begin:end]
            log_g = log_g - self.left[begin:end] * mean
        return log_g

    def clipped_weights(self, begin: int, end: int) -> Tensor:
        """(end - begin,) float64: G, before it is normalised."""
        return self.log_weights(begin, end).clamp(*self.options.log_weight_clip).exp()

    def weights(self, begin: int, end: int) -> Tensor:
        """(end - begin,) float64: G. (Only `rescale` knows the mean by which `normalize` "batch" divides.)"""
        weights = self.clipped_weights(begin, end)
        return weights / self.mean_weights()[begin:end] if self.options.normalize == "sequence" else weights

    def coefficients(self, begin: int, end: int) -> Tensor:
        """(end - begin,) float64: G times the token's scale."""
        return self.weights(begin, end) * self.token_scale[begin:end]

    def mean_weights(self) -> Tensor:
        """(n,) float64: mean G of each token's sequence, for sequences observed down to their first token."""
        pack = self.pack
        sums = pack.sequence_sums(self.clipped_weights(0, pack.tokens))  # (S,)
        means = (sums[pack.sequence] / (pack.stop - pack.start)).clamp(min=TINY)
        return means if pack.counts is None else means.masked_fill(~pack.counts, 1.0)  # a ghost belongs to no sequence

    def rescale(self) -> Tensor | None:
        """(): 1 / (mean weight), by which all weights are multiplied at the end of the walk; None for no rescaling."""
        if self.options.normalize != "batch":
            return None
        weights = self.pack.zero_ghosts(self.weights(0, self.pack.tokens).double())
        return self.pack.counted / weights.sum().clamp(min=TINY)

    # ---- coupled weights: the part known at once, and the factor known once the sequence is observed

    @property
    def factors(self) -> bool:
        """Whether a weight is a number known at once, times one of its sequence."""
        return self.options.normalize == "sequence" and self.options.separable

    def known_coefficients(self, begin: int, end: int) -> Tensor | None:
        """(end - begin,) float64; None for ones."""
        return self.clipped_weights(begin, end) if self.factors else None

    def pending_factor(self, begin: int, end: int) -> Tensor:
        """(end - begin,) float64: weights = known_coefficients * pending_factor."""
        return self.mean_weights()[begin:end].reciprocal() if self.factors else self.weights(begin, end)

    # ---- statistics

    def clipping(self, logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For all tokens (n,): the log-ratios, and which of them are below and above their clip.

        A token without a log-ratio counts as 0, inside the clip. Where blocks are clipped, a token counts with its
        block's mean.
        """
        ratios = self.log_ratios(0, self.pack.tokens, logprobs)
        low, high = (bound * self.clip_scale for bound in self.options.log_ratio_clip)
        if self.inside is not None:
            start, stop = self.blocks.start(), self.blocks.stop
            ratios = self.inside[start] / self.blocks.ratios(start, stop).clamp(min=1)
        below, above = compared(torch.lt, ratios, low), compared(torch.gt, ratios, high)
        if self.block_ids is None:
            return ratios, below, above
        carried = self.blocks.where_carried
        return ratios if self.inside is None else carried(ratios), carried(below), carried(above)

    def terms(self, logprobs: Tensor, weights: Tensor) -> Terms:
        """The terms of all tokens (n,), from their log-probs and weights (n,)."""
        log_ratio, below, above = self.clipping(logprobs)
        log_g = self.log_weights(0, self.pack.tokens)
        floor, ceiling = self.options.log_weight_clip
        on_floor, on_ceiling = compared(torch.le, log_g, floor), compared(torch.ge, log_g, ceiling)
        return Terms(-logprobs, log_ratio, below, above, weights, on_floor, on_ceiling, weights.square())

    def sums(self, logprobs: Tensor, weights: Tensor) -> Tensor:
        """(9,) over the tokens that count: of the `terms`, and of the loss."""
        terms = self.terms(logprobs, weights)
        return self.pack.sums((*terms, weights * self.token_scale * terms.nll))
