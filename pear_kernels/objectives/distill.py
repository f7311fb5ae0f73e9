"""Distillation: a divergence from a teacher as loss, with PEAR's weights or without."""

import torch
from torch import Tensor

from pear_kernels.engine.objective import Coefficients, Finished, Objective, present
from pear_kernels.objectives.base import Problem, at_least_one
from pear_kernels.objectives.pear import PEARObjective, pear_objective
from pear_kernels.objectives.weighted import WEIGHTINGS, WeightedObjective
from pear_kernels.options import DivergenceOptions


class DistillObjective(Objective):
    """L = sum_t G_t * scale_t * (D_t + nll_coef * -log p_t), with G and scale those of another objective."""

    on_logits = True

    def __init__(self, problem: Problem):
        known = "behavior_logprobs" in problem.columns
        weights = pear_objective(problem) if known else WeightedObjective(problem, WEIGHTINGS["none"])
        self.weights: PEARObjective | WeightedObjective = weights
        self.nll_coef = problem.options[DivergenceOptions].nll_coef
        self.coupled, self.separable, self.scalable = weights.coupled, weights.separable, weights.scalable

    def observe(self, begin: int, end: int, logprobs: Tensor, entropy: Tensor | None = None) -> None:
        self.weights.observe(begin, end, logprobs, entropy)

    def coefficients(self, begin: int, end: int) -> Coefficients:
        factor = self.weights.coefficients(begin, end)
        assert isinstance(factor, Tensor)  # neither of the two has on_logits
        return self.both(factor)

    def known_coefficients(self, begin: int, end: int) -> Coefficients:
        known = self.weights.known_coefficients(begin, end)
        return self.both(known if isinstance(known, Tensor) else self.weights.token_scale.new_ones(end - begin))

    def pending_factor(self, begin: int, end: int) -> Tensor:
        return self.weights.pending_factor(begin, end)

    def rescale(self) -> Tensor | None:
        return self.weights.rescale()

    def both(self, factor: Tensor) -> Coefficients:
        return Coefficients(factor * self.nll_coef if self.nll_coef else None, None, factor)

    def finish(self, logprobs: Tensor, entropy: Tensor | None = None, divergence: Tensor | None = None) -> Finished:
        """Loss (), weights (n,), and the statistics, the mean divergence first."""
        divergence = present(divergence)
        pack, scale = self.weights.pack, self.weights.token_scale
        _, weights, stats = self.weights.finish(logprobs)
        losses = divergence - self.nll_coef * logprobs if self.nll_coef else divergence
        loss, total = pack.sums((weights * scale * losses, divergence)).unbind()
        return loss, weights, torch.cat([(total / at_least_one(pack.counted))[None], stats])
