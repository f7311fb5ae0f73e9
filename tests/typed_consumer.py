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
    LinearPEARLoss,
    LossOutput,
    Plan,
    linear_logprobs,
    linear_pear_loss,
    linear_policy_loss,
    linear_weighted_loss,
    pear_weights,
)


def losses(hidden: Tensor, weight: Tensor, target: Tensor, numbers: Tensor) -> Tensor:
    found: LossOutput = linear_pear_loss(hidden, weight, target, numbers, level="block", block_size=8)
    mean: Tensor = found.stats["weight_mean"]
    module = LinearPEARLoss(gamma=0.99)
    policy = linear_policy_loss(hidden, weight, target, numbers, numbers, objective="grpo")
    focal = linear_weighted_loss(hidden, weight, target, lambda logprobs: (1 - logprobs.exp()) ** 2)
    weights = pear_weights(numbers, numbers, log_ratio_clip=(-0.1, 0.1))
    linear_pear_loss(hidden, weight, target, numbers, gamma="0.99")  # type: ignore[arg-type]
    linear_pear_loss(hidden, weight, target)  # type: ignore[call-arg]
    wrong: int = found.loss  # type: ignore[assignment]
    module.forward(hidden, weight, "target", numbers)  # type: ignore[arg-type]
    return found.loss + policy.loss + focal.loss + weights.sum() + mean + wrong


def logprobs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    found = linear_logprobs(hidden, weight, target)
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
