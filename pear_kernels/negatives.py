"""Wrong responses beside right ones, as the engine sees them: PEAR's repulsive term (arXiv 2602.01058, section 3.6).

Tokens of right sequences have PEAR's weights at the level asked for. Those of wrong ones have, at sequence level alone,

    L_t = -negative_lambda G min(-log p_t, -logprob_floor)

The paper's term is without the bound, which is ours: the NLL of a wrong token can grow forever, and with it what the
loss gains, until nothing else counts. A token whose log-prob has come down to the floor is not pushed further.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pear_kernels.engine import Objective
from pear_kernels.objectives import at_least_one, pear_sums, statistics
from pear_kernels.packing import Pack
from pear_kernels.weights import PEAROptions, PEARWeights

NEGATIVE_LAMBDA, LOGPROB_FLOOR = 0.1, -5.0  # the defaults, on which the paper is silent
WRONG_STATS = (  # beside `STATS` of the right ones, where sequences are labelled
    "wrong_nll",  # mean of -log pi over the tokens of wrong sequences
    "wrong_weight_mean",  # mean of their G, before negative_lambda
    "wrong_below_floor",  # share of them that are not pushed further
    "wrong_tokens",  # how many
)


class LabelledObjective(Objective):
    """PEAR's loss of right sequences, and the repulsive term of wrong ones."""

    coupled = True  # the wrong sequences are, at any level

    def __init__(
        self,
        behavior_logprobs: Tensor,  # (n,)
        pack: Pack,
        options: PEAROptions,
        scale: Tensor,  # (n,) float64, from `token_scale`
        sequence_label: Tensor,  # (S,) bool, False where the sequence is wrong
        negative_lambda: float,
        logprob_floor: float,
        weights: Callable[..., PEARWeights] = PEARWeights,
        block_ids: Tensor | None = None,  # (n,)
    ):
        self.pack = pack
        self.options = options
        self.token_scale = scale
        self.sequence_label = sequence_label
        self.right = sequence_label[pack.sequence]  # (n,)
        self.negative_lambda = negative_lambda
        self.logprob_floor = logprob_floor
        self.logprobs = torch.zeros(pack.tokens, dtype=torch.float64, device=pack.index.device)
        self.separable = options.separable
        of_wrong = options._replace(level="sequence", center=False, normalize=None)
        if options.level == "token":
            of_wrong = of_wrong._replace(block_size=1)  # the blocks, should `clip_blocks` ask
        self.of_right = weights(behavior_logprobs, pack, options, block_ids)
        self.of_wrong = weights(behavior_logprobs, pack, of_wrong, block_ids)

    def waits(self) -> list[bool]:
        """Right sequences do at sequence level alone, or where an option of ours makes them."""
        return [self.options.coupled or not label for label in self.sequence_label.tolist()]

    def observe(self, begin: int, end: int, logprobs: Tensor, entropy: Tensor | None = None) -> None:
        self.logprobs[begin:end] = logprobs
        self.of_right.observe(begin, end, logprobs)
        self.of_wrong.observe(begin, end, logprobs)

    def weights(self, begin: int, end: int) -> Tensor:
        """(end - begin,) G."""
        of_right, of_wrong = (of.weights(begin, end) for of in (self.of_right, self.of_wrong))
        return torch.where(self.right[begin:end], of_right, of_wrong)

    def pushed(self, begin: int, end: int) -> Tensor:
        """(end - begin,) -negative_lambda, or 0 below the floor."""
        logprobs = self.logprobs[begin:end]
        return torch.where(logprobs <= self.logprob_floor, 0.0, logprobs.new_full((), -self.negative_lambda))

    def own(self, begin: int, end: int) -> Tensor:
        """(end - begin,) 1 for right tokens (or what is known of their weights), what pushes wrong ones."""
        of_right = self.of_right.own(begin, end)
        return torch.where(self.right[begin:end], 1.0 if of_right is None else of_right, self.pushed(begin, end))

    def factor(self, begin: int, end: int) -> Tensor:
        of_right, of_wrong = (of.factor(begin, end) for of in (self.of_right, self.of_wrong))
        return torch.where(self.right[begin:end], of_right, of_wrong) * self.token_scale[begin:end]

    def coefficients(self, begin: int, end: int) -> Tensor:
        return self.own(begin, end) * self.factor(begin, end)

    def finish(self, logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """After the walk: loss (), own * G (n,), `STATS` and `WRONG_STATS` (13,), all float64."""
        n, zero_ghosts = self.pack.tokens, self.pack.zero_ghosts
        weights = self.weights(0, n)
        own = torch.where(self.right, 1.0, self.pushed(0, n))
        pushed_nll = torch.where(self.right, -logprobs, (-logprobs).clamp(max=-self.logprob_floor))
        factor = torch.where(self.right, 1.0, logprobs.new_full((), -self.negative_lambda)) * weights  # in float64
        loss = zero_ghosts(factor * self.token_scale * pushed_nll).sum()
        counts = torch.ones_like(self.right) if self.pack.counts is None else self.pack.counts
        right, wrong = counts & self.right, counts & ~self.right
        of_right = pear_sums(self.of_right, logprobs, weights)
        sums = torch.stack([torch.where(right, value.double(), 0.0).sum() for value in of_right])
        of_wrong = -logprobs, weights, logprobs <= self.logprob_floor
        sums_wrong = torch.stack([torch.where(wrong, value.double(), 0.0).sum() for value in of_wrong])
        stats = statistics(sums, right.sum()), sums_wrong / at_least_one(wrong.sum()), wrong.sum()[None].double()
        return loss, zero_ghosts(own * weights), torch.cat(stats)
