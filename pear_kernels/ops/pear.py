"""The custom op of `linear_pear_loss`."""

import torch
from torch import Tensor

from pear_kernels.backend import head_class, objective_class, weights_class
from pear_kernels.blocks import checked_ids
from pear_kernels.engine import Walk
from pear_kernels.memory import explain_out_of_memory
from pear_kernels.negatives import WRONG_STATS, LabelledObjective
from pear_kernels.objectives import STATS, token_scale
from pear_kernels.ops.shared import checked_pack, loss_outputs, loss_results, register_loss_gradients
from pear_kernels.scalars import with_numbers, without_numbers
from pear_kernels.schedule import Wanted
from pear_kernels.shards import meet, sharded, whole_vocabulary
from pear_kernels.weights import PEAROptions


@torch.library.custom_op("pear_kernels::linear_pear_loss", mutates_args=())
@with_numbers
def linear_pear_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    sequence_label: Tensor | None,  # (S,)
    behavior_logprobs: Tensor,  # (N,)
    block_ids: Tensor | None,  # (N,)
    cu_seqlens: Tensor,  # (S+1,)
    sequence_scale: Tensor | None,  # (S,)
    denominator: Tensor | None,  # ()
    negative_lambda: float,
    logprob_floor: float,
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
    group: str | None,  # the name of the one that shares the vocabulary
    return_entropy: bool,  # in the statistics
    compute_dtype: torch.dtype,
    wanted: list[bool],  # gradients of hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logprobs (N,), weights (N,), stats, dX, dW, db); the last three are empty where not wanted.

    9 statistics, or 13 with labels, and `OF_ALL`.
    """
    shard = meet(group, hidden, weight, target, wanted, workspace_bytes)
    columns = {"behavior_logprobs": behavior_logprobs}
    pack = checked_pack(
        target, cu_seqlens, whole_vocabulary(weight, shard), ignore_index, columns, sequence_scale, denominator,
        block_ids,
    )  # fmt: skip
    ids = checked_ids(pack, block_ids)
    of_head = head_class(backend, hidden.device, compute_dtype)
    head = sharded(of_head(weight, bias, temperature, softcap, compute_dtype), shard, temperature, softcap)
    options = PEAROptions(
        level, block_size, gamma, log_ratio_clip, log_weight_clip, clip_blocks, center, clip_length, normalize
    )
    behavior = pack.take(behavior_logprobs)
    if sequence_label is None:
        of_backend = objective_class(backend, hidden.device, compute_dtype)
        objective = of_backend(behavior, pack, options, reduction, denominator, sequence_scale, block_ids=ids)
    else:
        objective = LabelledObjective(
            behavior, pack, options, token_scale(pack, reduction, denominator, sequence_scale), sequence_label,
            negative_lambda, logprob_floor, weights_class(backend, hidden.device, compute_dtype), ids,
        )  # fmt: skip
    with explain_out_of_memory("linear_pear_loss", hidden, head, Wanted(*wanted), workspace_bytes):
        walk = Walk(hidden, head, target, pack, Wanted(*wanted), workspace_bytes, entropy=return_entropy)
        walk.run(objective)
    right = None if sequence_label is None else objective.right
    return loss_results(walk, *objective.finish(walk.logprobs), target.numel(), return_entropy, right)


@linear_pear_loss.register_fake
@without_numbers
def _(hidden, weight, bias, target, sequence_label, *options):
    stats = len(STATS) + (0 if sequence_label is None else len(WRONG_STATS))
    return loss_outputs(hidden, weight, target, stats, *options[-3:])


register_loss_gradients(linear_pear_loss)
