"""The custom op of `linear_weighted_loss`."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from pear_kernels import checks
from pear_kernels.backend import dense_head_class, head_class, weights_class
from pear_kernels.distill import AnchoredObjective
from pear_kernels.divergence import DivergenceOptions
from pear_kernels.engine import DenseWalk, Walk
from pear_kernels.memory import explain_out_of_memory
from pear_kernels.objectives import token_scale
from pear_kernels.ops.distill import loaded_teacher
from pear_kernels.ops.shared import checked_pack, loss_outputs, loss_results, register_loss_gradients
from pear_kernels.scalars import with_numbers, without_numbers
from pear_kernels.schedule import Wanted
from pear_kernels.shards import meet, sharded, whole_vocabulary
from pear_kernels.weightings import WEIGHTED_STATS, WEIGHTINGS, Tokens, WeightedObjective, WeightingOptions, by

# functions of log-probs, which no op can take, by the number that stands for each while its call runs
functions: dict[int, Callable[[Tokens], Tensor]] = {}
function_keys = itertools.count()


@torch.library.custom_op("pear_kernels::linear_weighted_loss", mutates_args=())
@with_numbers
def linear_weighted_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    weights: Tensor | None,  # (N,)
    weighting: str | None,
    function: int | None,  # a key of `functions`
    ref_logprobs: Tensor | None,  # (N,)
    ref_hidden: Tensor | None,  # (N, D'), of "asft" with the initial model in memory
    ref_weight: Tensor | None,  # (V, D')
    ref_bias: Tensor | None,  # (V,)
    cu_seqlens: Tensor,  # (S+1,)
    sequence_scale: Tensor | None,  # (S,)
    denominator: Tensor | None,  # ()
    ref_temperature: float,
    ref_softcap: float | None,
    iw_tau: float,
    iw_max: float,
    psft_clip: float,
    asft_kl: float,
    idft_clip: list[float],
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
    """(loss, logprobs (N,), weights (N,), stats, dX, dW, db); the last three are empty where not wanted."""
    columns = {"ref_logprobs": ref_logprobs}
    shard = meet(group, hidden, weight, target, wanted, workspace_bytes)
    vocabulary = whole_vocabulary(weight, shard)
    pack = checked_pack(target, cu_seqlens, vocabulary, ignore_index, columns, sequence_scale, denominator)
    anchored = ref_hidden is not None
    of_backend = (dense_head_class if anchored else head_class)(backend, hidden.device, compute_dtype)
    head = sharded(of_backend(weight, bias, temperature, softcap, compute_dtype), shard, temperature, softcap)
    if weights is not None:
        valid = target != ignore_index
        checks.check_weights(weights, valid)
        known = weights.double().where(valid, 0.0)
        chosen = by(lambda tokens: known[tokens.index])
    elif function is not None:
        chosen = by(functions[function])
    else:
        chosen = WEIGHTINGS["dft" if anchored else weighting]
    objective = WeightedObjective(
        pack,
        chosen,
        token_scale(pack, reduction, denominator, sequence_scale),
        None if ref_logprobs is None else pack.take(ref_logprobs),
        WeightingOptions(iw_tau, iw_max, psft_clip, asft_kl, tuple(idft_clip)),
        weights_class(backend, hidden.device, compute_dtype),
    )
    with explain_out_of_memory("linear_weighted_loss", hidden, head, Wanted(*wanted), workspace_bytes):
        if anchored:
            of_ref = ref_hidden, ref_weight, ref_bias, ref_temperature, ref_softcap
            teacher = loaded_teacher(head, pack, DivergenceOptions("forward"), *of_ref)
            anchor = AnchoredObjective(objective, asft_kl)
            walk = DenseWalk(
                hidden, head, target, pack, Wanted(*wanted), workspace_bytes, teacher=teacher, entropy=return_entropy
            )
            walk.run(anchor)
            found = anchor.finish(walk.logprobs, walk.divergence)
        else:
            entropy = return_entropy or chosen.needs_entropy
            walk = Walk(hidden, head, target, pack, Wanted(*wanted), workspace_bytes, entropy=entropy)
            walk.run(objective)
            found = objective.finish(walk.logprobs)
    return loss_results(walk, *found, target.numel(), return_entropy)


@linear_weighted_loss.register_fake
@without_numbers
def _(hidden, weight, bias, target, *options):
    return loss_outputs(hidden, weight, target, len(WEIGHTED_STATS), *options[-3:])


register_loss_gradients(linear_weighted_loss)
