"""Labelled sequences: PEAR's loss of right ones and a repulsive term of wrong ones (arXiv 2602.01058, section 3.6).

Tokens of right sequences have PEAR's weights at the level of the options. Tokens of wrong sequences have, always at
sequence level,

    L_t = -negative_lambda G min(-log p_t, -logprob_floor)

The paper's term has no bound. This package adds one: the NLL of a wrong token can grow without limit and would then
dominate the loss. A token whose log-prob is at or below the floor is not pushed further.
"""

import torch
from torch import Tensor

from pear_kernels.engine.objective import Finished, Objective
from pear_kernels.objectives.base import Problem, at_least_one
from pear_kernels.objectives.pear import pear_objective, statistics
from pear_kernels.options import LabelOptions, PEAROptions

WRONG_STATS = (  # beside `STATS` of the right sequences, where sequences are labelled
    "wrong_nll",  # mean of -log pi over the tokens of wrong sequences
    "wrong_weight_mean",  # mean of their G, before negative_lambda
    "wrong_below_floor",  # share of them that are not pushed further
    "wrong_tokens",  # how many
)


class LabelledObjective(Objective):
    """PEAR's loss of right sequences, and the repulsive term of wrong ones."""

    coupled = True  # the wrong sequences are, at any level
    scalable = True

    def __init__(self, problem: Problem):
        super().__init__(problem.pack)
        pack, options, labels = problem.pack, problem.options[PEAROptions], problem.options[LabelOptions]
        self.options, self.labels = options, labels
        self.token_scale = problem.scale()  # (n,)
        self.sequence_label = problem.columns["sequence_label"]  # (S,) bool, False where the sequence is wrong
        self.right = self._averaged = self.sequence_label[pack.sequence]  # (n,)
        self.separable = options.separable
        wrong = options.replace(level="sequence", center=False, normalize=None)
        if options.level == "token":
            wrong = wrong.replace(block_size=1)  # the blocks of `clip_blocks`
        behavior, block_ids = problem.take("behavior_logprobs"), problem.take("block_ids")
        self.right_weights = problem.weights(behavior, pack, options, block_ids)
        self.wrong_weights = problem.weights(behavior, pack, wrong, block_ids)

    def coupled_sequences(self) -> list[bool]:
        """Wrong sequences are coupled; right ones at sequence level, or with an option that couples them."""
        return [self.options.coupled or not label for label in self.sequence_label.tolist()]

    def observe(self, begin: int, end: int, logprobs: Tensor, entropy: Tensor | None = None) -> None:
        super().observe(begin, end, logprobs)
        self.right_weights.observe(begin, end, logprobs)
        self.wrong_weights.observe(begin, end, logprobs)

    def repulsion(self, begin: int, end: int) -> Tensor:
        """(end - begin,) what multiplies a wrong token's G: -negative_lambda, or 0 at or below the floor."""
        logprobs = self.logprobs[begin:end]
        return torch.where(
            logprobs <= self.labels.logprob_floor, 0.0, logprobs.new_full((), -self.labels.negative_lambda)
        )

    def known_coefficients(self, begin: int, end: int) -> Tensor:
        """(end - begin,) 1 for right tokens (or the known part of their weights), `repulsion` for wrong ones."""
        known = self.right_weights.known_coefficients(begin, end)
        return torch.where(self.right[begin:end], 1.0 if known is None else known, self.repulsion(begin, end))

    def pending_factor(self, begin: int, end: int) -> Tensor:
        right, wrong = (made.pending_factor(begin, end) for made in (self.right_weights, self.wrong_weights))
        return torch.where(self.right[begin:end], right, wrong) * self.token_scale[begin:end]

    def coefficients(self, begin: int, end: int) -> Tensor:
        return self.known_coefficients(begin, end) * self.pending_factor(begin, end)

    def finish(self, logprobs: Tensor, entropy: Tensor | None = None, divergence: Tensor | None = None) -> Finished:
        """Loss (), G (n,) times -negative_lambda for wrong tokens, `STATS` and `WRONG_STATS` (13,), all float64."""
        n, floor = self.pack.tokens, self.labels.logprob_floor
        weights = torch.where(self.right, self.right_weights.weights(0, n), self.wrong_weights.weights(0, n))
        bounded_nll = torch.where(self.right, -logprobs, (-logprobs).clamp(max=-floor))
        sign = torch.where(self.right, 1.0, logprobs.new_full((), -self.labels.negative_lambda))  # float64
        loss = self.pack.sums([sign * weights * self.token_scale * bounded_nll])[0]
        counts = torch.ones_like(self.right) if self.pack.counts is None else self.pack.counts
        right, wrong = counts & self.right, counts & ~self.right
        right_sums = self.pack.sums(self.right_weights.terms(logprobs, weights), right)
        *wrong_sums, wrong_tokens = self.pack.sums((-logprobs, weights, logprobs <= floor, wrong), wrong).unbind()
        stats = statistics(right_sums, right.sum()), torch.stack(wrong_sums) / at_least_one(wrong_tokens)
        weights = self.pack.zero_ghosts(torch.where(self.right, 1.0, self.repulsion(0, n)) * weights)
        return loss, weights, torch.cat([*stats, wrong_tokens[None]])


def pear_or_labelled(problem: Problem) -> Objective:
    """The objective of `linear_pear_loss`, with labels or without."""
    return LabelledObjective(problem) if "sequence_label" in problem.columns else pear_objective(problem)
