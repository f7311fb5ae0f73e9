"""Labelled sequences: PEAR's loss of right ones beside a repulsive term of wrong ones (arXiv 2602.01058, section 3.6).

Tokens of right sequences have PEAR's weights at the level asked for. Those of wrong ones have, always at sequence
level,

    L_t = -negative_lambda G min(-log p_t, -logprob_floor)

The paper's term has no bound. This package adds one, because the NLL of a wrong token can grow forever, and with it
what the loss gains, until nothing else counts. A token whose log-prob is at or below the floor is not pushed further.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pear_kernels.engine.objective import Objective
from pear_kernels.objectives.base import Loss, Problem, at_least_one
from pear_kernels.objectives.pear import STATS, pear_objective, statistics
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

    def __init__(self, problem: Problem):
        pack, options, labels = problem.pack, problem.options[PEAROptions], problem.options[LabelOptions]
        self.pack, self.options, self.labels = pack, options, labels
        self.token_scale = problem.scale()  # (n,)
        self.sequence_label = problem.columns["sequence_label"]  # (S,) bool, False where the sequence is wrong
        self.right = self.sequence_label[pack.sequence]  # (n,)
        self.logprobs = torch.zeros(pack.tokens, dtype=torch.float64, device=pack.index.device)
        self.separable = options.separable
        wrong = options.replace(level="sequence", center=False, normalize=None)
        if options.level == "token":
            wrong = wrong.replace(block_size=1)  # the blocks of `clip_blocks`
        behavior, block_ids = problem.take("behavior_logprobs"), problem.take("block_ids")
        self.right_weights = problem.weights(behavior, pack, options, block_ids)
        self.wrong_weights = problem.weights(behavior, pack, wrong, block_ids)

    def coupled_sequences(self) -> list[bool]:
        """Right sequences do at sequence level alone, or where an option of ours makes them."""
        return [self.options.coupled or not label for label in self.sequence_label.tolist()]

    def observe(self, begin: int, end: int, logprobs: Tensor, entropy: Tensor | None = None) -> None:
        self.logprobs[begin:end] = logprobs
        self.right_weights.observe(begin, end, logprobs)
        self.wrong_weights.observe(begin, end, logprobs)

    def weights(self, begin: int, end: int) -> Tensor:
        """(end - begin,) G."""
        of_right, of_wrong = (of.weights(begin, end) for of in (self.right_weights, self.wrong_weights))
        return torch.where(self.right[begin:end], of_right, of_wrong)

    def pushed(self, begin: int, end: int) -> Tensor:
        """(end - begin,) -negative_lambda, or 0 below the floor."""
        logprobs = self.logprobs[begin:end]
        return torch.where(
            logprobs <= self.labels.logprob_floor, 0.0, logprobs.new_full((), -self.labels.negative_lambda)
        )

    def known_coefficients(self, begin: int, end: int) -> Tensor:
        """(end - begin,) 1 for right tokens (or what is known of their weights), what pushes wrong ones."""
        of_right = self.right_weights.known_coefficients(begin, end)
        return torch.where(self.right[begin:end], 1.0 if of_right is None else of_right, self.pushed(begin, end))

    def pending_factor(self, begin: int, end: int) -> Tensor:
        of_right, of_wrong = (of.pending_factor(begin, end) for of in (self.right_weights, self.wrong_weights))
        return torch.where(self.right[begin:end], of_right, of_wrong) * self.token_scale[begin:end]

    def coefficients(self, begin: int, end: int) -> Tensor:
        return self.known_coefficients(begin, end) * self.pending_factor(begin, end)

    def finish(
        self, logprobs: Tensor, entropy: Tensor | None = None, divergence: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (), G (n,) times -negative_lambda for wrong tokens, `STATS` and `WRONG_STATS` (13,), all float64."""
        n, zero_ghosts = self.pack.tokens, self.pack.zero_ghosts
        weights = self.weights(0, n)
        own = torch.where(self.right, 1.0, self.pushed(0, n))
        pushed_nll = torch.where(self.right, -logprobs, (-logprobs).clamp(max=-self.labels.logprob_floor))
        factor = (
            torch.where(self.right, 1.0, logprobs.new_full((), -self.labels.negative_lambda)) * weights
        )  # in float64
        loss = zero_ghosts(factor * self.token_scale * pushed_nll).sum()
        counts = torch.ones_like(self.right) if self.pack.counts is None else self.pack.counts
        right, wrong = counts & self.right, counts & ~self.right
        of_right = self.right_weights.terms(logprobs, weights)
        sums = torch.stack([torch.where(right, value.double(), 0.0).sum() for value in of_right])
        of_wrong = -logprobs, weights, logprobs <= self.labels.logprob_floor
        sums_wrong = torch.stack([torch.where(wrong, value.double(), 0.0).sum() for value in of_wrong])
        stats = statistics(sums, right.sum()), sums_wrong / at_least_one(wrong.sum()), wrong.sum()[None].double()
        return loss, zero_ghosts(own * weights), torch.cat(stats)


class PEARLoss(Loss):
    """`linear_pear_loss`, with labels or without."""

    def stats(self, given: Sequence[str]) -> tuple[str, ...]:
        return STATS + WRONG_STATS if "sequence_label" in given else STATS

    def objective(self, problem: Problem, on_logits: bool) -> Objective:
        return LabelledObjective(problem) if "sequence_label" in problem.columns else pear_objective(problem)
