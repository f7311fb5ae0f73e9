"""PEAR weights in one small kernel per chunk: log-ratios, suffix sums, weights, coefficients, loss and statistics.

`formulas.pear_weights` explains the formulas; tests compare the two. One program processes a chunk's tokens from right
to left, `BLOCK` tokens at a time. Within a block, the sums of log-ratios are a segmented scan, restarted at each
sequence's last token. A sequence that continues in the block or chunk to the right finds its sum there in `suffix`. A
NaN stays in its sequence. If blocks of response tokens are clipped as a whole, a scan of the same kind within those
blocks comes first.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pear_kernels.backends.choice import interpreting
from pear_kernels.backends.triton.formulas import clamp
from pear_kernels.backends.triton.launch import launch
from pear_kernels.engine.packing import Pack, with_chunk
from pear_kernels.formulas import pear_weights
from pear_kernels.formulas.pear_weights import tokens_a_block
from pear_kernels.options import PEAROptions

BLOCK = 64 if interpreting() else 512  # tokens at a time
NO_BLOCKS = (None,) * 5  # the kernel's arguments from `limits` to `inside`, where it does not need them


@triton.jit
def add_within_sequence(right, right_starts, left, left_starts):
    """The step of a scan from right to left over (value, whether the token is its sequence's last)."""
    return tl.where(left_starts != 0, left, right + left), right_starts | left_starts


@triton.jit(do_not_specialize=["begin", "end", "block_size"], do_not_specialize_on_alignment=["behavior_logprobs"])
def scan_and_weigh(
    logprobs,  # (n,) float64
    behavior_logprobs,  # (n,) float64
    start,  # (n,) int64, compact index of the first token of each token's sequence
    stop,  # (n,) int64, one past the last
    token_scale,  # (n,) float64
    counts,  # (n,) bool, False at a static pack's ghosts; None if the pack is not static
    suffix,  # (n + 1,) float64: sum of clipped log-ratios from a token to its sequence's end; the last is 0
    log_weights,  # (n,) float64 out, log G before its clip
    weights,  # (n,) float64 out, G
    coefficients,  # (n,) float64 out, G * token_scale
    sums,  # (9,) float64, accumulated; None: no statistics
    # the next five are None unless block_ids or an option beyond the paper is given
    limits,  # (n,) float64: (low, high) times this bounds the log-ratio at a token; 0 where there is none
    block_stop,  # (n,) int64, one past the last token of each token's block
    ratios_left,  # (n,) float64, number of log-ratios from block_stop to the sequence's end
    carries,  # (n,) bool, whether a token has a log-ratio; None unless blocks are clipped
    inside,  # (n + 1,) float64: sum of log-ratios from a token to its block's end; the last is 0
    begin: tl.int64,
    end: tl.int64,
    block_size: tl.int64,
    log_gamma: tl.float64,
    low: tl.float64,  # clip of the log-ratio
    high: tl.float64,
    floor: tl.float64,  # clip of log G
    ceiling: tl.float64,
    SCAN: tl.constexpr,  # compute `suffix` of [begin, end)
    WEIGH: tl.constexpr,  # compute the weights of [begin, end) from `suffix`
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
            tl.debug_barrier()  # other threads of this program stored the sums of the block to the right
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
            if sums is not None:  # in the order of formulas.pear_weights.Terms
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


class PEARWeights(pear_weights.PEARWeights):
    """The same by the kernel: suffix sums always, and weights unless `center` or `normalize` changes them.

    Those two options are applied afterwards, by the formulas of `pear_kernels.formulas.pear_weights`.
    """

    def __init__(
        self,
        behavior_logprobs: Tensor,  # (n,)
        pack: Pack,
        options: PEAROptions,
        block_ids: Tensor | None = None,  # (n,)
        token_scale: Tensor | None = None,  # (n,)
    ):
        super().__init__(behavior_logprobs.contiguous(), pack, options, block_ids, token_scale)
        self.plain = block_ids is None and options.is_paper
        self.by_torch = options.center or options.normalize == "sequence"  # which the kernel does not compute
        self.logprobs = torch.empty_like(self.behavior_logprobs)
        self.token_scale = self.token_scale.contiguous()
        # with center or per-sequence normalisation, sums run over all tokens, including ones not observed yet
        made = torch.zeros_like if self.by_torch else torch.empty_like
        self.log_g, self.g, self.scaled = (made(self.logprobs) for _ in range(3))
        self.weighed: tuple[int, int] | None = None  # at sequence level: whose weights the last launch made

    def observe(self, begin: int, end: int, logprobs: Tensor) -> None:
        """Take the log-probs (end - begin,) of these tokens. Computes and counts token and block weights at once."""
        self.logprobs = with_chunk(self.logprobs, begin, end, logprobs)
        self.weighed = None
        self._launch(begin, end, scan=True, weigh=self.options.level != "sequence" and not self.options.center)

    def summed(self, begin: int, end: int) -> Tensor:
        """(end - begin,) float64: log G before its clip."""
        if self.options.center:
            return super().summed(begin, end)
        self._weigh_sequences(begin, end)
        return self.log_g[begin:end]

    def clipped_weights(self, begin: int, end: int) -> Tensor:
        if self.options.center:
            return super().clipped_weights(begin, end)
        self._weigh_sequences(begin, end)
        return self.g[begin:end]

    def coefficients(self, begin: int, end: int) -> Tensor:
        """(end - begin,) float64: G times the token's scale."""
        if self.by_torch:
            return self.weights(begin, end) * self.token_scale[begin:end]
        self._weigh_sequences(begin, end)
        return self.scaled[begin:end]

    def sums(self, logprobs: Tensor, weights: Tensor) -> Tensor:
        """As in the base class, by the kernel if no option prevents it; sequence weights are counted only now."""
        if not self.plain:
            return super().sums(logprobs, weights)
        if self.options.level == "sequence":
            self.counted.zero_()
            self._launch(0, self.pack.tokens, scan=False, weigh=True)
        return self.counted

    def _weigh_sequences(self, begin: int, end: int) -> None:
        if self.options.level == "sequence" and self.weighed != (begin, end):
            self._launch(begin, end, scan=False, weigh=True, count=False)
            self.weighed = begin, end

    @functools.cached_property
    def _of_blocks(self) -> tuple[Tensor | None, ...]:
        """The kernel's arguments for blocks and options: limits, block_stop, ratios_left, carries, inside."""
        if self.plain:
            return NO_BLOCKS
        stop, _, carries = self.blocks
        if self.inside is None:
            carries = None
        elif carries is None:
            carries = torch.ones_like(stop, dtype=torch.bool)
        return self.limits, stop, self.left, carries, self.inside

    def _launch(self, begin: int, end: int, *, scan: bool, weigh: bool, count: bool = True) -> None:
        options = self.options
        sums = self.counted if count and self.plain else None
        counts = None if sums is None else self.pack.counts
        launch(
            scan_and_weigh, (1 if end > begin else 0,),
            self.logprobs, self.behavior_logprobs, self.pack.start, self.pack.stop, self.token_scale, counts,
            self.suffix, self.log_g, self.g, self.scaled, sums, *(self._of_blocks if scan else NO_BLOCKS),
            begin, end, tokens_a_block(self.options, self.pack), math.log(options.gamma),
            *map(float, (*options.log_ratio_clip, *options.log_weight_clip)),
            SCAN=scan, WEIGH=weigh, SEQUENCE=options.level == "sequence" or not weigh, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
