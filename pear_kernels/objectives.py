"""Losses, as the engine sees them: from log-probs to coefficients. Each formula here is used by every backend."""

import torch
from torch import Tensor

from pear_kernels.packing import Pack
from pear_kernels.weights import PEAROptions, PEARWeights

STATS = (
    "nll",  # unweighted mean of -log pi
    "log_ratio_mean",  # mean of log pi - log pi_b, before its clip
    "ratio_clipped_low",  # share of tokens whose log-ratio is below log_ratio_clip
    "ratio_clipped_high",  # ... above it
    "weight_mean",  # mean of G
    "weight_floor",  # share of tokens whose G is on the lower end of log_weight_clip
    "weight_ceiling",  # ... on the upper end
    "effective_sample_size",  # (sum G)^2 / (n sum G^2), the share of tokens that carry the gradient
    "tokens",  # n, the tokens that count
)


class PEARObjective:
    """L = sum_t G_t * scale_s * -log pi(y_t) / divisor, with G detached (arXiv 2602.01058)."""

    def __init__(
        self,
        behavior_logprobs: Tensor,  # (n,)
        pack: Pack,
        options: PEAROptions,
        reduction: str,
        denominator: Tensor | None,  # () or (1,)
        sequence_scale: Tensor | None,  # (S,)
    ):
        self.pack = pack
        self.options = options
        self.walk = PEARWeights(behavior_logprobs, pack, options)
        self.coupled = options.level == "sequence"
        self.token_scale = token_scale(pack, reduction, denominator, sequence_scale)  # (n,)

    def observe(self, begin: int, end: int, logprobs: Tensor) -> None:
        self.walk.observe(begin, end, logprobs)

    def coefficients(self, begin: int, end: int) -> Tensor:
        return self.walk.weights(begin, end) * self.token_scale[begin:end]

    def finish(self, logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """After the walk, from all log-probs (n,): loss (), weights (n,) and the `STATS` (9,), all float64."""
        weights = self.walk.weights(0, self.pack.tokens)
        loss = (weights * self.token_scale * -logprobs).sum()
        return loss, weights, self.statistics(logprobs, weights)

    def statistics(self, logprobs: Tensor, weights: Tensor) -> Tensor:
        log_ratio = logprobs - self.walk.behavior_logprobs
        log_g = self.walk.log_weights(0, self.pack.tokens)
        low, high = self.options.log_ratio_clip
        floor, ceiling = self.options.log_weight_clip
        share = max(self.pack.tokens, 1)
        weight_sum, weight_squares = weights.sum(), weights.square().sum()
        values = (
            (-logprobs).sum() / share,
            log_ratio.sum() / share,
            (log_ratio < low).double().sum() / share,
            (log_ratio > high).double().sum() / share,
            weight_sum / share,
            (log_g <= floor).double().sum() / share,
            (log_g >= ceiling).double().sum() / share,
            weight_sum.square() / (share * weight_squares).clamp(min=torch.finfo(torch.float64).tiny),
            torch.full_like(weight_sum, self.pack.tokens),
        )
        return torch.stack(values)


class FixedCoefficients:
    """Coefficients known beforehand: the backward pass of log-probs that went into a caller's own loss."""

    coupled = False

    def __init__(self, coefficients: Tensor):  # (n,)
        self.known = coefficients

    def observe(self, begin: int, end: int, logprobs: Tensor) -> None:
        """Nothing depends on them."""

    def coefficients(self, begin: int, end: int) -> Tensor:
        return self.known[begin:end]


def token_scale(pack: Pack, reduction: str, denominator: Tensor | None, sequence_scale: Tensor | None) -> Tensor:
    """(n,) float64: what multiplies each token's weighted loss.

    The divisor is the tokens ("mean"), 1 ("sum"), or, on top of each token's own 1 / T_s, the sequences with a token
    that counts ("sequence_mean"); `denominator` replaces it.
    """
    device = pack.index.device
    scale = torch.ones(pack.tokens, dtype=torch.float64, device=device)
    if reduction == "sequence_mean":
        scale = scale / (pack.stop - pack.start)
    if sequence_scale is not None:
        scale = scale * sequence_scale[pack.sequence]
    if denominator is not None:
        divisor = denominator.reshape(())
    elif reduction == "mean":
        divisor = torch.full((), max(pack.tokens, 1), device=device)
    elif reduction == "sequence_mean":
        divisor = (pack.lengths > 0).sum().clamp(min=1)
    else:
        divisor = torch.ones((), device=device)
    return scale / divisor
