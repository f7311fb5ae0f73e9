"""Distillation: `linear_distill_loss`."""

import torch
from torch import Tensor

from pear_kernels import checks, ops
from pear_kernels.distill import Teacher, TopKTeacher
from pear_kernels.divergence import DIVERGENCES, DivergenceOptions
from pear_kernels.losses.shared import (
    LossOutput,
    autocast_dtype,
    checked_head,
    divisor,
    flat,
    flat_teacher,
    loss_output,
    wanted_gradients,
)
from pear_kernels.objectives import STATS
from pear_kernels.scalars import call
from pear_kernels.shards import local_head, refuse
from pear_kernels.weightings import WEIGHTED_STATS
from pear_kernels.weights import DEFAULTS, PEAROptions


def linear_distill_loss(
    hidden: Tensor,  # (N, D) or (B, T, D)
    weight: Tensor,  # (V, D)
    teacher: Teacher | TopKTeacher,
    target: Tensor,  # (N,) or (B, T)
    behavior_logprobs: Tensor | None = None,  # (N,) or (B, T)
    *,
    divergence: str = "forward",
    js_beta: float = 0.5,
    distill_temperature: float = 1.0,
    nll_coef: float = 0.0,
    bias: Tensor | None = None,  # (V,)
    cu_seqlens: Tensor | None = None,  # (S+1,)
    level: str = DEFAULTS.level,
    block_size: int = DEFAULTS.block_size,
    gamma: float = DEFAULTS.gamma,
    log_ratio_clip: tuple[float, float] = DEFAULTS.log_ratio_clip,
    log_weight_clip: tuple[float, float] = DEFAULTS.log_weight_clip,
    block_ids: Tensor | None = None,  # (N,) or (B, T)
    clip_blocks: bool = DEFAULTS.clip_blocks,
    center: bool = DEFAULTS.center,
    clip_length: int | None = DEFAULTS.clip_length,
    normalize: str | None = DEFAULTS.normalize,
    sequence_scale: Tensor | None = None,  # (S,)
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> LossOutput:
    """Distillation of an LM head with PEAR's weights, heads included, without ever holding the (N, V) logits of either.

        L = sum_t stop_gradient(G_t) * (D_t + nll_coef * -log pi(y_t | x, y_<t)) / divisor

    with D_t a divergence of the student's distribution p from the teacher's q:

    | divergence | D |
    | --- | --- |
    | "forward" | KL(q, p) = sum q log(q / p) |
    | "reverse" | KL(p, q) = sum p log(p / q) |
    | "js" | js_beta KL(q, m) + (1 - js_beta) KL(p, m), m = js_beta q + (1 - js_beta) p (GKD, arXiv 2306.13649) |

    Three matrix products with a trained head, two with a frozen one, one without gradients, and for a teacher in memory
    one of its own in each case, the least there can be. (At sequence level, with center or normalize: as
    `linear_pear_loss`.) Of both models a chunk of logits is held at a time.

    Args:
        hidden, weight, target, bias, cu_seqlens, sequence_scale, reduction, denominator, temperature, softcap,
            ignore_index, return_entropy, workspace_bytes, backend, group: see `linear_pear_loss`. (No sharded weight
            yet: an error. No return_entropy with a `TopKTeacher` either.)
        teacher: `Teacher(hidden, weight, bias, temperature, softcap)`, whose hidden states stand where the student's
            do, with a hidden size and a dtype of its own (one, but under autocast, which rounds its operands as the
            student's) and the student's vocabulary; or `TopKTeacher(ids, logprobs)`,
            its K most likely tokens at each position, with log-probs at distill_temperature, largest first. D then
            compares K + 1 outcomes, the last one being any other token (whose probability is at least the rounding of
            the log-probs' dtype). No gradient goes to a teacher.
        behavior_logprobs: as in `linear_pear_loss`; None: every G is 1.
        divergence: a row of the table.
        js_beta: the teacher's share of m, between 0 and 1.
        distill_temperature: divides the logits of both in D alone, on top of what either head does to its own. (There
            is no factor of its square.)
        nll_coef: how much of the NLL is added.
        level, block_size, gamma, log_ratio_clip, log_weight_clip, block_ids, clip_blocks, center, clip_length,
            normalize: see `pear_weights`.

    Returns:
        LossOutput. `weights` are G. `stats` begin with "divergence", the mean of D; the others are `objectives.STATS`
        with behavior_logprobs, else `weightings.WEIGHTED_STATS`.

    Raises:
        ValueError, TypeError, torch.OutOfMemoryError, RuntimeError: as `linear_pear_loss`.
    """
    checks.check_divergence_options(DivergenceOptions(divergence, js_beta, distill_temperature), DIVERGENCES, nll_coef)
    options = PEAROptions(
        level, block_size, gamma, log_ratio_clip, log_weight_clip, clip_blocks, center, clip_length, normalize
    )
    checks.check_options(options)
    checks.check_reduction(reduction, denominator)
    hidden, weight, target, bias, shared = local_head(hidden, weight, target, bias, group)
    refuse(shared, "linear_distill_loss")
    compute_dtype = checked_head(hidden, weight, target, bias, temperature, softcap, workspace_bytes, backend, shared)
    columns = {"behavior_logprobs": behavior_logprobs}
    checks.check_loss_arguments(hidden, target, columns, cu_seqlens, sequence_scale, denominator)
    checks.check_block_ids_kind(target, "target's shape", block_ids, level)
    if block_ids is not None and behavior_logprobs is None:
        raise ValueError(
            "block_ids is given, but behavior_logprobs is None: there are no log-ratios to put into blocks"
        )
    offline = (None, None)
    if isinstance(teacher, TopKTeacher):
        checks.check_top_k_teacher(hidden, target, teacher, weight.shape[0])
        if return_entropy:
            raise ValueError(
                "return_entropy does not work with a TopKTeacher, whose pass makes no entropy of the student: pass "
                "False, or take it from linear_logprobs(..., return_entropy=True)"
            )
        offline, teacher = tuple(part.detach().reshape(-1, part.shape[-1]) for part in teacher), None
    elif isinstance(teacher, Teacher):
        checks.check_teacher(hidden, weight, target, teacher, autocast_dtype)
    else:
        raise TypeError(f"teacher must be a pear_kernels.Teacher or TopKTeacher, got {type(teacher).__name__}")
    found = call(
        ops.linear_distill_loss,
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        target.reshape(-1),
        flat(behavior_logprobs),
        flat(block_ids),
        *flat_teacher(teacher),
        *offline,
        checks.sequence_bounds(target.shape, cu_seqlens, hidden.device),
        flat(sequence_scale),
        divisor(denominator, hidden.device),
        1.0 if teacher is None else teacher.temperature,
        None if teacher is None else teacher.softcap,
        divergence,
        js_beta,
        distill_temperature,
        nll_coef,
        *options.arguments(),
        reduction,
        temperature,
        softcap,
        ignore_index,
        workspace_bytes,
        backend,
        return_entropy,
        compute_dtype,
        wanted_gradients(hidden, weight, bias),
    )
    names = WEIGHTED_STATS if behavior_logprobs is None else STATS
    return loss_output(found, target, ("divergence", *names))
