"""The custom op of `linear_distill_loss`."""

import torch
from torch import Tensor

from pear_kernels import checks
from pear_kernels.backend import dense_head_class, objective_class
from pear_kernels.blocks import checked_ids
from pear_kernels.distill import DistillObjective, LoadedTeacher, OfflineTeacher
from pear_kernels.divergence import DivergenceOptions
from pear_kernels.engine import DenseWalk, Objective
from pear_kernels.head import DenseHead
from pear_kernels.memory import explain_out_of_memory
from pear_kernels.objectives import STATS, token_scale
from pear_kernels.ops.shared import checked_pack, loss_outputs, loss_results, register_loss_gradients
from pear_kernels.packing import Pack
from pear_kernels.scalars import with_numbers, without_numbers
from pear_kernels.schedule import Wanted
from pear_kernels.weightings import WEIGHTED_STATS, WEIGHTINGS, WeightedObjective
from pear_kernels.weights import PEAROptions


def loaded_teacher(
    student: DenseHead,
    pack: Pack,
    options: DivergenceOptions,
    hidden: Tensor,  # (N, D')
    weight: Tensor,  # (V, D')
    bias: Tensor | None,  # (V,)
    temperature: float,
    softcap: float | None,
) -> LoadedTeacher:
    """A teacher on the student's backend, with a head of its own: as exact as the student's, and no more."""
    dtype = torch.float32 if hidden.dtype == torch.float64 else hidden.dtype
    dtype = torch.float64 if student.dtype == torch.float64 else dtype
    return LoadedTeacher(hidden, type(student)(weight, bias, temperature, softcap, dtype), pack, options)


@torch.library.custom_op("pear_kernels::linear_distill_loss", mutates_args=())
@with_numbers
def linear_distill_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    behavior_logprobs: Tensor | None,  # (N,)
    block_ids: Tensor | None,  # (N,)
    teacher_hidden: Tensor | None,  # (N, D'), of a teacher in memory
    teacher_weight: Tensor | None,  # (V, D')
    teacher_bias: Tensor | None,  # (V,)
    teacher_ids: Tensor | None,  # (N, K), of an offline one
    teacher_logprobs: Tensor | None,  # (N, K)
    cu_seqlens: Tensor,  # (S+1,)
    sequence_scale: Tensor | None,  # (S,)
    denominator: Tensor | None,  # ()
    teacher_temperature: float,
    teacher_softcap: float | None,
    divergence: str,
    js_beta: float,
    distill_temperature: float,
    nll_coef: float,
    level: str,
    block_size: int,
    gamma: float,
    log_ratio_clip: list[float],
    log_weight_clip: list[float],
    clip_blocks: bool,
    center: bool,
    clip_length: int | None,
    normalize: str | None,
    reduction: str,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    workspace_bytes: int | None,
    backend: str | None,
    return_entropy: bool,  # in the statistics
    compute_dtype: torch.dtype,
    wanted: list[bool],  # gradients of hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logprobs (N,), weights (N,), stats, dX, dW, db); the last three are empty where not wanted.

    The statistics are the mean divergence, those of the weights (9, or 7 without behaviour log-probs) and `OF_ALL`.
    """
    columns = {"behavior_logprobs": behavior_logprobs}
    pack = checked_pack(
        target, cu_seqlens, weight.shape[0], ignore_index, columns, sequence_scale, denominator, block_ids
    )
    ids = checked_ids(pack, block_ids)
    dense_head = dense_head_class(backend, hidden.device, compute_dtype)
    head = dense_head(weight, bias, temperature, softcap, compute_dtype)
    options = DivergenceOptions(divergence, js_beta, distill_temperature)
    if teacher_hidden is not None:
        of_teacher = teacher_hidden, teacher_weight, teacher_bias, teacher_temperature, teacher_softcap
        teacher = loaded_teacher(head, pack, options, *of_teacher)
    else:
        checks.check_top_k(teacher_ids, teacher_logprobs, target != ignore_index, weight.shape[0])
        teacher = OfflineTeacher(teacher_ids, teacher_logprobs, pack, options)
    if behavior_logprobs is None:
        scale = token_scale(pack, reduction, denominator, sequence_scale)
        of_weights: Objective = WeightedObjective(pack, WEIGHTINGS["none"], scale)
    else:
        pear = PEAROptions(
            level, block_size, gamma, log_ratio_clip, log_weight_clip, clip_blocks, center, clip_length, normalize
        )
        of_backend = objective_class(backend, hidden.device, compute_dtype)
        behavior = pack.take(behavior_logprobs)
        of_weights = of_backend(behavior, pack, pear, reduction, denominator, sequence_scale, block_ids=ids)
    objective = DistillObjective(of_weights, nll_coef)
    with explain_out_of_memory("linear_distill_loss", hidden, head, Wanted(*wanted), workspace_bytes):
        walk = DenseWalk(
            hidden, head, target, pack, Wanted(*wanted), workspace_bytes, teacher=teacher, entropy=return_entropy
        )
        walk.run(objective)
    return loss_results(walk, *objective.finish(walk.logprobs, walk.divergence), target.numel(), return_entropy)


@linear_distill_loss.register_fake
@without_numbers
def _(hidden, weight, bias, target, behavior_logprobs, *options):
    stats = 1 + len(WEIGHTED_STATS if behavior_logprobs is None else STATS)
    return loss_outputs(hidden, weight, target, stats, *options[-3:])


register_loss_gradients(linear_distill_loss)
