"""Weightings of SFT that are PEAR's neighbours, as the engine sees them: from log-probs to a loss and a coefficient.

A weighting is a function of (n,) float64 tensors, `(Tokens, options) -> (L, c)` with `c_t = dL_t / d(-log p_t)`. For
most of them L is `w * -log p` with a detached w, and c is w. `WeightedObjective` is what all of them share with weights
that are given, or made by a function of the caller's.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pear_kernels.engine import Objective
from pear_kernels.objectives import at_least_one, effective_sample_size
from pear_kernels.packing import Pack
from pear_kernels.weights import MAX_LOG_RATIO, UNCLIPPED, PEARWeights

WEIGHTED_STATS = (
    "nll",  # unweighted mean of -log pi
    "ref_log_ratio_mean",  # mean of log pi - log pi_ref; 0 without ref_logprobs
    "weight_mean",  # mean of w
    "weight_max",
    "weight_zero",  # share of tokens with a weight of 0
    "effective_sample_size",  # (sum w)^2 / (n sum w^2), the share of tokens that carry the gradient
    "tokens",  # n, the tokens that count
)


class WeightingOptions(NamedTuple):
    """Constants of the named weightings; `linear_weighted_loss` says what each is. The defaults are their papers'."""

    iw_tau: float = 1.0
    iw_max: float = 16.0
    psft_clip: float = 0.28
    asft_kl: float = 0.1
    idft_clip: tuple[float, float] = (0.1, 2.0)


WEIGHTING_DEFAULTS = WeightingOptions()
MIN_MISSED = 1e-30  # least probability of "another token" to divide by, so that float32 holds what comes of it


class Tokens(NamedTuple):
    """What a weighting may look at, of n tokens: (n,) float64, without gradients."""

    logprobs: Tensor
    entropy: Tensor | None  # in nats, where the weighting asks for it
    log_ratio: Tensor | None  # log pi - log pi_ref: a token's, or the mean of its sequence's
    index: Tensor  # (n,) int64, where the tokens stand in the caller's flat tensors


# ---- one formula each


def none(tokens: Tokens, options: WeightingOptions) -> tuple[Tensor, Tensor]:
    """1: plain SFT."""
    return -tokens.logprobs, torch.ones_like(tokens.logprobs)


def dft(tokens: Tokens, options: WeightingOptions) -> tuple[Tensor, Tensor]:
    """p: DFT (arXiv 2508.05629, equation 9)."""
    p = tokens.logprobs.exp()
    return p * -tokens.logprobs, p


def iw_sft(tokens: Tokens, options: WeightingOptions) -> tuple[Tensor, Tensor]:
    """clip(exp(tau mean(log pi - log pi_ref)), 0, iw_max), the mean being a sequence's: iw-SFT (arXiv 2507.12856)."""
    w = (options.iw_tau * tokens.log_ratio).clamp(max=MAX_LOG_RATIO).exp().clamp(max=options.iw_max)
    return w * -tokens.logprobs, w


def psft(tokens: Tokens, options: WeightingOptions) -> tuple[Tensor, Tensor]:
    """r 1[r <= 1 + psft_clip], r = pi / pi_ref: PSFT (arXiv 2508.17784), PPO's clip with an advantage of 1."""
    r = tokens.log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    w = torch.where(r > 1 + options.psft_clip, 0.0, r)  # NaN stays NaN
    return w * -tokens.logprobs, w


def asft(tokens: Tokens, options: WeightingOptions) -> tuple[Tensor, Tensor]:
    """p, and asft_kl times the KL from the initial model: ASFT (arXiv 2509.23753).

    Its authors sum KL(pi_ref, pi) over the vocabulary. From one log-prob a token, what can be had exactly is that KL
    for the outcomes "this token" and "another one": a lower bound of it, whose gradient in the target's logit is the
    same, p - p_ref. (1 - p counts for at least `MIN_MISSED` in the coefficient, which then stays finite.)
    """
    log_p, log_q = tokens.logprobs, tokens.logprobs - tokens.log_ratio
    p, missed, missed_ref = log_p.exp(), -torch.expm1(log_p), -torch.expm1(log_q.clamp(max=0.0))
    tiny = torch.finfo(torch.float64).tiny
    other = torch.xlogy(missed_ref, missed_ref) - torch.xlogy(missed_ref, missed.clamp(min=tiny))
    kl = log_q.exp() * (log_q - log_p) + other
    slope = 1 - missed_ref / missed.clamp(min=MIN_MISSED)  # (q - p) / (1 - p)
    return p * -log_p + options.asft_kl * kl, p + options.asft_kl * slope


def idft(tokens: Tokens, options: WeightingOptions) -> tuple[Tensor, Tensor]:
    """p^a with a = clip(exp(-(log p + H)), idft_clip), H the entropy: IDFT (arXiv 2602.12222)."""
    a = (-(tokens.logprobs + tokens.entropy)).clamp(max=MAX_LOG_RATIO).exp().clamp(*options.idft_clip)
    w = (a * tokens.logprobs).exp()
    return w * -tokens.logprobs, w


Formula = Callable[[Tokens, WeightingOptions], tuple[Tensor, Tensor]]


class Weighting(NamedTuple):
    formula: Formula
    needs_ref: bool = False  # ref_logprobs
    needs_entropy: bool = False
    of_sequences: bool = False  # the log-ratio is the mean of a sequence's


WEIGHTINGS = {
    "none": Weighting(none),
    "dft": Weighting(dft),
    "iw-sft": Weighting(iw_sft, needs_ref=True, of_sequences=True),
    "psft": Weighting(psft, needs_ref=True),
    "asft": Weighting(asft, needs_ref=True),
    "idft": Weighting(idft, needs_entropy=True),
}


def by(weights: Callable[[Tokens], Tensor]) -> Weighting:
    """w = weights(tokens), whatever they hold."""

    def formula(tokens: Tokens, options: WeightingOptions) -> tuple[Tensor, Tensor]:
        w = weights(tokens)
        return w * -tokens.logprobs, w

    return Weighting(formula)


# ---- the whole loss


class WeightedObjective(Objective):
    """L = sum_t L_t * scale_t, L_t and its coefficient by a weighting's formula."""

    def __init__(
        self,
        pack: Pack,
        weighting: Weighting,
        scale: Tensor,  # (n,) float64, from `token_scale`
        ref_logprobs: Tensor | None = None,  # (n,)
        options: WeightingOptions = WEIGHTING_DEFAULTS,
        weights: Callable[..., PEARWeights] = PEARWeights,  # the backend's, for sums over sequences
    ):
        self.pack = pack
        self.weighting = weighting
        self.token_scale = scale
        self.ref_logprobs = None if ref_logprobs is None else ref_logprobs.double()
        self.options = options
        self.coupled = weighting.of_sequences
        self.logprobs, self.losses, self.weights = (
            torch.zeros(pack.tokens, dtype=torch.float64, device=pack.index.device) for _ in range(3)
        )
        # log-ratios summed over sequences are PEAR's sequence level without its clips
        self.walk = weights(self.ref_logprobs, pack, UNCLIPPED) if self.coupled else None

    def observe(self, begin: int, end: int, logprobs: Tensor, entropy: Tensor | None = None) -> None:
        self.logprobs[begin:end] = logprobs
        if self.walk is not None:
            self.walk.observe(begin, end, logprobs)
            return
        ratio = None if self.ref_logprobs is None else logprobs - self.ref_logprobs[begin:end]
        self.weigh(begin, end, entropy, ratio)

    def coefficients(self, begin: int, end: int) -> Tensor:
        if self.walk is not None:
            self.weigh_sequences(begin, end)
        return self.weights[begin:end] * self.token_scale[begin:end]

    def weigh_sequences(self, begin: int, end: int) -> None:
        """`weigh` by the means of the tokens' sequences, which are all observed."""
        self.walk.weights(begin, end)
        mean = self.walk.log_weights(begin, end) / (self.pack.stop - self.pack.start)[begin:end]
        self.weigh(begin, end, None, mean)

    def weigh(self, begin: int, end: int, entropy: Tensor | None, log_ratio: Tensor | None) -> None:
        """Fills `losses` and `weights` of these tokens, before `token_scale`."""
        tokens = Tokens(self.logprobs[begin:end], entropy, log_ratio, self.pack.index[begin:end])
        for whole, part in zip((self.losses, self.weights), self.weighting.formula(tokens, self.options), strict=True):
            whole[begin:end] = self.pack.zero_ghosts(part, begin, end)

    def finish(self, logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """After the walk: loss (), coefficients before `token_scale` (n,) and `WEIGHTED_STATS` (7,), float64."""
        if self.walk is not None:
            self.weigh_sequences(0, self.pack.tokens)
        losses, weights = self.losses, self.weights
        nothing = torch.zeros_like(logprobs)
        ratio = nothing if self.ref_logprobs is None else logprobs - self.ref_logprobs
        values = (-logprobs, ratio, weights, weights == 0, weights.square(), losses * self.token_scale)
        *sums, squares, loss = (self.pack.zero_ghosts(value.double()).sum() for value in values)
        tokens = at_least_one(self.pack.counted)
        nll, ratio, mean, zero = (total / tokens for total in sums)
        effective = effective_sample_size(sums[2], squares, tokens)
        # a 0 beside the weights stands for their maximum where there is none
        largest = torch.cat([weights, nothing.new_zeros(1)]).amax()
        counted = torch.full_like(loss, 1) * self.pack.counted
        return loss, weights, torch.stack([nll, ratio, mean, largest, zero, effective, counted])
