"""PEAR weights on log-probs: the definition that everything else is tested against (arXiv 2602.01058, section 3).

With the T response tokens of one sequence, `delta_t = clip(log pi(y_t) - log pi_b(y_t), *log_ratio_clip)` and

    token      log G_t = (T - t)   log gamma + sum_{j > t}   delta_j
    block      log G_t = (T - e_k) log gamma + sum_{j > e_k} delta_j     e_k: the last position of t's block of B
    sequence   log G_t =                       sum_{j >= 1}  delta_j

the three are one formula: a sum over the tokens *from* some position on, and gamma to their number. That position is
where the next block begins, or the sequence's first; token level is block level with B = 1. `log G` is then clipped to
`log_weight_clip`.

Blocks may be given instead, by an id for each token, as where the policy that wrote the data has another tokenizer. A
token of id -1 has no log-ratio: it has no delta and no position, and the weight of its place. What else is here are
options of ours against weights that collapse, off by default; each is one line below.
"""

import functools
import math

import torch
from torch import Tensor

from pear_kernels.engine.packing import Pack
from pear_kernels.formulas import blocks
from pear_kernels.options import PEAROptions

MAX_LOG_RATIO = 700.0  # whose exp is still a number in float64, so that an advantage of 0 times it is 0
TINY = torch.finfo(torch.float64).tiny


def tokens_a_block(options: PEAROptions, pack: Pack) -> int:
    """B: 1 at token level; a block longer than the pack is as good as one of its length, and cannot overflow."""
    return 1 if options.level == "token" else min(options.block_size, pack.tokens + 1)


def suffix_sums(values: Tensor, stop: Tensor) -> Tensor:
    """(n,) sum of `values` (n,) over [i, stop[i]), for segments that end at `stop` (n,).

    A difference of two sums, in which -inf or NaN would spoil other segments: where these are is counted apart.
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
    """The weights of one pack, made from its last token to its first.

    A weight looks only at tokens after its own (at token and block level), so a walk from the right always has what it
    needs: `suffix[i]`, the sum of delta from token i to the end of its sequence, of every token already passed. (Where
    blocks are clipped, a block's sum stands at its first token: the next block's are all that a weight looks at.)
    All of it is float64, since a suffix may be a million tokens long.
    """

    def __init__(
        self,
        behavior_logprobs: Tensor,  # (n,)
        pack: Pack,
        options: PEAROptions,
        block_ids: Tensor | None = None,  # (n,), in place of options.block_size
        token_scale: Tensor | None = None,  # (n,), what `coefficients` multiplies the weights by; None for 1
    ):
        self.behavior_logprobs = behavior_logprobs.double()  # (n,)
        self.pack = pack
        self.options = options
        self.block_ids = block_ids
        self.token_scale = torch.ones_like(self.behavior_logprobs) if token_scale is None else token_scale
        # (n + 1,): the last entry stays 0, the sum after the last token
        self.suffix = torch.zeros(pack.tokens + 1, dtype=torch.float64, device=behavior_logprobs.device)
        # likewise, of log-ratios from a token to the end of its block
        self.inside = torch.zeros_like(self.suffix) if options.clip_blocks else None

    # ---- what is known before any log-prob

    @functools.cached_property
    def blocks(self) -> blocks.Blocks:
        if self.block_ids is not None:
            return blocks.of_ids(self.pack, self.block_ids)
        return blocks.of_size(self.pack, tokens_a_block(self.options, self.pack))

    @functools.cached_property
    def ratios(self) -> Tensor:
        """(n,) float64: T, the tokens of each token's sequence that have a log-ratio; at least 1."""
        return self.blocks.ratios(self.pack.start, self.pack.stop).clamp(min=1)

    @functools.cached_property
    def clip_scale(self) -> Tensor | float:
        """(n,) or 1.0: what `log_ratio_clip` is multiplied by: min(1, clip_length / T)."""
        return 1.0 if self.options.clip_length is None else (self.options.clip_length / self.ratios).clamp(max=1)

    @functools.cached_property
    def limits(self) -> Tensor:
        """(n,) float64: how many times `log_ratio_clip` bounds what stands at a token; 0 where nothing stands."""
        token = torch.arange(self.pack.tokens, device=self.suffix.device)
        if self.options.clip_blocks:
            limits = torch.where(self.blocks.start() == token, self.blocks.ratios(token, self.blocks.stop), 0.0)
        else:
            limits = self.blocks.ratios(token, token + 1)
        return limits * self.clip_scale

    @functools.cached_property
    def left(self) -> Tensor:
        """(n,) float64: the tokens with a log-ratio from the next block to the end of the sequence."""
        return self.blocks.ratios(self.blocks.stop, self.pack.stop)

    # ---- the walk

    def observe(self, begin: int, end: int, logprobs: Tensor) -> None:
        """Take the log-probs (end - begin,) of these tokens; those right of them in their sequence came before."""
        low, high = self.options.log_ratio_clip
        value, limits = self.log_ratios(begin, end, logprobs), self.limits[begin:end]
        if self.options.clip_blocks:
            value = self.add_from_right(self.inside, begin, end, value, self.blocks.stop)
        delta = torch.where(limits > 0, value.clamp(min=limits * low, max=limits * high), 0.0)
        self.add_from_right(self.suffix, begin, end, delta, self.pack.stop)

    def log_ratios(self, begin: int, end: int, logprobs: Tensor) -> Tensor:
        """(end - begin,) log pi - log pi_b, and 0 for tokens without."""
        ratios = logprobs - self.behavior_logprobs[begin:end]
        return ratios if self.block_ids is None else torch.where(self.blocks.carries[begin:end], ratios, 0.0)

    @staticmethod
    def add_from_right(into: Tensor, begin: int, end: int, values: Tensor, stop: Tensor) -> Tensor:
        """into[i] = sum of the values (end - begin,) over [i, stop[i]), where `into` has what stands right of them."""
        stop = stop[begin:end]
        # hidden states that are NaN spoil the tokens before them in their sequence, and no other sequence
        here = suffix_sums(values, stop.clamp(max=end) - begin)
        # a sequence that goes on to the right has its sum from there on already
        into[begin:end] = here + torch.where(stop > end, into[end], 0.0)
        return into[begin:end]

    def summed(self, begin: int, end: int) -> Tensor:
        """(end - begin,) float64: gamma and the sum of delta, both from the next block on; or over the sequence."""
        start, stop = self.pack.start[begin:end], self.pack.stop[begin:end]
        if self.options.level == "sequence":  # no discount at this level
            return self.suffix[start]
        first = self.blocks.stop[begin:end]
        log_g = torch.where(first < stop, self.suffix[first], 0.0)
        return log_g + self.left[begin:end] * math.log(self.options.gamma)

    def log_weights(self, begin: int, end: int) -> Tensor:
        """(end - begin,) float64: log G before its clip."""
        log_g = self.summed(begin, end)
        if self.options.center:  # delta less its mean over the sequence
            mean = self.suffix[self.pack.start[begin:end]] / self.ratios[begin:end]
            log_g = log_g - self.left[begin:end] * mean
        return log_g

    def clipped_weights(self, begin: int, end: int) -> Tensor:
        """(end - begin,) float64: G, before it is normalised."""
        return self.log_weights(begin, end).clamp(*self.options.log_weight_clip).exp()

    def weights(self, begin: int, end: int) -> Tensor:
        """(end - begin,) float64: G. (What `normalize` "batch" divides by is known to `rescale` alone.)"""
        weights = self.clipped_weights(begin, end)
        return weights / self.mean_weights()[begin:end] if self.options.normalize == "sequence" else weights

    def coefficients(self, begin: int, end: int) -> Tensor:
        """(end - begin,) float64: G times the token's scale."""
        return self.weights(begin, end) * self.token_scale[begin:end]

    def mean_weights(self) -> Tensor:
        """(n,) float64: mean G of each token's sequence, of those that were observed to their first token."""
        pack, weights = self.pack, self.clipped_weights(0, self.pack.tokens)
        sums = torch.segment_reduce(weights, "sum", lengths=pack.lengths, unsafe=True, initial=0.0)  # (S,)
        means = (sums[pack.sequence] / (pack.stop - pack.start)).clamp(min=TINY)
        return means if pack.counts is None else means.masked_fill(~pack.counts, 1.0)  # a ghost is no sequence's token

    def rescale(self) -> Tensor | None:
        """(): what all weights are multiplied by at the end of the walk, one over their mean; None for nothing."""
        if self.options.normalize != "batch":
            return None
        weights = self.pack.zero_ghosts(self.weights(0, self.pack.tokens).double())
        return self.pack.counted / weights.sum().clamp(min=TINY)

    # ---- of weights that need their whole sequence: what is known at once, and what it is to be multiplied by

    def known_coefficients(self, begin: int, end: int) -> Tensor | None:
        """(end - begin,) float64; None for ones."""
        known = self.options.normalize == "sequence" and self.options.separable
        return self.clipped_weights(begin, end) if known else None

    def pending_factor(self, begin: int, end: int) -> Tensor:
        """(end - begin,) float64: weights = known_coefficients * pending_factor."""
        known = self.options.normalize == "sequence" and self.options.separable
        return self.mean_weights()[begin:end].reciprocal() if known else self.weights(begin, end)

    # ---- statistics

    def clipping(self, logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of all tokens (n,): the log-ratios, and which are below and above their clip.

        A token without one counts as 0, inside the clip; where blocks are clipped, a token has its block's mean.
        """
        ratios = self.log_ratios(0, self.pack.tokens, logprobs)
        low, high = (bound * self.clip_scale for bound in self.options.log_ratio_clip)
        if self.options.clip_blocks:
            start, stop = self.blocks.start(), self.blocks.stop
            ratios = self.inside[start] / self.blocks.ratios(start, stop).clamp(min=1)
        if self.block_ids is None:
            return ratios, ratios < low, ratios > high
        carries = self.blocks.carries
        return torch.where(carries, ratios, 0.0), carries & (ratios < low), carries & (ratios > high)

    def terms(self, logprobs: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """Of all log-probs and weights (n,): what `objectives.pear.statistics` takes the sums of, (n,) each."""
        log_ratio, below, above = self.clipping(logprobs)
        log_g = self.log_weights(0, self.pack.tokens)
        floor, ceiling = self.options.log_weight_clip
        return -logprobs, log_ratio, below, above, weights, log_g <= floor, log_g >= ceiling, weights.square()

    def sums(self, logprobs: Tensor, weights: Tensor) -> Tensor:
        """(9,) over the tokens that count: of the `terms`, and of the loss."""
        values = *self.terms(logprobs, weights), weights * self.token_scale * -logprobs
        return torch.stack([self.pack.zero_ghosts(value.double()).sum() for value in values])
