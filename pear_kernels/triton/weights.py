"""PEAR weights as one small kernel a chunk: ratios, suffix sums, weights, coefficients, loss and statistics.

The formulas are those of `pear_kernels.weights` and `pear_kernels.objectives`, where they are explained; tests hold the
two together. One program walks a chunk's tokens from right to left, a block at a time. Within a block the sums of the
log-ratios are a segmented scan, which a sequence's last token starts anew; from block to block and from chunk to chunk
a sequence that goes on finds its sum so far in `suffix`. A NaN in one sequence stays there.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pear_kernels import objectives
from pear_kernels.backend import interpreting
from pear_kernels.packing import Pack
from pear_kernels.triton.launch import launch
from pear_kernels.weights import PEAROptions, tokens_a_block

BLOCK = 64 if interpreting() else 512  # tokens at a time
SUMS = 9


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
            within, _ = tl.associative_scan((clamp(ratio, low, high), starts), 0, add_within_sequence, reverse=True)
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
                first = tl.minimum(token + block_size - (token - its_start) % block_size, its_stop)
                log_g = tl.load(suffix + first, mask=live & (first < its_stop), other=0.0)
                log_g += (its_stop - first).to(tl.float64) * log_gamma
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


class PEARWeights:
    """The weights of one pack, made from its last token to its first: `pear_kernels.weights.PEARWeights` as kernels."""

    def __init__(self, behavior_logprobs: Tensor, pack: Pack, options: PEAROptions, token_scale: Tensor | None = None):
        n, device = pack.tokens, behavior_logprobs.device
        self.pack = pack
        self.options = options
        self.behavior_logprobs = behavior_logprobs.double().contiguous()
        self.logprobs = torch.zeros(n, dtype=torch.float64, device=device)
        self.suffix = torch.zeros(n + 1, dtype=torch.float64, device=device)
        self.token_scale = torch.ones_like(self.logprobs) if token_scale is None else token_scale.contiguous()
        self.log_g, self.g, self.scaled = (torch.empty_like(self.logprobs) for _ in range(3))
        self.sums = torch.zeros(SUMS, dtype=torch.float64, device=device)

    def observe(self, begin: int, end: int, logprobs: Tensor) -> None:
        """Take the log-probs (end - begin,) of these tokens. Token and block weights follow at once, and count."""
        self.logprobs[begin:end] = logprobs
        self._launch(begin, end, scan=True, weigh=self.options.level != "sequence")

    def log_weights(self, begin: int, end: int) -> Tensor:
        """(end - begin,) float64: log G before its clip, of tokens whose weights were asked for or made."""
        return self.log_g[begin:end]

    def weights(self, begin: int, end: int) -> Tensor:
        """(end - begin,) float64: G."""
        self._weigh_sequences(begin, end)
        return self.g[begin:end]

    def coefficients(self, begin: int, end: int) -> Tensor:
        """(end - begin,) float64: G times the token's scale."""
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

    def _launch(self, begin: int, end: int, *, scan: bool, weigh: bool, count: bool = True) -> None:
        level, _, gamma, log_ratio_clip, log_weight_clip = self.options
        launch(
            scan_and_weigh, (1 if end > begin else 0,),
            self.logprobs, self.behavior_logprobs, self.pack.start, self.pack.stop, self.token_scale, self.pack.counts,
            self.suffix, self.log_g, self.g, self.scaled, self.sums if count else None,
            begin, end, tokens_a_block(self.options, self.pack), math.log(gamma),
            *map(float, (*log_ratio_clip, *log_weight_clip)),
            SCAN=scan, WEIGH=weigh, SEQUENCE=level == "sequence", BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip


class PEARObjective(objectives.PEARObjective):
    """The same loss with weights, coefficients, loss and statistics from one kernel a chunk."""

    def __init__(self, behavior_logprobs, pack, options, reduction, denominator, sequence_scale):
        super().__init__(behavior_logprobs, pack, options, reduction, denominator, sequence_scale, self.make_weights)

    def make_weights(self, behavior_logprobs: Tensor, pack: Pack, options: PEAROptions) -> PEARWeights:
        return PEARWeights(behavior_logprobs, pack, options, self.token_scale)

    def coefficients(self, begin: int, end: int) -> Tensor:
        return self.walk.coefficients(begin, end)

    def sums(self, logprobs: Tensor, weights: Tensor) -> Tensor:
        return self.walk.count_all()
