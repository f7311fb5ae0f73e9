"""PEAR weights as one small kernel a chunk: ratios, suffix sums, weights, coefficients, loss and statistics.

The formulas are those of `pear_kernels.weights` and `pear_kernels.objectives`, where they are explained; tests hold the
two together. One program walks a chunk's tokens from right to left, a block at a time. Within a block the sums of the
log-ratios are a segmented scan, which a sequence's last token starts anew; from block to block and from chunk to chunk
a sequence that goes on finds its sum so far in `suffix`. A NaN in one sequence stays there. Where blocks of response
tokens are clipped as a whole, a scan of the same kind within those comes first.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pear_kernels import objectives, weights
from pear_kernels.backend import interpreting
from pear_kernels.packing import Pack
from pear_kernels.triton.launch import launch
from pear_kernels.weights import PEAROptions, tokens_a_block

BLOCK = 64 if interpreting() else 512  # tokens at a time
SUMS = 9
NO_BLOCKS = (None,) * 5  # what the kernel takes of blocks and options where there are none, or all is summed already


@triton.jit
def add_within_sequence(right, right_starts, left, left_starts):
    """Scan from right to left over (value, whether the token is its sequence's last)."""
    return tl.where(left_starts != 0, left, right + left), right_starts | left_starts


@triton.jit
def clamp(u, low, high):
    """NaN stays NaN."""
    u = tl.where(u < low, low, u)
    return tl.where(u > high, high, u)


@triton.jit(do_not_specialize=["begin", "end", "block_size"], do_not_specialize_on_alignment=["behavior_logprobs"])
def scan_and_weigh(
    logprobs,  # (n,) float64
    behavior_logprobs,  # (n,) float64
    start,  # (n,) int64, compact index of the first token of each token's sequence
    stop,  # (n,) int64, one past the last
    token_scale,  # (n,) float64
    counts,  # (n,) bool, False at a static pack's ghosts; None where there are none
    suffix,  # (n + 1,) float64: sum of the clipped log-ratios from a token to its sequence's end; the last stays 0
    log_weights,  # (n,) float64 out, log G before its clip
    weights,  # (n,) float64 out, G
    coefficients,  # (n,) float64 out, G * token_scale
    sums,  # (9,) float64, added to; None where tokens are not to be counted
    # the rest is None but with block_ids or an option of ours
    limits,  # (n,) float64, how many times (low, high) bounds what stands at a token, 0 where nothing does
    block_stop,  # (n,) int64, one past the last token of each token's block
    ratios_left,  # (n,) float64, log-ratios from there to the sequence's end
    carries,  # (n,) bool, whether a token has a log-ratio; None where blocks are not clipped
    inside,  # (n + 1,) float64: sum of the log-ratios from a token to its block's end; the last stays 0
    begin: tl.int64,
    end: tl.int64,
    block_size: tl.int64,
    log_gamma: tl.float64,
    low: tl.float64,  # clip of the log-ratio
    high: tl.float64,
    floor: tl.float64,  # clip of log G
    ceiling: tl.float64,
    SCAN: tl.constexpr,  # make `suffix` of [begin, end)
    WEIGH: tl.constexpr,  # make the weights of [begin, end), whose suffix sums are there
    SEQUENCE: tl.constexpr,  # the level is "sequence"
    BLOCK: tl.constexpr,
):
    if SCAN:
        for right in range(end, begin, -BLOCK):
            token = right - BLOCK + tl.arange(0, BLOCK)
            live = token >= begin
            ratio = tl.load(logprobs + token, mask=live, other=0.0)
            ratio -= tl.load(behavior_logprobs + token, mask=live, other=0.0)
            its_stop = tl.load(stop + token, mask=live, other=0)
            starts = (its_stop == token + 1).to(tl.int32)
            if inside is not None:
                ratio = tl.where(tl.load(carries + token, mask=live, other=0) != 0, ratio, 0.0)
                block_ends = tl.load(block_stop + token, mask=live, other=0)
                lasts = (block_ends == token + 1).to(tl.int32)
                within, _ = tl.associative_scan((ratio, lasts), 0, add_within_sequence, reverse=True)
                tl.debug_barrier()
                ratio = within + tl.where(block_ends > right, tl.load(inside + right), 0.0)
                tl.store(inside + token, ratio, mask=live)
            if limits is None:
                delta = clamp(ratio, low, high)
            else:
                limit = tl.load(limits + token, mask=live, other=0.0)
                delta = tl.where(limit > 0, clamp(ratio, limit * low, limit * high), 0.0)
            within, _ = tl.associative_scan((delta, starts), 0, add_within_sequence, reverse=True)
            # what was stored for the block to the right was stored by other threads of this program
            tl.debug_barrier()
            beyond = tl.load(suffix + right)
            tl.store(suffix + token, within + tl.where(its_stop > right, beyond, 0.0), mask=live)
        tl.debug_barrier()
    if WEIGH:
        nll = tl.zeros((BLOCK,), tl.float64)
        log_ratio = tl.zeros((BLOCK,), tl.float64)
        below = tl.zeros((BLOCK,), tl.int32)
        above = tl.zeros((BLOCK,), tl.int32)
        weight = tl.zeros((BLOCK,), tl.float64)
        square = tl.zeros((BLOCK,), tl.float64)
        on_floor = tl.zeros((BLOCK,), tl.int32)
        on_ceiling = tl.zeros((BLOCK,), tl.int32)
        loss = tl.zeros((BLOCK,), tl.float64)
        for left in range(begin, end, BLOCK):
            token = left + tl.arange(0, BLOCK)
            live = token < end
            its_stop = tl.load(stop + token, mask=live, other=0)
            its_start = tl.load(start + token, mask=live, other=0)
            if SEQUENCE:
                log_g = tl.load(suffix + its_start, mask=live, other=0.0)
            else:
                if block_stop is None:
                    first = tl.minimum(token + block_size - (token - its_start) % block_size, its_stop)
                    later = (its_stop - first).to(tl.float64)
                else:
                    first = tl.load(block_stop + token, mask=live, other=0)
                    later = tl.load(ratios_left + token, mask=live, other=0.0)
                log_g = tl.load(suffix + first, mask=live & (first < its_stop), other=0.0)
                log_g += later * log_gamma
            G = tl.exp(clamp(log_g, floor, ceiling))
            scale = tl.load(token_scale + token, mask=live, other=0.0)
            tl.store(log_weights + token, log_g, mask=live)
            tl.store(weights + token, G, mask=live)
            tl.store(coefficients + token, G * scale, mask=live)
            if sums is not None:  # in the order of pear_kernels.objectives.PEARObjective.sums
                if counts is not None:
                    live = live & (tl.load(counts + token, mask=live, other=0) != 0)
                log_p = tl.load(logprobs + token, mask=live, other=0.0)
                ratio = log_p - tl.load(behavior_logprobs + token, mask=live, other=0.0)
                nll -= log_p
                log_ratio += ratio
                below += (live & (ratio < low)).to(tl.int32)
                above += (live & (ratio > high)).to(tl.int32)
                weight += tl.where(live, G, 0.0)
                square += tl.where(live, G * G, 0.0)
                on_floor += (live & (log_g <= floor)).to(tl.int32)
                on_ceiling += (live & (log_g >= ceiling)).to(tl.int32)
                loss -= tl.where(live, G * scale * log_p, 0.0)
        if sums is not None:
            tl.store(sums + 0, tl.load(sums + 0) + tl.sum(nll, 0))
            tl.store(sums + 1, tl.load(sums + 1) + tl.sum(log_ratio, 0))
            tl.store(sums + 2, tl.load(sums + 2) + tl.sum(below, 0))
            tl.store(sums + 3, tl.load(sums + 3) + tl.sum(above, 0))
            tl.store(sums + 4, tl.load(sums + 4) + tl.sum(weight, 0))
            tl.store(sums + 5, tl.load(sums + 5) + tl.sum(on_floor, 0))
            tl.store(sums + 6, tl.load(sums + 6) + tl.sum(on_ceiling, 0))
            tl.store(sums + 7, tl.load(sums + 7) + tl.sum(square, 0))
            tl.store(sums + 8, tl.load(sums + 8) + tl.sum(loss, 0))


class PEARWeights(weights.PEARWeights):
    """The same by kernels: the walk always, and the weights where they do not wait for their whole sequence.

    What `center` and `normalize` do comes after, from the formulas of `pear_kernels.weights`.
    """

    def __init__(
        self,
        behavior_logprobs: Tensor,  # (n,)
        pack: Pack,
        options: PEAROptions,
        block_ids: Tensor | None = None,  # (n,)
        token_scale: Tensor | None = None,  # (n,)
    ):
        super().__init__(behavior_logprobs.contiguous(), pack, options, block_ids)
        self.plain = block_ids is None and options.papers_own
        self.waits = options.center or options.normalize == "sequence"  # for what the kernel does not do
        self.logprobs = torch.zeros_like(self.behavior_logprobs)
        self.token_scale = torch.ones_like(self.logprobs) if token_scale is None else token_scale.contiguous()
        # zeros where tokens that were not seen yet are among those that are added up
        made = torch.zeros_like if self.waits else torch.empty_like
        self.log_g, self.g, self.scaled = (made(self.logprobs) for _ in range(3))
        self.sums = torch.zeros(SUMS, dtype=torch.float64, device=self.logprobs.device) if self.plain else None

    def observe(self, begin: int, end: int, logprobs: Tensor) -> None:
        """Take the log-probs (end - begin,) of these tokens. Token and block weights follow at once, and count."""
        self.logprobs[begin:end] = logprobs
        self._launch(begin, end, scan=True, weigh=self.options.level != "sequence" and not self.options.center)

    def summed(self, begin: int, end: int) -> Tensor:
        """(end - begin,) float64: log G before its clip, of tokens whose weights were asked for or made."""
        return super().summed(begin, end) if self.options.center else self.log_g[begin:end]

    def clipped_weights(self, begin: int, end: int) -> Tensor:
        if self.options.center:
            return super().clipped_weights(begin, end)
        self._weigh_sequences(begin, end)
        return self.g[begin:end]

    def coefficients(self, begin: int, end: int) -> Tensor:
        """(end - begin,) float64: G times the token's scale."""
        if self.waits:
            return self.weights(begin, end) * self.token_scale[begin:end]
        self._weigh_sequences(begin, end)
        return self.scaled[begin:end]

    def count_all(self) -> Tensor:
        """(9,) `sums` over all tokens, at the end of the walk; at sequence level it is now that weights are counted."""
        if self.options.level == "sequence":
            self.sums.zero_()
            self._launch(0, self.pack.tokens, scan=False, weigh=True)
        return self.sums

    def _weigh_sequences(self, begin: int, end: int) -> None:
        if self.options.level == "sequence":
            self._launch(begin, end, scan=False, weigh=True, count=False)

    @functools.cached_property
    def _of_blocks(self) -> tuple[Tensor | None, ...]:
        """What the kernel takes of blocks and options: limits, block_stop, ratios_left, carries, inside."""
        if self.plain:
            return NO_BLOCKS
        stop, _, carries = self.blocks
        if self.inside is None:
            carries = None
        elif carries is None:
            carries = torch.ones_like(stop, dtype=torch.bool)
        return self.limits, stop, self.left, carries, self.inside

    def _launch(self, begin: int, end: int, *, scan: bool, weigh: bool, count: bool = True) -> None:
        level, _, gamma, log_ratio_clip, log_weight_clip, *_ = self.options
        sums = self.sums if count else None
        counts = None if sums is None else self.pack.counts
        launch(
            scan_and_weigh, (1 if end > begin else 0,),
            self.logprobs, self.behavior_logprobs, self.pack.start, self.pack.stop, self.token_scale, counts,
            self.suffix, self.log_g, self.g, self.scaled, sums, *(self._of_blocks if scan else NO_BLOCKS),
            begin, end, tokens_a_block(self.options, self.pack), math.log(gamma),
            *map(float, (*log_ratio_clip, *log_weight_clip)),
            SCAN=scan, WEIGH=weigh, SEQUENCE=level == "sequence" or not weigh, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip


class PEARObjective(objectives.PEARObjective):
    """The same loss with weights and coefficients, and of the paper's own options loss and statistics, by a kernel."""

    def __init__(self, behavior_logprobs, pack, options, reduction, denominator, sequence_scale, block_ids=None):
        arguments = behavior_logprobs, pack, options, reduction, denominator, sequence_scale
        super().__init__(*arguments, self.make_weights, block_ids)

    def make_weights(
        self, behavior_logprobs: Tensor, pack: Pack, options: PEAROptions, block_ids: Tensor | None
    ) -> PEARWeights:
        return PEARWeights(behavior_logprobs, pack, options, block_ids, self.token_scale)

    def coefficients(self, begin: int, end: int) -> Tensor:
        return self.walk.coefficients(begin, end)

    def sums(self, logprobs: Tensor, weights: Tensor) -> Tensor:
        return self.walk.count_all() if self.walk.plain else super().sums(logprobs, weights)
