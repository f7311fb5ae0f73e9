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
from typing import NamedTuple

import torch
from torch import Tensor

from pear_kernels import blocks, checks
from pear_kernels.backend import check_backend, weights_class
from pear_kernels.packing import Pack, pack_tokens, unpack
from pear_kernels.scalars import call, with_numbers


class PEAROptions(NamedTuple):
    """How log-probs become weights. The defaults are the paper's; what comes after `log_weight_clip` is ours."""

    level: str = "token"
    block_size: int = 4
    gamma: float = 0.999
    log_ratio_clip: tuple[float, float] = (-0.08, 0.3)
    log_weight_clip: tuple[float, float] = (-10.0, 5.0)
    clip_blocks: bool = False
    center: bool = False
    clip_length: int | None = None
    normalize: str | None = None

    @property
    def coupled(self) -> bool:
        """Whether a weight needs the whole sequence."""
        return self.level == "sequence" or self.center or self.normalize == "sequence"

    @property
    def separable(self) -> bool:
        """Whether what it then needs is one factor of the sequence, the rest being known at once."""
        return not self.center

    def arguments(self) -> tuple:
        """The options as a custom op takes them: its schema knows lists of floats."""
        clips = ([float(bound) for bound in clip] for clip in (self.log_ratio_clip, self.log_weight_clip))
        return *self[:3], *clips, *self[5:]

    @property
    def papers_own(self) -> bool:
        """Whether all that is ours is off."""
        return not (self.clip_blocks or self.center or self.clip_length or self.normalize)


DEFAULTS = PEAROptions()
# log-ratios summed over whole sequences, as they are: what the ratios of GSPO and iw-SFT are made of
UNCLIPPED = PEAROptions(level="sequence", log_ratio_clip=(-torch.inf, torch.inf))
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
    ):
        self.behavior_logprobs = behavior_logprobs.double()  # (n,)
        self.pack = pack
        self.options = options
        self.block_ids = block_ids
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

    def own(self, begin: int, end: int) -> Tensor | None:
        """(end - begin,) float64; None for ones."""
        known = self.options.normalize == "sequence" and self.options.separable
        return self.clipped_weights(begin, end) if known else None

    def factor(self, begin: int, end: int) -> Tensor:
        """(end - begin,) float64: weights = own * factor."""
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


def pear_weights(
    logprobs: Tensor,  # (N,) or (B, T)
    behavior_logprobs: Tensor,  # like logprobs
    mask: Tensor | None = None,  # like logprobs, bool
    *,
    cu_seqlens: Tensor | None = None,  # (S+1,)
    level: str = DEFAULTS.level,
    block_size: int = DEFAULTS.block_size,
    gamma: float = DEFAULTS.gamma,
    log_ratio_clip: tuple[float, float] = DEFAULTS.log_ratio_clip,
    log_weight_clip: tuple[float, float] = DEFAULTS.log_weight_clip,
    block_ids: Tensor | None = None,  # like logprobs
    clip_blocks: bool = DEFAULTS.clip_blocks,
    center: bool = DEFAULTS.center,
    clip_length: int | None = DEFAULTS.clip_length,
    normalize: str | None = DEFAULTS.normalize,
    backend: str | None = None,
) -> Tensor:
    """PEAR weights G (arXiv 2602.01058) from log-probs that a trainer already has. No gradient flows through G.

    Args:
        logprobs: (N,) a pack, or (B, T) one sequence a row; float32 or float64; log pi of each token under the model in
            training.
        behavior_logprobs: same shape; log pi_b of each token under the policy that wrote it.
        mask: same shape, bool; True at response tokens. Others carry no ratio and no position, and get weight 0. None
            means all of them count.
        cu_seqlens: (S+1,) int32 or int64, ascending from 0 to N: the sequences of a pack. None with (N,) means one
            sequence.
        level: "token", "block" or "sequence"; see the module's docstring for the three formulas.
        block_size: B, in response tokens, for level "block".
        gamma: discount per later token, in (0, 1]; not used at level "sequence".
        log_ratio_clip: (low, high) bounds of log pi - log pi_b of one token.
        log_weight_clip: (low, high) bounds of log G.
        block_ids: like logprobs, int32 or int64, in place of block_size at level "block" (at level "sequence" only
            their -1 matter, but for clip_blocks): the block of each response token, in [0, 2**31). Equal neighbours
            are one block; ids never descend within a sequence. -1: a token without a log-ratio, which carries no delta
            and no position, and has the weight of its place: the sum from the first block that starts after it. What
            behavior_logprobs hold there does not matter. In a sequence of -1 alone all weights are 1.
        clip_blocks: clip a block's summed log-ratio, to as many times log_ratio_clip as it has log-ratios, instead of
            each token's: for blocks whose log-prob is known as a whole alone, as those of another tokenizer. Blocks
            are those of block_ids, or block_size tokens; at level "token" it changes nothing. Ours.
        center: subtract from each delta its mean over the sequence (of clipped deltas; what comes of it is not clipped
            again). Not at level "sequence", where every weight would be 1. Ours.
        clip_length: in a sequence of T log-ratios, log_ratio_clip is scaled by min(1, clip_length / T), so that log G
            cannot move further than it can in one of clip_length. None: it is not. Ours.
        normalize: "sequence" or "batch": divide the weights by their mean over the response tokens of the sequence
            (not at level "sequence"), or of the call. None: neither. Ours.
        backend: "triton", "torch" or None, as in `linear_pear_loss`.

    Returns:
        Weights of the shape and dtype of `logprobs`.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it should be.
    """
    options = PEAROptions(
        level, block_size, gamma, log_ratio_clip, log_weight_clip, clip_blocks, center, clip_length, normalize
    )
    checks.check_options(options)
    checks.check_weight_arguments(logprobs, behavior_logprobs, mask, cu_seqlens)
    checks.check_block_ids_kind(logprobs, "logprobs' shape", block_ids, level)
    check_backend(backend)
    if mask is None:
        mask = torch.ones_like(logprobs, dtype=torch.bool)
    bounds = checks.sequence_bounds(logprobs.shape, cu_seqlens, logprobs.device)
    flat = call(
        _pear_weights_op,
        logprobs.detach().reshape(-1),
        behavior_logprobs.detach().reshape(-1),
        None if block_ids is None else block_ids.reshape(-1),
        mask.reshape(-1),
        bounds,
        *options.arguments(),
        backend,
    )
    return flat.view(logprobs.shape)


@torch.library.custom_op("pear_kernels::pear_weights", mutates_args=())
@with_numbers
def _pear_weights_op(
    logprobs: Tensor,  # (N,)
    behavior_logprobs: Tensor,  # (N,)
    block_ids: Tensor | None,  # (N,)
    mask: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S+1,)
    level: str,
    block_size: int,
    gamma: float,
    log_ratio_clip: list[float],
    log_weight_clip: list[float],
    clip_blocks: bool,
    center: bool,
    clip_length: int | None,
    normalize: str | None,
    backend: str | None,
) -> Tensor:
    options = PEAROptions(
        level, block_size, gamma, log_ratio_clip, log_weight_clip, clip_blocks, center, clip_length, normalize
    )
    checks.check_cu_seqlens(cu_seqlens, logprobs.numel())
    checks.check_logprobs("behavior_logprobs", behavior_logprobs, blocks.carrying(mask, block_ids))
    pack = pack_tokens(mask, cu_seqlens)
    ids = blocks.checked_ids(pack, block_ids)
    walk = weights_class(backend, logprobs.device, logprobs.dtype)(pack.take(behavior_logprobs), pack, options, ids)
    walk.observe(0, pack.tokens, pack.take(logprobs))
    weights, scale = walk.weights(0, pack.tokens), walk.rescale()
    weights = weights if scale is None else weights * scale
    return unpack(weights, pack, logprobs.numel()).to(logprobs.dtype)


@_pear_weights_op.register_fake
def _(logprobs, *_):
    return logprobs.new_empty(logprobs.shape)
