"""PEAR's loss (arXiv 2602.01058): from log-probs to coefficients."""

import torch
from torch import Tensor

from pear_kernels.engine.objective import Finished, Objective
from pear_kernels.formulas.pear_weights import PEARWeights, Terms
from pear_kernels.objectives.base import Problem, as_statistic, at_least_one, effective_sample_size
from pear_kernels.options import PEAROptions

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

WEIGHT, SQUARE = map(Terms._fields.index, ("weight", "square"))  # the square comes last, and is no statistic itself


class PEARObjective(Objective):
    """L = sum_t G_t * scale_s * -log pi(y_t) / divisor, with G detached."""

    scalable = True

    def __init__(self, weights: PEARWeights):
        self.weights = weights
        self.pack, self.token_scale = weights.pack, weights.token_scale  # (n,)
        self.coupled, self.separable = weights.options.coupled, weights.options.separable

    def observe(self, begin: int, end: int, logprobs: Tensor, entropy: Tensor | None = None) -> None:
        self.weights.observe(begin, end, logprobs)

    def coefficients(self, begin: int, end: int) -> Tensor:
        return self.weights.coefficients(begin, end)

    def known_coefficients(self, begin: int, end: int) -> Tensor | None:
        return self.weights.known_coefficients(begin, end)

    def pending_factor(self, begin: int, end: int) -> Tensor:
        return self.weights.pending_factor(begin, end) * self.token_scale[begin:end]

    def rescale(self) -> Tensor | None:
        return self.weights.rescale()

    def finish(self, logprobs: Tensor, entropy: Tensor | None = None, divergence: Tensor | None = None) -> Finished:
        """Loss (), weights (n,) and `STATS` (9,), all float64."""
        weights, scale = self.pack.zero_ghosts(self.weights.weights(0, self.pack.tokens).double()), self.rescale()
        weights = weights if scale is None else weights * scale
        sums = self.weights.sums(logprobs, weights)
        return sums[-1], weights, statistics(sums, self.pack.counted)


def pear_objective(problem: Problem) -> PEARObjective:
    """The objective of a call without labels."""
    behavior, options = problem.take("behavior_logprobs"), problem.options[PEAROptions]
    return PEARObjective(problem.weights(behavior, problem.pack, options, problem.take("block_ids"), problem.scale()))


def statistics(sums: Tensor, counted: int | Tensor) -> Tensor:
    """`STATS` (9,) from the sums over tokens of `PEARWeights.terms`."""
    tokens = at_least_one(counted)
    effective = effective_sample_size(sums[WEIGHT], sums[SQUARE], tokens)
    return torch.cat([sums[:SQUARE] / tokens, effective[None], as_statistic(counted, sums)[None]])
