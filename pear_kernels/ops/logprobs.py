"""The custom ops of `linear_logprobs`, forward and backward, and of `linear_topk_logprobs`."""

import torch
from torch import Tensor

from pear_kernels import checks
from pear_kernels.engine.walk import LogitsWalk
from pear_kernels.objectives.base import FixedCoefficients
from pear_kernels.ops.call import TAGS, Call, parse
from pear_kernels.sharding import sharded_topk


@torch.library.custom_op("pear_kernels::linear_logprobs", mutates_args=(), tags=TAGS)
def linear_logprobs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    numbers: Tensor,  # (k,) float64 on the CPU
    spec: str,  # `call.Spec`
    group: str | None,  # name of the process group whose ranks share the vocabulary
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs (N,), entropy (N,) or empty, numbers (k + 1,) for the backward pass: `Call.tokens_on_host` last)."""
    call = Call((hidden, weight, bias, target), numbers, spec, group)
    head = call.head(on_logits=False)
    with call.explain_out_of_memory("linear_logprobs", head):
        walk = call.walk(head, on_logits=False, entropy=call.given.return_entropy)
        walk.score_all(FixedCoefficients())
    entropy = hidden.new_empty(0, dtype=call.given.dtype) if walk.entropy is None else call.unpack(walk.entropy)
    return call.unpack(walk.logprobs), entropy, torch.cat([numbers, call.tokens_on_host().double()[None]])


@linear_logprobs.register_fake
def _(hidden, weight, bias, target, numbers, spec, group):
    given = parse(spec)
    shapes = target.shape, target.shape if given.return_entropy else (0,)
    counted = numbers.new_empty(len(numbers) + 1)
    return *(hidden.new_empty(shape, dtype=given.dtype) for shape in shapes), counted


@torch.library.custom_op("pear_kernels::linear_logprobs_backward", mutates_args=(), tags=TAGS)
def linear_logprobs_backward(
    grad_logprobs: Tensor | None,  # (N,)
    grad_entropy: Tensor | None,  # (N,)
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    numbers: Tensor,  # (k + 1,), of `linear_logprobs`
    spec: str,
    group: str | None,
    wanted: list[bool],  # gradients of hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db) in their tensors' dtypes, empty where not wanted: the logits made again, then two more products."""
    on_logits = grad_entropy is not None
    call = Call((hidden, weight, bias, target), numbers[:-1], spec, group, wanted, counted=numbers[-1])
    head = call.head(on_logits)
    known = [None if grad is None else call.pack.take(grad.to(head.dtype)) for grad in (grad_logprobs, grad_entropy)]
    nll = None if known[0] is None else -known[0]
    with call.explain_out_of_memory("the backward pass of linear_logprobs", head):
        walk = call.walk(head, on_logits, entropy=on_logits)
        walk.run(FixedCoefficients(nll, known[1]) if on_logits else FixedCoefficients(nll))
        grads = walk.grads
        return (
            grads.hidden.to(hidden.dtype),
            grads.weight.to(weight.dtype),
            grads.bias.to(weight.dtype if bias is None else bias.dtype),
        )


@linear_logprobs_backward.register_fake
def _(grad_logprobs, grad_entropy, hidden, weight, bias, target, numbers, spec, group, wanted):
    grad_hidden, grad_weight, grad_bias = wanted
    return (
        hidden.new_empty(hidden.shape if grad_hidden else (0,)),
        weight.new_empty(weight.shape if grad_weight else (0,)),
        (weight if bias is None else bias).new_empty(weight.shape[:1] if grad_bias else (0,)),
    )


def save(ctx, inputs, output):
    *tensors, _, spec, group = inputs
    ctx.spec, ctx.group = spec, group
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, output[2])


def backward(ctx, grad_logprobs, grad_entropy, _):
    checks.forbid_double_backward("linear_logprobs")
    if not parse(ctx.spec).return_entropy:
        grad_entropy = None
    wanted = list(ctx.needs_input_grad[:3])
    grads = None, None, None
    if grad_logprobs is not None or grad_entropy is not None:
        grads = linear_logprobs_backward(grad_logprobs, grad_entropy, *ctx.saved_tensors, ctx.spec, ctx.group, wanted)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None, None, None, None


linear_logprobs.register_autograd(backward, setup_context=save)


@torch.library.custom_op("pear_kernels::linear_topk_logprobs", mutates_args=(), tags=TAGS)
def linear_topk_logprobs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    k: int,
    numbers: Tensor,  # (k,) float64 on the CPU
    spec: str,  # `call.Spec`
    group: str | None,  # name of the process group whose ranks share the vocabulary
) -> tuple[Tensor, Tensor]:
    """(ids (N, k), logprobs (N, k)); at ignored tokens 0..k-1 and 0."""
    call = Call((hidden, weight, bias, target), numbers, spec, group)
    checks.check_k("k", k, call.vocabulary)
    head, pack, size = call.head(on_logits=True), call.pack, target.numel()
    if call.shard is not None:
        call.shard.plan(head)
    ids = torch.arange(k, device=target.device).repeat(size, 1)
    logprobs = torch.zeros(size, k, dtype=head.dtype, device=target.device)
    with call.explain_out_of_memory("linear_topk_logprobs", head):
        walk = LogitsWalk(hidden, head, target, pack, call.wanted, call.own.workspace_bytes)
        for _, chunks in walk.start().steps:
            for begin, end in chunks:
                x = walk.rows(begin, end)
                if call.shard is None:
                    top, where = head.log_softmax(x, 1.0).topk(k, dim=1)
                else:
                    top, where = sharded_topk(head, call.shard, x, k)
                index = pack.index[begin:end]
                if pack.counts is not None:
                    counts = pack.counts[begin:end, None]
                    where, top = torch.where(counts, where, ids[index]), torch.where(counts, top, 0.0)
                ids[index], logprobs[index] = where, top
    return ids, logprobs


@linear_topk_logprobs.register_fake
def _(hidden, weight, bias, target, k, numbers, spec, group):
    shape = *target.shape, k
    return hidden.new_empty(shape, dtype=torch.int64), hidden.new_empty(shape, dtype=parse(spec).dtype)
