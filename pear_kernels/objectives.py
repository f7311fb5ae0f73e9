"""Losses, as the engine sees them: from log-probs to coefficients. Each formula here is used by every backend."""

from collections.abc import Callable

import torch
from torch import Tensor

from pear_kernels.engine import Coefficients, Objective
from pear_kernels.packing import Pack
from pear_kernels.weights import PEAROptions, PEARWeights

STATS = (
    "nll",  # unweighted mean of -log pi
    "log_ratio_mean",  # mean of log pi - log pi_b, before its clip (`PEARWeights.clipping` says of what)
    "ratio_clipped_low",  # share of tokens whose log-ratio is below log_ratio_clip (as scaled by clip_length)
    "ratio_clipped_high",  # ... above it
    "weight_mean",  # mean of G
    "weight_floor",  # share of tokens whose G is on the lower end of log_weight_clip (before it is normalised)
    "weight_ceiling",  # ... on the upper end
    "effective_sample_size",  # (sum G)^2 / (n sum G^2), the share of tokens that carry the gradient
    "tokens",  # n, the tokens that count
)
OF_ALL = (  # what every loss adds to its statistics, means over the tokens that count (with labels, the right ones)
    "token_accuracy",  # share of tokens that no other token is likelier than
    "entropy",  # of the distribution over the vocabulary, in nats; where it was asked for
)


class PEARObjective(Objective):
    """L = sum_t G_t * scale_s * -log pi(y_t) / divisor, with G detached (arXiv 2602.01058)."""

    def __init__(
        self,
        behavior_logprobs: Tensor,  # (n,)
        pack: Pack,
        options: PEAROptions,
        reduction: str,
        denominator: Tensor | None,  # () or (1,)
        sequence_scale: Tensor | None,  # (S,)
        weights: Callable[..., PEARWeights] = PEARWeights,  # the class, or a backend's own with the same interface
        block_ids: Tensor | None = None,  # (n,)
    ):
        self.pack = pack
        self.options = options
        self.coupled, self.separable = options.coupled, options.separable
        self.token_scale = token_scale(pack, reduction, denominator, sequence_scale)  # (n,)
        self.walk = weights(behavior_logprobs, pack, options, block_ids)

    def observe(self, begin: int, end: int, logprobs: Tensor, entropy: Tensor | None = None) -> None:
        self.walk.observe(begin, end, logprobs)

    def coefficients(self, begin: int, end: int) -> Tensor:
        return self.walk.weights(begin, end) * self.token_scale[begin:end]

    def own(self, begin: int, end: int) -> Tensor | None:
        return self.walk.own(begin, end)

    def factor(self, begin: int, end: int) -> Tensor:
        return self.walk.factor(begin, end) * self.token_scale[begin:end]

    def rescale(self) -> Tensor | None:
        return self.walk.rescale()

    def finish(self, logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """After the walk, from all log-probs (n,): loss (), weights (n,) and the `STATS` (9,), all float64."""
        weights, scale = self.pack.zero_ghosts(self.walk.weights(0, self.pack.tokens).double()), self.rescale()
        weights = weights if scale is None else weights * scale
        sums = self.sums(logprobs, weights)
        return sums[-1], weights, statistics(sums, self.pack.counted)

    def sums(self, logprobs: Tensor, weights: Tensor) -> Tensor:
        """(9,) over the tokens that count: what `statistics` takes, and the loss."""
        values = pear_sums(self.walk, logprobs, weights)
        values += (weights * self.token_scale * -logprobs,)
        return torch.stack([self.pack.zero_ghosts(value.double()).sum() for value in values])


class FixedCoefficients(Objective):
    """Coefficients known beforehand: the backward pass of log-probs that went into a caller's own loss; or none."""

    def __init__(self, *coefficients: Tensor | None):  # (n,) each: one, or the fields of `engine.Coefficients`
        self.known = coefficients

    def observe(self, begin: int, end: int, logprobs: Tensor, entropy: Tensor | None = None) -> None:
        """Nothing depends on them."""

    def coefficients(self, begin: int, end: int) -> Tensor | Coefficients:
        parts = [None if part is None else part[begin:end] for part in self.known]
        return parts[0] if len(parts) == 1 else Coefficients(*parts)


def pear_sums(walk: PEARWeights, logprobs: Tensor, weights: Tensor) -> tuple:
    """What `statistics` takes the sums of, (n,) each, after the walk."""
    log_ratio, below, above = walk.clipping(logprobs)
    log_g = walk.log_weights(0, walk.pack.tokens)
    floor, ceiling = walk.options.log_weight_clip
    return -logprobs, log_ratio, below, above, weights, log_g <= floor, log_g >= ceiling, weights.square()


def statistics(sums: Tensor, counted: int | Tensor) -> Tensor:
    """`STATS` (9,) from the sums over tokens of what `pear_sums` gives."""
    tokens = at_least_one(counted)
    effective = effective_sample_size(sums[4], sums[7], tokens)
    return torch.cat([sums[:7] / tokens, effective[None], torch.full_like(effective, 1)[None] * counted])


def effective_sample_size(total: Tensor, squares: Tensor, tokens: int | Tensor) -> Tensor:
    """(): (sum w)^2 / (n sum w^2), the share of n tokens that carry the gradient; 0 without weights."""
    return total.square() / (tokens * squares).clamp(min=torch.finfo(torch.float64).tiny)


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
        divisor = at_least_one(pack.counted)
    elif reduction == "sequence_mean":
        divisor = (pack.lengths > 0).sum().clamp(min=1)
    else:
        divisor = 1
    return pack.zero_ghosts(scale / divisor)


def at_least_one(count: int | Tensor) -> int | Tensor:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
