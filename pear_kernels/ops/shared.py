"""What the custom ops share: checks of values, shapes (fakes), and gradients that are made in the forward pass."""

import inspect

import torch
from torch import Tensor

from pear_kernels import backend, checks
from pear_kernels.blocks import carrying
from pear_kernels.engine import Walk
from pear_kernels.objectives import OF_ALL
from pear_kernels.packing import Pack, pack_tokens, unpack


def result_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """Of losses, log-probs, weights and dW: float32, or float64 for float64 inputs."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def forbid_double_backward(name: str) -> None:
    """Gradients are recorded inside a backward pass only under create_graph=True."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name} has no second derivative: its gradients are made in the forward pass. Call backward without "
            "create_graph=True, or use pear_kernels.reference for a double backward"
        )


def scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype, chosen: str | None = None, shared=False) -> Tensor:
    """gradient * upstream in the dtype of the tensor it belongs to, by kernels if the call's backend is not "torch".

    In place where this backward pass is the graph's last, as autograd drops the saved gradient right after it: a copy
    of dW would be the largest tensor of the whole pass. Not in place if the gradient is `shared` with a saved-tensor
    hook, which may hold on to it, nor for a batch of upstream gradients (`is_grads_batched`).
    """
    plain = type(gradient) is Tensor and not torch.compiler.is_compiling() and not is_batch(upstream)
    if plain and on_gpu(gradient) and gradient.dtype != dtype:
        # one pass over dW in place of two. A CPU would make a float32 copy for it
        if gradient.is_contiguous() and backend.resolve(chosen, gradient.device, gradient.dtype) == "triton":
            from pear_kernels.triton.head import scale_and_round

            return scale_and_round(gradient, upstream, dtype)
        return torch.mul(gradient, upstream, out=torch.empty_like(gradient, dtype=dtype))
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


def checked_pack(
    target: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S+1,)
    vocabulary: int,
    ignore_index: int,
    logprobs: dict[str, Tensor | None],  # (N,) each
    sequence_scale: Tensor | None,  # (S,)
    denominator: Tensor | None,  # ()
    block_ids: Tensor | None = None,  # (N,): a log-prob of a token without a log-ratio is not looked at
) -> Pack:
    """The tokens that count, once the values of what every loss takes are checked."""
    valid = target != ignore_index
    checks.check_cu_seqlens(cu_seqlens, target.numel())
    checks.check_target(target, valid, vocabulary, ignore_index)
    for name, column in logprobs.items():
        if column is not None:
            checks.check_logprobs(name, column, carrying(valid, block_ids))
    if sequence_scale is not None:
        checks.check_sequence_scale(sequence_scale)
    if denominator is not None:
        checks.check_denominator(denominator)
    return pack_tokens(valid, cu_seqlens)


def loss_results(
    walk: Walk,
    loss: Tensor,
    weights: Tensor,
    stats: Tensor,
    size: int,
    return_entropy: bool = False,
    among: Tensor | None = None,  # (n,) bool, of which tokens `OF_ALL` are; None: all
) -> tuple[Tensor, ...]:
    """What a loss's op returns, after `walk`: the numbers in the result's dtype, tokens in the caller's order."""
    pack, grads = walk.pack, walk.grads
    of_all = torch.stack([walk.top1, *([walk.entropy] if return_entropy else [])])  # (1 or 2, n)
    counted = pack.zero_ghosts(torch.ones_like(walk.logprobs))
    counted = counted if among is None else counted * among
    # a ghost's entropy may be anything
    means = torch.where(counted > 0, of_all, 0.0).sum(1) / counted.sum().clamp(min=1)
    stats = torch.cat([stats, means])
    loss = loss.clone()  # never a view, to which a caller could add nothing in place
    results = loss, unpack(walk.logprobs, pack, size), unpack(weights, pack, size), stats
    return *(result.to(walk.head.dtype) for result in results), grads.hidden, grads.weight, grads.bias


def loss_outputs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    stats: int,
    return_entropy: bool,
    compute_dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """The shapes of a loss: (), (N,) log-probs, (N,) weights, (stats and `OF_ALL`,), dX, dW, db."""
    stats += len(OF_ALL) - (not return_entropy)
    dtype = result_dtype(compute_dtype)
    hidden_dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    grad_hidden, grad_weight, grad_bias = wanted
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(target.shape, dtype=dtype),
        hidden.new_empty(target.shape, dtype=dtype),
        hidden.new_empty(stats, dtype=dtype),
        hidden.new_empty(hidden.shape if grad_hidden else (0,), dtype=hidden_dtype),
        hidden.new_empty(weight.shape if grad_weight else (0,), dtype=dtype),
        hidden.new_empty(weight.shape[:1] if grad_bias else (0,), dtype=dtype),
    )


def register_loss_gradients(op) -> None:
    """A loss's gradients are made in its op, so all that the backward pass does is scale them."""
    place = list(inspect.signature(op._init_fn).parameters).index("backend")

    def save(ctx, inputs, output):
        hidden, weight, bias, *_, wanted, _, _ = inputs
        ctx.wanted = wanted
        ctx.backend = inputs[place]
        ctx.dtypes = hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype
        ctx.inputs = len(inputs)
        ctx.shared = not torch.compiler.is_compiling() and torch._C._autograd._top_saved_tensors_default_hooks(True)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[4:])

    def backward(ctx, upstream, *_):
        forbid_double_backward(op._name)
        grads = [
            scaled(gradient, upstream, dtype, ctx.backend, ctx.shared) if wanted and upstream is not None else None
            for gradient, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
        ]
        return *grads, *[None] * (ctx.inputs - 3)

    op.register_autograd(backward, setup_context=save)


def one_sequence(target: Tensor) -> Tensor:
    return torch.arange(2, device=target.device) * target.numel()
