"""Not run: what a caller's type checker sees of both packages as they are installed (tests/test_wheel.py).

The lines that end in `type: ignore` are mistakes of a caller. Were a name untyped, its mistake would pass unseen, and
the checker would call the comment unused.
"""

from pathlib import Path

import torch
from torch import Tensor

import pear_kernels
from pear.align import Alignment, Spans, align
from pear.io import DataError, read_jsonl
from pear.score import score
from pear.seal import write_scored
from pear_kernels import (
    LinearDistillLoss,
    LinearPEARLoss,
    LinearPolicyLoss,
    LinearWeightedLoss,
    LossOutput,
    Plan,
    Teacher,
    TopKTeacher,
    linear_distill_loss,
    linear_logprobs,
    linear_pear_loss,
    linear_policy_loss,
    linear_topk_logprobs,
    linear_weighted_loss,
    pear_weights,
)
from pear_kernels.engine.objective import Coefficients, Objective
from pear_kernels.engine.packing import Pack
from pear_kernels.options import HeadOptions, LabelOptions, PEAROptions, PolicyOptions, Reduction


def losses(hidden: Tensor, weight: Tensor, target: Tensor, numbers: Tensor) -> Tensor:
    found: LossOutput = linear_pear_loss(hidden, weight, target, numbers, level="block", block_size=8)
    mean: Tensor = found.stats["weight_mean"]
    policy = linear_policy_loss(hidden, weight, target, None, numbers, objective="grpo", dual_clip=None, reduction=None)
    focal = linear_weighted_loss(hidden, weight, target, lambda logprobs: (1 - logprobs.exp()) ** 2, softcap=30)
    teacher: TopKTeacher = linear_topk_logprobs(hidden, weight, target, 8, backend="torch", valid_tokens=3)
    distilled = linear_distill_loss(hidden, weight, teacher, target, divergence="js", denominator=numbers.sum())
    asft = linear_weighted_loss(hidden, weight, target, weighting="asft", reference=Teacher(hidden, weight))
    weights: Tensor = pear_weights(numbers, numbers, log_ratio_clip=(-0.1, 0.1))
    linear_pear_loss(hidden, weight, target)  # type: ignore[call-arg]
    linear_pear_loss(hidden, weight, target, numbers, gamma="0.99")  # type: ignore[arg-type]
    linear_pear_loss(hidden, weight, target, numbers, gama=0.99)  # type: ignore[call-arg]
    linear_pear_loss(hidden, weight, target, numbers, reduction=None)  # type: ignore[arg-type]
    linear_pear_loss(hidden, weight, target, numbers, valid_tokens=3.0)  # type: ignore[arg-type]
    linear_policy_loss(hidden, weight, target, None, numbers, clip_low=(0.1, 0.2))  # type: ignore[arg-type]
    linear_policy_loss(hidden, weight, target, None, numbers, level="token")  # type: ignore[call-arg]
    linear_weighted_loss(hidden, weight, target, weights=3.0)  # type: ignore[arg-type]
    linear_weighted_loss(hidden, weight, target, "dft", idft_clip=(0.1, "2"))  # type: ignore[arg-type]
    linear_distill_loss(hidden, weight, weight, target)  # type: ignore[arg-type]
    linear_topk_logprobs(hidden, weight, target, 8, temperature=None)  # type: ignore[arg-type]
    pear_weights(numbers, numbers, clip_length=2.5)  # type: ignore[arg-type]
    pear_weights(numbers, numbers, temperature=2.0)  # type: ignore[call-arg]
    wrong: int = found.loss  # type: ignore[assignment]
    losses_ = found.loss + policy.loss + focal.loss + distilled.loss + asft.loss
    return losses_ + weights.sum() + mean + wrong


def objects(hidden: Tensor, weight: Tensor, target: Tensor, numbers: Tensor) -> float:
    pear = PEAROptions(gamma=0.99, clip_length=None)
    both = [pear, HeadOptions(temperature=2)]
    linear_pear_loss(hidden, weight, target, numbers, options=pear.replace(level="block"), reduction="sum")
    linear_pear_loss(hidden, weight, target, numbers, options=(*both, Reduction(), LabelOptions()))
    linear_pear_loss(hidden, weight, target, numbers, options="mean")  # type: ignore[arg-type]
    PEAROptions(gamma="0.99")  # type: ignore[arg-type]
    PEAROptions(gama=0.99)  # type: ignore[call-arg]
    PEAROptions("token")  # type: ignore[call-arg]
    PolicyOptions(beta=None)  # type: ignore[arg-type]
    pear.gamma = 0.9  # type: ignore[misc]
    name: int = pear.names()  # type: ignore[assignment]
    low: float = pear.log_ratio_clip[0] + name
    return low


def modules(hidden: Tensor, weight: Tensor, target: Tensor, numbers: Tensor) -> Tensor:
    pear, weighted = LinearPEARLoss(gamma=0.99), LinearWeightedLoss("dft", softcap=None)
    policy, distill = LinearPolicyLoss(options=PolicyOptions(beta=0.1)), LinearDistillLoss(divergence="js")
    LinearPEARLoss(gamma="0.99")  # type: ignore[arg-type]
    LinearWeightedLoss("dft", iw_max=None)  # type: ignore[arg-type]
    LinearPolicyLoss(level="token")  # type: ignore[call-arg]
    pear.forward(hidden, weight, "target", numbers)  # type: ignore[arg-type]
    weighted.forward(hidden, weight)  # type: ignore[call-arg]
    policy.forward(hidden, weight, target, None, numbers, sequence_label=numbers)  # type: ignore[call-arg]
    found: LossOutput = distill.forward(hidden, weight, Teacher(hidden, weight), target, block_ids=None)
    wrong: Tensor = pear.forward(hidden, weight, target, numbers, denominator=3)  # type: ignore[assignment]
    return found.loss + wrong


class FixedWeights(Objective):
    """A loss of a caller's."""

    def __init__(self, weights: Tensor, pack: Pack):
        self.weights: Tensor = pack.take(weights)

    def observe(self, begin: int, end: int, logprobs: Tensor, entropy: Tensor | None = None) -> None:
        self.weights[begin:end] *= logprobs.exp()

    def coefficients(self, begin: int, end: int) -> Tensor | Coefficients:
        return Coefficients(nll=self.weights[begin:end], entropy=None)

    def finish(
        self, logprobs: Tensor, entropy: Tensor | None = None, divergence: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        Coefficients(nll="nll")  # type: ignore[arg-type]
        return (self.weights * -logprobs).sum(), self.weights, logprobs.new_empty(0)


class WrongWeights(Objective):
    def observe(self, begin: int) -> None:  # type: ignore[override]
        pass

    def coefficients(self, begin: int, end: int) -> str:  # type: ignore[override]
        return ""


def logprobs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    found = linear_logprobs(hidden, weight, target, temperature=0.7)
    return found if isinstance(found, Tensor) else found[0]


def cost() -> int:
    found: Plan = pear_kernels.plan(8192, 151936, 4096, dtype=torch.bfloat16)
    print(found.chunks.append)  # type: ignore[attr-defined]
    return found.peak_bytes


def files(path: Path, student: Spans, behavior: Spans) -> dict[str, object]:
    try:
        rows = [row for _, row in read_jsonl(path)]
        write_scored(path, rows)
    except DataError as error:
        print(error.args)
    found: Alignment = align(student, behavior, [0.0])
    print(found.nothing)  # type: ignore[attr-defined]
    return score("smollm2", path, path, batch_tokens="many")  # type: ignore[arg-type]
