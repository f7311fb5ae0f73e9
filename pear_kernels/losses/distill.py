"""Distillation: `linear_distill_loss`."""

from typing import Unpack

import torch
from torch import Tensor

from pear_kernels import checks
from pear_kernels.losses.shared import LossOutput, add_teacher, checked_inputs, run
from pear_kernels.objectives.teachers import Teacher, TopKTeacher
from pear_kernels.options import (
    DistillKeywords,
    DivergenceOptions,
    HeadOptions,
    Objects,
    PEAROptions,
    Reduction,
    gather,
    takes,
)
from pear_kernels.sharding import refuse

CLASSES = DivergenceOptions, PEAROptions, Reduction, HeadOptions


@takes(*CLASSES)
def linear_distill_loss(
    hidden: Tensor,  # (N, D) or (B, T, D)
    weight: Tensor,  # (V, D)
    teacher: Teacher | TopKTeacher,
    target: Tensor,  # (N,) or (B, T)
    behavior_logprobs: Tensor | None = None,  # (N,) or (B, T)
    *,
    bias: Tensor | None = None,  # (V,)
    cu_seqlens: Tensor | None = None,  # (S+1,)
    block_ids: Tensor | None = None,  # (N,) or (B, T)
    sequence_scale: Tensor | None = None,  # (S,)
    denominator: float | Tensor | None = None,
    return_entropy: bool = False,
    valid_tokens: int | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
    options: Objects = (),
    **keywords: Unpack[DistillKeywords],
) -> LossOutput:
    """Distillation of an LM head with PEAR's weights, heads included, without ever holding the (N, V) logits of either.

        L = sum_t stop_gradient(G_t) * (D_t + nll_coef * -log pi(y_t | x, y_<t)) / divisor

    with D_t a divergence of the student's distribution p from the teacher's q:

    | divergence | D |
    | --- | --- |
    | "forward" | KL(q, p) = sum q log(q / p) |
    | "reverse" | KL(p, q) = sum p log(p / q) |
    | "js" | js_beta KL(q, m) + (1 - js_beta) KL(p, m), m = js_beta q + (1 - js_beta) p (GKD, arXiv 2306.13649) |

    As many matrix products as `linear_pear_loss`, plus one for a teacher in memory. One chunk of logits of each model
    is held at a time.

    Args:
        hidden, weight, target, bias, cu_seqlens, sequence_scale, denominator, return_entropy, valid_tokens, group: see
            `linear_pear_loss`. (A sharded weight is an error here. So is return_entropy with a `TopKTeacher`.)
        teacher: `Teacher(hidden, weight, bias, temperature, softcap)`: hidden states (N, D') or (B, T, D') at the
            student's positions, of any D' and one dtype of their own (under autocast its operands are rounded as the
            student's), with the student's vocabulary; or `TopKTeacher(ids, logprobs)`, its K most likely tokens at
            each position, with log-probs at distill_temperature, largest first. D then compares K + 1 outcomes, the
            last one being any other token (whose probability is at least the rounding of the log-probs' dtype). No
            gradient goes to a teacher.
        behavior_logprobs, block_ids: as in `linear_pear_loss`; without behavior_logprobs every G is 1.
        options: objects of `DivergenceOptions`, `PEAROptions`, `Reduction`, `HeadOptions`, as in `linear_pear_loss`.

    Returns:
        LossOutput. `weights` are G. `stats` begin with "divergence", the mean of D; the others are
        `objectives.pear.STATS` with behavior_logprobs, else `objectives.weighted.WEIGHTED_STATS`.

    Raises:
        ValueError, TypeError, torch.OutOfMemoryError, RuntimeError: as `linear_pear_loss`.
    """
    given = gather("linear_distill_loss", CLASSES, options, keywords)
    columns = {
        "behavior_logprobs": behavior_logprobs, "block_ids": block_ids, "sequence_scale": sequence_scale
    }  # fmt: skip
    inputs = checked_inputs(
        hidden, weight, target, bias, group, valid_tokens, return_entropy, columns, cu_seqlens, denominator
    )
    refuse(inputs.group, "linear_distill_loss")
    checks.check_level_of_blocks(block_ids, given[1].level)
    if block_ids is not None and behavior_logprobs is None:
        raise ValueError(
            "block_ids is given, but behavior_logprobs is None: there are no log-ratios to put into blocks"
        )
    if isinstance(teacher, Teacher):
        add_teacher(inputs, teacher, "teacher")
    elif isinstance(teacher, TopKTeacher):
        checks.check_top_k_teacher(inputs.hidden, inputs.target, teacher, weight.shape[0])
        if return_entropy:
            raise ValueError(
                "return_entropy does not work with a TopKTeacher, whose pass makes no entropy of the student: pass "
                "False, or take it from linear_logprobs(..., return_entropy=True)"
            )
        ids, logprobs = (part.detach().flatten(0, -2) for part in teacher)
        inputs.columns.update(teacher_ids=ids, teacher_logprobs=logprobs)
    else:
        raise TypeError(f"teacher must be a pear_kernels.Teacher or TopKTeacher, got {type(teacher).__name__}")
    return run("linear_distill_loss", inputs, given)
