"""Distillation: a divergence from a teacher as loss, with PEAR's weights or without."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pear_kernels.engine.head import BackendLogitsHead
from pear_kernels.engine.objective import Coefficients, Objective, TeacherSource, present
from pear_kernels.engine.schedule import Wanted
from pear_kernels.objectives.base import Loss, Problem, at_least_one
from pear_kernels.objectives.pear import STATS, PEARObjective, pear_objective
from pear_kernels.objectives.teachers import OfflineTeacher, loaded_teacher
from pear_kernels.objectives.weighted import WEIGHTED_STATS, WEIGHTINGS, WeightedObjective
from pear_kernels.options import DivergenceOptions


class DistillObjective(Objective):
    """L = sum_t G_t * scale_t * (D_t + nll_coef * -log p_t), with G and scale those of another objective."""

    def __init__(self, weights: PEARObjective | WeightedObjective, nll_coef: float):
        self.weights = weights
        self.nll_coef = nll_coef
        self.coupled, self.separable, self.scalable = weights.coupled, weights.separable, weights.scalable

    def observe(self, begin: int, end: int, logprobs: Tensor, entropy: Tensor | None = None) -> None:
        self.weights.observe(begin, end, logprobs, entropy)

    def coefficients(self, begin: int, end: int) -> Coefficients:
        return self.both(self.weights.coefficients(begin, end))

    def known_coefficients(self, begin: int, end: int) -> Coefficients:
        known = self.weights.known_coefficients(begin, end)
        return self.both(known if isinstance(known, Tensor) else self.weights.token_scale.new_ones(end - begin))

    def pending_factor(self, begin: int, end: int) -> Tensor:
        return self.weights.pending_factor(begin, end)

    def rescale(self) -> Tensor | None:
        return self.weights.rescale()

    def both(self, factor: Tensor) -> Coefficients:
        return Coefficients(factor * self.nll_coef if self.nll_coef else None, None, factor)

    def finish(
        self, logprobs: Tensor, entropy: Tensor | None = None, divergence: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (), weights (n,), and the statistics, the mean divergence first."""
        divergence = present(divergence)
        pack, scale = self.weights.pack, self.weights.token_scale
        _, weights, stats = self.weights.finish(logprobs)
        losses = divergence - self.nll_coef * logprobs if self.nll_coef else divergence
        loss, total = pack.sums((weights * scale * losses, divergence)).unbind()
        return loss, weights, torch.cat([(total / at_least_one(pack.counted))[None], stats])


class DistillLoss(Loss):
    """`linear_distill_loss`, with a teacher in memory or one given by its K most likely tokens."""

    def stats(self, given: Sequence[str]) -> tuple[str, ...]:
        return "divergence", *(STATS if "behavior_logprobs" in given else WEIGHTED_STATS)

    def objective(self, problem: Problem, on_logits: bool) -> Objective:
        known = "behavior_logprobs" in problem.columns
        weights = pear_objective(problem) if known else WeightedObjective(problem, WEIGHTINGS["none"])
        return DistillObjective(weights, problem.options[DivergenceOptions].nll_coef)

    def needs_logits(self, problem: Problem, wanted: Wanted) -> bool:
        return True

    def teacher(self, problem: Problem, student: BackendLogitsHead) -> TeacherSource | None:
        options = problem.options[DivergenceOptions]
        if "teacher_hidden" in problem.columns:
            return loaded_teacher(problem, student, options)
        return OfflineTeacher(
            problem.columns["teacher_ids"], problem.columns["teacher_logprobs"], problem.pack, options
        )
