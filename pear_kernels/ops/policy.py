"""The custom op of `linear_policy_loss`."""

import torch
from torch import Tensor

from pear_kernels import checks
from pear_kernels.backend import dense_head_class, head_class, weights_class
from pear_kernels.engine import DenseWalk, Walk
from pear_kernels.memory import explain_out_of_memory
from pear_kernels.ops.shared import checked_pack, loss_outputs, loss_results, register_loss_gradients
from pear_kernels.policy import POLICY_STATS, EntropyBonus, PolicyObjective, PolicyOptions, policy_scale
from pear_kernels.scalars import with_numbers, without_numbers
from pear_kernels.schedule import Wanted
from pear_kernels.shards import meet, sharded, whole_vocabulary


@torch.library.custom_op("pear_kernels::linear_policy_loss", mutates_args=())
@with_numbers
def linear_policy_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    old_logprobs: Tensor | None,  # (N,)
    advantages: Tensor,  # (S,) or (N,)
    cu_seqlens: Tensor,  # (S+1,)
    ref_logprobs: Tensor | None,  # (N,)
    sampler_logprobs: Tensor | None,  # (N,)
    sequence_scale: Tensor | None,  # (S,)
    denominator: Tensor | None,  # ()
    by_sequence: bool,  # advantages are (S,)
    objective: str,
    beta: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    sapo_temperatures: list[float],
    sampler_clip: float | None,
    sampler_level: str,
    entropy_coef: float,
    max_length: int | None,
    unbiased_kl: bool,
    reduction: str | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    workspace_bytes: int | None,
    backend: str | None,
    group: str | None,  # the name of the one that shares the vocabulary
    compute_dtype: torch.dtype,
    wanted: list[bool],  # gradients of hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logprobs (N,), weights (N,), stats (12,), dX, dW, db); the last three are empty where not wanted."""
    columns = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "sampler_logprobs": sampler_logprobs}
    shard = meet(group, hidden, weight, target, wanted, workspace_bytes)
    vocabulary = whole_vocabulary(weight, shard)
    pack = checked_pack(target, cu_seqlens, vocabulary, ignore_index, columns, sequence_scale, denominator)
    checks.check_advantages(advantages, None if by_sequence else target != ignore_index)
    bonus = entropy_coef != 0 and any(wanted)
    of_backend = (dense_head_class if bonus else head_class)(backend, hidden.device, compute_dtype)
    head = sharded(of_backend(weight, bias, temperature, softcap, compute_dtype), shard, temperature, softcap)
    options = PolicyOptions(
        objective, beta, clip_low, clip_high, dual_clip, tuple(sapo_temperatures), sampler_clip, sampler_level,
        entropy_coef, max_length, unbiased_kl,
    )  # fmt: skip
    policy = PolicyObjective(
        pack,
        options,
        advantages[pack.sequence] if by_sequence else pack.take(advantages),
        *(column if column is None else pack.take(column) for column in columns.values()),
        policy_scale(pack, cu_seqlens, options, reduction, denominator, sequence_scale),
        one_advantage=by_sequence,
        dtype=head.dtype,
        weights=weights_class(backend, hidden.device, compute_dtype),
    )
    with explain_out_of_memory("linear_policy_loss", hidden, head, Wanted(*wanted), workspace_bytes):
        kind = DenseWalk if bonus else Walk
        walk = kind(hidden, head, target, pack, Wanted(*wanted), workspace_bytes, entropy=True)
        walk.run(EntropyBonus(policy) if bonus else policy)
    return loss_results(walk, *policy.finish(walk.entropy), target.numel())


@linear_policy_loss.register_fake
@without_numbers
def _(hidden, weight, bias, target, *options):
    return loss_outputs(hidden, weight, target, len(POLICY_STATS), False, *options[-2:])


register_loss_gradients(linear_policy_loss)
