"""PEAR weights on log-probs: the definition that everything else is tested against (arXiv 2602.01058, section 3).

With the T response tokens of one sequence, `delta_t = clip(log pi(y_t) - log pi_b(y_t), *log_ratio_clip)` and

    token      log G_t = (T - t)   log gamma + sum_{j > t}   delta_j
    block      log G_t = (T - e_k) log gamma + sum_{j > e_k} delta_j     e_k: the last position of t's block of B
    sequence   log G_t =                       sum_{j >= 1}  delta_j

the three are one formula: a sum over the tokens *from* some position on, and gamma to their number. `summed_from` is
that position; `log G` is then clipped to `log_weight_clip`. Token level is block level with B = 1.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pear_kernels import checks
from pear_kernels.backend import check_backend, weights_class
from pear_kernels.packing import Pack, pack_tokens, unpack


class PEAROptions(NamedTuple):
    """How log-probs become weights. The defaults are the paper's."""

    level: str = "token"
    block_size: int = 4
    gamma: float = 0.999
    log_ratio_clip: tuple[float, float] = (-0.08, 0.3)
    log_weight_clip: tuple[float, float] = (-10.0, 5.0)


DEFAULTS = PEAROptions()
# log-ratios summed over whole sequences, as they are: what the ratios of GSPO and iw-SFT are made of
UNCLIPPED = PEAROptions(level="sequence", log_ratio_clip=(-torch.inf, torch.inf))
MAX_LOG_RATIO = 700.0  # whose exp is still a number in float64, so that an advantage of 0 times it is 0


def summed_from(begin: int, end: int, pack: Pack, options: PEAROptions) -> Tensor:
    """(end - begin,) int64: compact index of the first token whose ratio counts in each of these tokens' weights."""
    start, stop = pack.start[begin:end], pack.stop[begin:end]
    if options.level == "sequence":
        return start
    block_size = tokens_a_block(options, pack)
    token = torch.arange(begin, end, device=start.device)
    return torch.minimum(token + block_size - (token - start) % block_size, stop)


def tokens_a_block(options: PEAROptions, pack: Pack) -> int:
    """B: 1 at token level; a block longer than the pack is as good as one of its length, and cannot overflow."""
    return 1 if options.level == "token" else min(options.block_size, pack.tokens + 1)


def suffix_sums(values: Tensor, stop: Tensor) -> Tensor:
    """(n,) sum of `values` (n,) over [i, stop[i]), for segments that end at `stop` (n,)."""
    to_end = torch.zeros(len(values) + 1, dtype=values.dtype, device=values.device)
    to_end[:-1] = values.flip(0).cumsum(0).flip(0)
    return to_end[:-1] - to_end[stop]


class PEARWeights:
    """The weights of one pack, made from its last token to its first.

    A weight looks only at tokens after its own (at token and block level), so a walk from the right always has what it
    needs: `suffix[i]`, the sum of delta from token i to the end of its sequence, of every token already passed.
    All of it is float64, since a suffix may be a million tokens long.
    """

    def __init__(self, behavior_logprobs: Tensor, pack: Pack, options: PEAROptions):
        self.behavior_logprobs = behavior_logprobs.double()  # (n,)
        self.pack = pack
        self.options = options
        # (n + 1,): the last entry stays 0, the sum after the last token
        self.suffix = torch.zeros(pack.tokens + 1, dtype=torch.float64, device=behavior_logprobs.device)

    def observe(self, begin: int, end: int, logprobs: Tensor) -> None:
        """Take the log-probs (end - begin,) of these tokens; those right of them in their sequence came before."""
        low, high = self.options.log_ratio_clip
        delta = (logprobs - self.behavior_logprobs[begin:end]).clamp(low, high)
        stop = self.pack.stop[begin:end]
        here = suffix_sums(delta.nan_to_num(), stop.clamp(max=end) - begin)
        # hidden states that are NaN spoil the tokens before them in their sequence, and no other sequence
        here = torch.where(suffix_sums(delta.isnan().double(), stop.clamp(max=end) - begin) > 0, torch.nan, here)
        # a sequence that goes on to the right has its sum from there on already
        self.suffix[begin:end] = here + torch.where(stop > end, self.suffix[end], 0.0)

    def log_weights(self, begin: int, end: int) -> Tensor:
        """(end - begin,) float64: log G before its clip."""
        first = summed_from(begin, end, self.pack, self.options)
        stop = self.pack.stop[begin:end]
        log_g = torch.where(first < stop, self.suffix[first], 0.0)
        if self.options.level == "sequence":  # no discount at this level
            return log_g
        return log_g + (stop - first).double() * math.log(self.options.gamma)

    def weights(self, begin: int, end: int) -> Tensor:
        """(end - begin,) float64: G."""
        return self.log_weights(begin, end).clamp(*self.options.log_weight_clip).exp()


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
        backend: "triton", "torch" or None, as in `linear_pear_loss`.

    Returns:
        Weights of the shape and dtype of `logprobs`.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it should be.
    """
    checks.check_options(PEAROptions(level, block_size, gamma, log_ratio_clip, log_weight_clip))
    checks.check_weight_arguments(logprobs, behavior_logprobs, mask, cu_seqlens)
    check_backend(backend)
    if mask is None:
        mask = torch.ones_like(logprobs, dtype=torch.bool)
    bounds = checks.sequence_bounds(logprobs.shape, cu_seqlens, logprobs.device)
    flat = _pear_weights_op(
        logprobs.detach().reshape(-1),
        behavior_logprobs.detach().reshape(-1),
        mask.reshape(-1),
        bounds,
        level,
        block_size,
        gamma,
        [float(bound) for bound in (*log_ratio_clip, *log_weight_clip)],
        backend,
    )
    return flat.view(logprobs.shape)


@torch.library.custom_op("pear_kernels::pear_weights", mutates_args=())
def _pear_weights_op(
    logprobs: Tensor,  # (N,)
    behavior_logprobs: Tensor,  # (N,)
    mask: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S+1,)
    level: str,
    block_size: int,
    gamma: float,
    clips: list[float],  # of the log-ratio, low and high, and of the log-weight
    backend: str | None,
) -> Tensor:
    checks.check_cu_seqlens(cu_seqlens, logprobs.numel())
    checks.check_logprobs("behavior_logprobs", behavior_logprobs, mask)
    options = PEAROptions(level, block_size, gamma, tuple(clips[:2]), tuple(clips[2:]))
    pack = pack_tokens(mask, cu_seqlens)
    walk = weights_class(backend, logprobs.device, logprobs.dtype)(pack.take(behavior_logprobs), pack, options)
    walk.observe(0, pack.tokens, pack.take(logprobs))
    return unpack(walk.weights(0, pack.tokens), pack, logprobs.numel()).to(logprobs.dtype)


@_pear_weights_op.register_fake
def _(logprobs, *_):
    return logprobs.new_empty(logprobs.shape)
