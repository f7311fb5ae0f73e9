"""The custom ops of `linear_logprobs`, forward and backward, and of `linear_topk_logprobs`."""

import torch
from torch import Tensor

from pear_kernels import checks
from pear_kernels.backend import dense_head_class, head_class
from pear_kernels.engine import DenseWalk, Walk
from pear_kernels.memory import explain_out_of_memory
from pear_kernels.objectives import FixedCoefficients
from pear_kernels.ops.shared import forbid_double_backward, one_sequence, result_dtype
from pear_kernels.packing import pack_tokens, unpack
from pear_kernels.scalars import with_numbers, without_numbers
from pear_kernels.schedule import Wanted
from pear_kernels.shards import meet, sharded, sharded_topk, whole_vocabulary


@torch.library.custom_op("pear_kernels::linear_logprobs", mutates_args=())
@with_numbers
def linear_logprobs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    return_entropy: bool,
    workspace_bytes: int | None,
    backend: str | None,
    group: str | None,  # the name of the one that shares the vocabulary
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(logprobs (N,), entropy (N,) or empty)."""
    size = target.numel()
    valid = target != ignore_index
    shard = meet(group, hidden, weight, target, workspace_bytes=workspace_bytes)
    checks.check_target(target, valid, whole_vocabulary(weight, shard), ignore_index)
    pack = pack_tokens(valid, one_sequence(target))
    of_backend = head_class(backend, hidden.device, compute_dtype)
    head = sharded(of_backend(weight, bias, temperature, softcap, compute_dtype), shard, temperature, softcap)
    nothing = Wanted(False, False, False)
    with explain_out_of_memory("linear_logprobs", hidden, head, nothing, workspace_bytes):
        walk = Walk(hidden, head, target, pack, nothing, workspace_bytes, entropy=return_entropy)
        walk.score_all(FixedCoefficients())
    entropy = unpack(walk.entropy, pack, size) if return_entropy else walk.logprobs.new_empty(0)
    return unpack(walk.logprobs, pack, size).to(head.dtype), entropy.to(head.dtype)


@linear_logprobs.register_fake
@without_numbers
def _(hidden, weight, bias, target, temperature, softcap, ignore_index, return_entropy, *options):
    dtype = result_dtype(options[-1])
    return (
        hidden.new_empty(target.shape, dtype=dtype),
        hidden.new_empty(target.shape if return_entropy else (0,), dtype=dtype),
    )


@torch.library.custom_op("pear_kernels::linear_logprobs_backward", mutates_args=())
@with_numbers
def linear_logprobs_backward(
    grad_logprobs: Tensor | None,  # (N,)
    grad_entropy: Tensor | None,  # (N,)
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    workspace_bytes: int | None,
    backend: str | None,
    group: str | None,  # the name of the one that shares the vocabulary
    compute_dtype: torch.dtype,
    wanted: list[bool],  # gradients of hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db) in their tensors' dtypes, empty where not wanted: the logits made again, then two more products."""
    pack = pack_tokens(target != ignore_index, one_sequence(target))
    dense = grad_entropy is not None
    of_backend = (dense_head_class if dense else head_class)(backend, hidden.device, compute_dtype)
    shard = meet(group, hidden, weight, target, wanted, workspace_bytes)
    head = sharded(of_backend(weight, bias, temperature, softcap, compute_dtype), shard, temperature, softcap)
    known = [None if grad is None else pack.take(grad.to(head.dtype)) for grad in (grad_logprobs, grad_entropy)]
    of_nll = None if known[0] is None else -known[0]
    with explain_out_of_memory("the backward pass of linear_logprobs", hidden, head, Wanted(*wanted), workspace_bytes):
        kind = DenseWalk if dense else Walk
        walk = kind(hidden, head, target, pack, Wanted(*wanted), workspace_bytes, entropy=dense)
        walk.run(FixedCoefficients(of_nll, known[1]) if dense else FixedCoefficients(of_nll))
        grads = walk.grads
        return (
            grads.hidden.to(hidden.dtype),
            grads.weight.to(weight.dtype),
            grads.bias.to(weight.dtype if bias is None else bias.dtype),
        )


@linear_logprobs_backward.register_fake
@without_numbers
def _(grad_logprobs, grad_entropy, hidden, weight, bias, target, *options):
    grad_hidden, grad_weight, grad_bias = options[-1]
    return (
        hidden.new_empty(hidden.shape if grad_hidden else (0,)),
        weight.new_empty(weight.shape if grad_weight else (0,)),
        (weight if bias is None else bias).new_empty(weight.shape[:1] if grad_bias else (0,)),
    )


def _save_logprobs_inputs(ctx, inputs, output):
    *inputs_of_op, numbers, places = inputs
    ctx.return_entropy = inputs_of_op[7]
    ctx.options = *inputs_of_op[4:7], *inputs_of_op[8:]
    ctx.places = [place + 2 if i % 2 == 0 else place for i, place in enumerate(places)]  # behind two gradients
    ctx.inputs = len(inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs_of_op[:4], numbers)


def _logprobs_backward(ctx, grad_logprobs, grad_entropy):
    forbid_double_backward("linear_logprobs")
    if not ctx.return_entropy:
        grad_entropy = None
    wanted = ctx.needs_input_grad[:3]
    if grad_logprobs is None and grad_entropy is None:
        grads = None, None, None
    else:
        *tensors, numbers = ctx.saved_tensors
        grads = linear_logprobs_backward(
            grad_logprobs, grad_entropy, *tensors, *ctx.options, list(wanted), numbers, ctx.places
        )
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *[None] * (ctx.inputs - 3)


linear_logprobs.register_autograd(_logprobs_backward, setup_context=_save_logprobs_inputs)


@torch.library.custom_op("pear_kernels::linear_topk_logprobs", mutates_args=())
@with_numbers
def linear_topk_logprobs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    k: int,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    workspace_bytes: int | None,
    backend: str | None,
    group: str | None,  # the name of the one that shares the vocabulary
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(ids (N, k), logprobs (N, k)); at ignored tokens 0..k-1 and 0."""
    shard = meet(group, hidden, weight, target, workspace_bytes=workspace_bytes)
    checks.check_target(target, target != ignore_index, whole_vocabulary(weight, shard), ignore_index)
    checks.check_k("k", k, whole_vocabulary(weight, shard))
    pack = pack_tokens(target != ignore_index, one_sequence(target))
    head = dense_head_class(backend, hidden.device, compute_dtype)(weight, bias, temperature, softcap, compute_dtype)
    if shard is not None:
        shard.plan(head)
    nothing, size = Wanted(False, False, False), target.numel()
    ids = torch.arange(k, device=target.device).repeat(size, 1)
    logprobs = torch.zeros(size, k, dtype=head.dtype, device=target.device)
    with explain_out_of_memory("linear_topk_logprobs", hidden, head, nothing, workspace_bytes):
        walk = DenseWalk(hidden, head, target, pack, nothing, workspace_bytes)
        for _, chunks in walk.start().steps:
            for begin, end in chunks:
                x = walk.rows(begin, end)
                if shard is None:
                    top, where = head.log_softmax(x, 1.0).topk(k, dim=1)
                else:
                    top, where = sharded_topk(head, shard, x, k)
                index = pack.index[begin:end]
                if pack.counts is None:
                    ids[index], logprobs[index] = where, top
                else:
                    counts = pack.counts[begin:end, None]
                    ids[index] = torch.where(counts, where, ids[index])
                    logprobs[index] = torch.where(counts, top, 0.0)
    return ids, logprobs


@linear_topk_logprobs.register_fake
@without_numbers
def _(hidden, weight, bias, target, k, *options):
    shape = *target.shape, k
    return hidden.new_empty(shape, dtype=torch.int64), hidden.new_empty(shape, dtype=result_dtype(options[-1]))
