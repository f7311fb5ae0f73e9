"""The custom ops of `linear_logprobs`, forward and backward, and of `linear_topk_logprobs`."""

import torch
from torch import Tensor

from pear_kernels import checks
from pear_kernels.checks import forbid_double_backward
from pear_kernels.engine.memory import explain_out_of_memory
from pear_kernels.engine.packing import pack_tokens, unpack
from pear_kernels.engine.schedule import Wanted
from pear_kernels.engine.walk import LogitsWalk, Walk
from pear_kernels.objectives.base import FixedCoefficients
from pear_kernels.ops import backends
from pear_kernels.ops.arguments import parse
from pear_kernels.options import CallOptions, HeadOptions
from pear_kernels.sharding import meet, sharded, sharded_topk, whole_vocabulary

NOTHING = Wanted(False, False, False)


@torch.library.custom_op("pear_kernels::linear_logprobs", mutates_args=())
def linear_logprobs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    numbers: Tensor,  # (k,) float64 on the CPU
    spec: str,  # `arguments.Spec`
    group: str | None,  # name of the process group whose ranks share the vocabulary
) -> tuple[Tensor, Tensor]:
    """(logprobs (N,), entropy (N,) or empty)."""
    given, size = parse(spec), target.numel()
    options = given.decode(numbers)
    own = options[HeadOptions]
    shard = meet(group, hidden, weight, target, workspace_bytes=own.workspace_bytes)
    valid = target != own.ignore_index
    backend = backends.choose(own.backend, hidden.device, given.compute_dtype)
    backend.check_values({"target": target}, valid, whole_vocabulary(weight, shard), own.ignore_index)
    checks.check_valid_tokens(options[CallOptions].valid_tokens, valid)
    pack = pack_tokens(valid, one_sequence(target), tokens=options[CallOptions].valid_tokens)
    own_head = backend.head(weight, bias, own.temperature, own.softcap, given.compute_dtype)
    head = sharded(own_head, shard, own.temperature, own.softcap)
    with explain_out_of_memory("linear_logprobs", hidden, head, NOTHING, own.workspace_bytes):
        walk = Walk(hidden, head, target, pack, NOTHING, own.workspace_bytes, entropy=given.return_entropy)
        walk.score_all(FixedCoefficients())
    entropy = walk.logprobs.new_empty(0) if walk.entropy is None else unpack(walk.entropy, pack, size)
    return unpack(walk.logprobs, pack, size).to(head.dtype), entropy.to(head.dtype)


@linear_logprobs.register_fake
def _(hidden, weight, bias, target, numbers, spec, group):
    given = parse(spec)
    shapes = target.shape, target.shape if given.return_entropy else (0,)
    return tuple(hidden.new_empty(shape, dtype=given.dtype) for shape in shapes)


@torch.library.custom_op("pear_kernels::linear_logprobs_backward", mutates_args=())
def linear_logprobs_backward(
    grad_logprobs: Tensor | None,  # (N,)
    grad_entropy: Tensor | None,  # (N,)
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    numbers: Tensor,
    spec: str,
    group: str | None,
    wanted: list[bool],  # gradients of hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db) in their tensors' dtypes, empty where not wanted: the logits made again, then two more products."""
    given = parse(spec)
    options = given.decode(numbers)
    own, gradients = options[HeadOptions], Wanted(*wanted)
    valid_tokens = options[CallOptions].valid_tokens
    pack = pack_tokens(target != own.ignore_index, one_sequence(target), tokens=valid_tokens)
    on_logits = grad_entropy is not None
    backend = backends.choose(own.backend, hidden.device, given.compute_dtype)
    shard = meet(group, hidden, weight, target, wanted, own.workspace_bytes)
    make_head = backend.logits_head if on_logits else backend.head
    own_head = make_head(weight, bias, own.temperature, own.softcap, given.compute_dtype)
    head = sharded(own_head, shard, own.temperature, own.softcap)
    known = [None if grad is None else pack.take(grad.to(head.dtype)) for grad in (grad_logprobs, grad_entropy)]
    nll = None if known[0] is None else -known[0]
    with explain_out_of_memory("the backward pass of linear_logprobs", hidden, head, gradients, own.workspace_bytes):
        kind = LogitsWalk if on_logits else Walk
        walk = kind(hidden, head, target, pack, gradients, own.workspace_bytes, entropy=on_logits)
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
    *tensors, spec, group = inputs
    ctx.spec, ctx.group = spec, group
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def backward(ctx, grad_logprobs, grad_entropy):
    forbid_double_backward("linear_logprobs")
    if not parse(ctx.spec).return_entropy:
        grad_entropy = None
    wanted = list(ctx.needs_input_grad[:3])
    grads = None, None, None
    if grad_logprobs is not None or grad_entropy is not None:
        grads = linear_logprobs_backward(grad_logprobs, grad_entropy, *ctx.saved_tensors, ctx.spec, ctx.group, wanted)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None, None, None, None


linear_logprobs.register_autograd(backward, setup_context=save)


@torch.library.custom_op("pear_kernels::linear_topk_logprobs", mutates_args=())
def linear_topk_logprobs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    k: int,
    numbers: Tensor,  # (k,) float64 on the CPU
    spec: str,  # `arguments.Spec`
    group: str | None,  # name of the process group whose ranks share the vocabulary
) -> tuple[Tensor, Tensor]:
    """(ids (N, k), logprobs (N, k)); at ignored tokens 0..k-1 and 0."""
    given = parse(spec)
    options = given.decode(numbers)
    own = options[HeadOptions]
    shard = meet(group, hidden, weight, target, workspace_bytes=own.workspace_bytes)
    vocabulary, valid = whole_vocabulary(weight, shard), target != own.ignore_index
    backend = backends.choose(own.backend, hidden.device, given.compute_dtype)
    backend.check_values({"target": target}, valid, vocabulary, own.ignore_index)
    checks.check_k("k", k, vocabulary)
    checks.check_valid_tokens(options[CallOptions].valid_tokens, valid)
    pack = pack_tokens(valid, one_sequence(target), tokens=options[CallOptions].valid_tokens)
    head = backend.logits_head(weight, bias, own.temperature, own.softcap, given.compute_dtype)
    if shard is not None:
        shard.plan(head)
    size = target.numel()
    ids = torch.arange(k, device=target.device).repeat(size, 1)
    logprobs = torch.zeros(size, k, dtype=head.dtype, device=target.device)
    with explain_out_of_memory("linear_topk_logprobs", hidden, head, NOTHING, own.workspace_bytes):
        walk = LogitsWalk(hidden, head, target, pack, NOTHING, own.workspace_bytes)
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
def _(hidden, weight, bias, target, k, numbers, spec, group):
    shape = *target.shape, k
    return hidden.new_empty(shape, dtype=torch.int64), hidden.new_empty(shape, dtype=parse(spec).dtype)


def one_sequence(target: Tensor) -> Tensor:
    """(2,) int64: the bounds of (N,) tokens as one sequence."""
    return torch.arange(2, device=target.device) * target.numel()
