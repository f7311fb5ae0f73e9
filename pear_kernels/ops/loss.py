"""The custom op of all losses: what autograd and `torch.compile` see of the engine, with its shapes and gradients."""

from typing import Any

import torch
from torch import Tensor

from pear_kernels.checks import forbid_double_backward
from pear_kernels.engine.walk import Walk, grad_hidden_dtype
from pear_kernels.objectives import LOSSES
from pear_kernels.objectives.base import Problem
from pear_kernels.objectives.teachers import teacher_of
from pear_kernels.ops import backends
from pear_kernels.ops.call import TAGS, Call, parse
from pear_kernels.sharding import Shard, gather


def compute(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D), or (V_r, D) with a group
    bias: Tensor | None,  # (V,) or (V_r,)
    target: Tensor,  # (N,)
    columns: list[Tensor],  # (N,), (S,), (S+1,) or (), by their names in spec
    numbers: Tensor,  # (k,) float64 on the CPU
    spec: str,  # `call.Spec`
    group: str | None,  # name of the process group whose ranks share the vocabulary
    wanted: list[bool],  # gradients of hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logprobs (N,), weights (N,), stats, dX, dW, db); the last three are empty where not wanted."""
    call = Call((hidden, weight, bias, target), numbers, spec, group, wanted, columns)
    given, loss = call.given, LOSSES[call.given.name]
    problem = Problem(call.pack, call.options, call.columns, call.backend.weights, given.dtype)
    objective = loss.objective(problem)
    # only a gradient or a teacher needs the logits to stay
    on_logits = objective.on_logits and (any(wanted) or any(name.startswith("teacher_") for name in given.columns))
    head = call.head(on_logits)
    with call.explain_out_of_memory(given.name, head):
        entropy = given.return_entropy or objective.needs_entropy
        walk = call.walk(head, on_logits, entropy, teacher_of(problem, head) if on_logits else None)
        walk.run(objective)
    logprobs = call.unpack(walk.logprobs)  # before `finish`, which may be the caller's and overwrite its arguments
    total, weights, stats = objective.finish(walk.logprobs, walk.entropy, walk.divergence)
    by = f"{type(objective).__name__}.finish must return"
    if len(stats) != len(names := loss.stats(given.columns)):
        raise ValueError(f"{by} one statistic for each of {names}, got {len(stats)}")
    if total.shape != () or weights.shape != walk.logprobs.shape:
        raise ValueError(
            f"{by} a loss of shape () and weights of shape {tuple(walk.logprobs.shape)}, got {tuple(total.shape)} and "
            f"{tuple(weights.shape)}"
        )
    sums, tokens = sums_of_all(walk, given.return_entropy, objective._averaged)
    all_stats = sums.new_empty(len(stats) + len(sums), dtype=given.dtype)
    all_stats[: len(stats)] = stats
    torch.div(sums, tokens, out=all_stats[len(stats) :])
    if given.leaves_out:
        all_stats = torch.cat([all_stats, left_out(walk, call.shard).to(given.dtype)])
    # the loss is never a view, to which a caller could add nothing in place
    return (
        total.to(given.dtype, copy=True), logprobs, call.unpack(weights), all_stats,
        walk.grads.hidden, walk.grads.weight, walk.grads.bias,
    )  # fmt: skip


def sums_of_all(walk: Walk, return_entropy: bool, among: Tensor | None) -> tuple[Tensor, Tensor | int]:
    """Sums (1 or 2,) float64 of `OF_ALL` over the tokens that count, or those `among` (n,) bool them, and how many."""
    rows = [walk.top1, walk.entropy] if return_entropy and walk.entropy is not None else [walk.top1]
    of_all = torch.stack(rows) if len(rows) > 1 else walk.top1[None]
    if among is None and walk.pack.counts is None:
        return of_all.sum(1), max(walk.pack.tokens, 1)
    counted = walk.pack.zero_ghosts(torch.ones_like(walk.logprobs))
    counted = counted if among is None else counted * among
    # a ghost's entropy may be anything
    return torch.where(counted > 0, of_all, 0.0).sum(1), counted.sum().clamp(min=1)


def left_out(walk: Walk, shard: Shard | None) -> Tensor:
    """(2,) float64 `OF_GRADIENT`, of the whole head."""
    if walk.sparsifier is None:
        return walk.logprobs.new_zeros(2)
    counts = walk.sparsifier.counts(walk.logprobs.device)
    counts = counts if shard is None else gather(shard.group, counts).sum(0)
    done, total = counts[::2], counts[1::2]
    return torch.where(total == 0, 0.0, done / total)


def fake(hidden, weight, bias, target, columns, numbers, spec, group, wanted):
    """The shapes and dtypes of what `compute` returns."""
    given = parse(spec)
    stats = len(LOSSES[given.name].all_stats(given.columns, given.return_entropy, given.leaves_out))
    shapes = (), target.shape, target.shape, (stats,)
    grads = hidden.shape, weight.shape, weight.shape[:1]
    dtypes = grad_hidden_dtype(hidden.dtype), given.dtype, given.dtype
    return (
        *(hidden.new_empty(shape, dtype=given.dtype) for shape in shapes),
        *(
            hidden.new_empty(shape if want else (0,), dtype=dtype)
            for shape, dtype, want in zip(grads, dtypes, wanted, strict=True)
        ),
    )


class LossFunction(torch.autograd.Function):
    """All gradients are made in the op; the backward pass scales them."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
        hidden, weight, bias, *_, spec, _, wanted = arguments
        with torch._C._AutoDispatchBelowAutograd():
            found = linear_loss.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
        ctx.spec, ctx.wanted = spec, wanted
        ctx.dtypes = hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype
        ctx.shared = not torch.compiler.is_compiling() and torch._C._autograd._top_saved_tensors_default_hooks(True)
        ctx.mark_non_differentiable(*found[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*found[4:])
        return found

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        given = parse(ctx.spec)
        forbid_double_backward(given.name)
        grads = [
            scaled(gradient, upstream, dtype, given.backend, ctx.shared) if wanted and upstream is not None else None
            for gradient, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
        ]
        return None, *grads, *[None] * 6


def autograd(keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in arguments[:3]):
        return LossFunction.apply(keyset, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return linear_loss.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


# Not by torch.library.custom_op: its autograd flattens and unflattens a list of tensors in both passes, which takes as
# long as all else of a call's way to `compute` (docs/kernels.md has the figures). The columns have no gradient.
if (before := vars(torch.ops.pear_kernels).get("library")) is not None:  # the package is imported once more
    before._destroy()
library = torch.library.Library("pear_kernels", "FRAGMENT")
torch.ops.pear_kernels.library = library  # type: ignore[attr-defined]
library.define("linear_loss" + torch.library.infer_schema(compute, mutates_args=()), tags=TAGS)
library.impl("linear_loss", compute, "CompositeExplicitAutograd")
library.impl("linear_loss", autograd, "Autograd", with_keyset=True)
torch.library.register_fake("pear_kernels::linear_loss", fake, lib=library)
linear_loss = torch.ops.pear_kernels.linear_loss.default


def scaled(
    gradient: Tensor, upstream: Tensor, dtype: torch.dtype, backend: str | None = None, shared: object = False
) -> Tensor:
    """gradient * upstream in the dtype of the tensor it belongs to, by kernels if the call's backend is not "torch".

    In place where this backward pass is the graph's last, as autograd drops the saved gradient right after it: a copy
    of dW would be the largest tensor of the whole pass. Not in place if the gradient is `shared` with a saved-tensor
    hook, which may keep it, nor for a batch of upstream gradients (`is_grads_batched`).
    """
    plain = type(gradient) is Tensor and not torch.compiler.is_compiling() and not is_batch(upstream)
    if plain and on_gpu(gradient) and gradient.dtype != dtype:
        return backends.scale_and_round(gradient, upstream, dtype, backend)
    keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    if not plain or shared or keep_graph():
        return (gradient * upstream).to(dtype)
    return gradient.mul_(upstream).to(dtype)


def on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def is_batch(tensor: Tensor) -> bool:
    """Whether a tensor stands for many, as upstream gradients do under `is_grads_batched` and vmap."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(tensor) or functorch.is_functorch_wrapped_tensor(tensor)
