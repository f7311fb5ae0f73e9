"""The custom ops: what autograd and `torch.compile` see of the engine, with their shapes (fakes) and gradients.

A loss makes its gradients in the forward pass, so its backward pass only multiplies them by the upstream scalar.
"""

import torch
from torch import Tensor

from pear_kernels import checks
from pear_kernels.backend import head_class, objective_class, weights_class
from pear_kernels.engine import Walk, Wanted
from pear_kernels.memory import explain_out_of_memory
from pear_kernels.objectives import STATS, FixedCoefficients
from pear_kernels.packing import pack_tokens, unpack
from pear_kernels.policy import POLICY_STATS, PolicyObjective, PolicyOptions, policy_scale
from pear_kernels.weights import PEAROptions


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


def scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * upstream in the dtype of the tensor it belongs to.

    In place where this backward pass is the graph's last, as autograd drops the saved gradient right after it: a copy
    of dW would be the largest tensor of the whole pass.
    """
    if gradient.is_cuda and gradient.dtype != dtype and type(gradient) is Tensor and not torch.compiler.is_compiling():
        # one pass over dW in place of two. A CPU would make a float32 copy for it
        return torch.mul(gradient, upstream, out=torch.empty_like(gradient, dtype=dtype))
    keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    if torch.compiler.is_compiling() or type(gradient) is not Tensor or keep_graph():
        return (gradient * upstream).to(dtype)
    return gradient.mul_(upstream).to(dtype)


# ---- what losses share: their gradients are made in the forward pass


def loss_outputs(
    hidden: Tensor, weight: Tensor, target: Tensor, stats: int, compute_dtype: torch.dtype, wanted: list[bool]
) -> tuple[Tensor, ...]:
    """The shapes of a loss: (), (N,) log-probs, (N,) weights, (stats,), dX, dW, db."""
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


def save_loss_gradients(ctx, inputs, output):
    hidden, weight, bias, *_ = inputs
    ctx.wanted = inputs[-1]
    ctx.dtypes = hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype
    ctx.inputs = len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[4:])


def loss_backward(name: str):
    def backward(ctx, upstream, *_):
        forbid_double_backward(name)
        grads = [
            scaled(gradient, upstream, dtype) if wanted and upstream is not None else None
            for gradient, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
        ]
        return *grads, *[None] * (ctx.inputs - 3)

    return backward


# ---- linear_pear_loss


@torch.library.custom_op("pear_kernels::linear_pear_loss", mutates_args=())
def linear_pear_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    behavior_logprobs: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S+1,)
    sequence_scale: Tensor | None,  # (S,)
    denominator: Tensor | None,  # ()
    level: str,
    block_size: int,
    gamma: float,
    clips: list[float],  # of the log-ratio, low and high, and of the log-weight
    reduction: str,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    workspace_bytes: int | None,
    backend: str | None,
    compute_dtype: torch.dtype,
    wanted: list[bool],  # gradients of hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logprobs (N,), weights (N,), stats (9,), dX, dW, db); the last three are empty where not wanted."""
    size = target.numel()
    valid = target != ignore_index
    checks.check_cu_seqlens(cu_seqlens, size)
    checks.check_target(target, valid, weight.shape[0], ignore_index)
    checks.check_logprobs("behavior_logprobs", behavior_logprobs, valid)
    if sequence_scale is not None:
        checks.check_sequence_scale(sequence_scale)
    if denominator is not None:
        checks.check_denominator(denominator)

    pack = pack_tokens(valid, cu_seqlens)
    head = head_class(backend, hidden.device, compute_dtype)(weight, bias, temperature, softcap, compute_dtype)
    options = PEAROptions(level, block_size, gamma, tuple(clips[:2]), tuple(clips[2:]))
    objective = objective_class(backend, hidden.device, compute_dtype)(
        pack.take(behavior_logprobs), pack, options, reduction, denominator, sequence_scale
    )
    with explain_out_of_memory("linear_pear_loss", hidden, head, Wanted(*wanted), workspace_bytes):
        walk = Walk(hidden, head, target, pack, Wanted(*wanted), workspace_bytes)
        walk.run(objective)
    loss, weights, stats = objective.finish(walk.logprobs)
    grads = walk.grads
    results = loss, unpack(walk.logprobs, pack, size), unpack(weights, pack, size), stats
    return *(result.to(head.dtype) for result in results), grads.hidden, grads.weight, grads.bias


@linear_pear_loss.register_fake
def _(hidden, weight, bias, target, *options):
    return loss_outputs(hidden, weight, target, len(STATS), *options[-2:])


linear_pear_loss.register_autograd(loss_backward("linear_pear_loss"), setup_context=save_loss_gradients)


# ---- linear_policy_loss


@torch.library.custom_op("pear_kernels::linear_policy_loss", mutates_args=())
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
    compute_dtype: torch.dtype,
    wanted: list[bool],  # gradients of hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logprobs (N,), weights (N,), stats (11,), dX, dW, db); the last three are empty where not wanted."""
    size = target.numel()
    valid = target != ignore_index
    checks.check_cu_seqlens(cu_seqlens, size)
    checks.check_target(target, valid, weight.shape[0], ignore_index)
    columns = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "sampler_logprobs": sampler_logprobs}
    for name, column in columns.items():
        if column is not None:
            checks.check_logprobs(name, column, valid)
    checks.check_advantages(advantages, None if by_sequence else valid)
    if sequence_scale is not None:
        checks.check_sequence_scale(sequence_scale)
    if denominator is not None:
        checks.check_denominator(denominator)

    pack = pack_tokens(valid, cu_seqlens)
    head = head_class(backend, hidden.device, compute_dtype)(weight, bias, temperature, softcap, compute_dtype)
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
        weights=weights_class(backend, hidden.device, compute_dtype),
    )
    with explain_out_of_memory("linear_policy_loss", hidden, head, Wanted(*wanted), workspace_bytes):
        walk = Walk(hidden, head, target, pack, Wanted(*wanted), workspace_bytes, entropy=True)
        if entropy_coef == 0 or not any(wanted):
            walk.run(policy)
        else:  # the entropy's gradient needs log p and H before it can be written: the logits are made twice
            walk.score_all(policy)
            walk.run_dense(policy.coefficients(0, pack.tokens), policy.of_entropy())
    loss, weights, stats = policy.finish(walk.entropy)
    grads = walk.grads
    results = loss, unpack(walk.logprobs, pack, size), unpack(weights, pack, size), stats
    return *(result.to(head.dtype) for result in results), grads.hidden, grads.weight, grads.bias


@linear_policy_loss.register_fake
def _(hidden, weight, bias, target, *options):
    return loss_outputs(hidden, weight, target, len(POLICY_STATS), *options[-2:])


linear_policy_loss.register_autograd(loss_backward("linear_policy_loss"), setup_context=save_loss_gradients)


# ---- linear_logprobs


@torch.library.custom_op("pear_kernels::linear_logprobs", mutates_args=())
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
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(logprobs (N,), entropy (N,) or empty)."""
    size = target.numel()
    valid = target != ignore_index
    checks.check_target(target, valid, weight.shape[0], ignore_index)
    pack = pack_tokens(valid, one_sequence(target))
    head = head_class(backend, hidden.device, compute_dtype)(weight, bias, temperature, softcap, compute_dtype)
    nothing = Wanted(False, False, False)
    with explain_out_of_memory("linear_logprobs", hidden, head, nothing, workspace_bytes):
        walk = Walk(hidden, head, target, pack, nothing, workspace_bytes, entropy=return_entropy)
        walk.score_all(FixedCoefficients())
    entropy = unpack(walk.entropy, pack, size) if return_entropy else walk.logprobs.new_empty(0)
    return unpack(walk.logprobs, pack, size).to(head.dtype), entropy.to(head.dtype)


@linear_logprobs.register_fake
def _(hidden, weight, bias, target, temperature, softcap, ignore_index, return_entropy, *options):
    dtype = result_dtype(options[-1])
    return (
        hidden.new_empty(target.shape, dtype=dtype),
        hidden.new_empty(target.shape if return_entropy else (0,), dtype=dtype),
    )


@torch.library.custom_op("pear_kernels::linear_logprobs_backward", mutates_args=())
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
    compute_dtype: torch.dtype,
    wanted: list[bool],  # gradients of hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db) in their tensors' dtypes, empty where not wanted: the logits made again, then two more products."""
    pack = pack_tokens(target != ignore_index, one_sequence(target))
    head = head_class(backend, hidden.device, compute_dtype)(weight, bias, temperature, softcap, compute_dtype)
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(grad_entropy)
    of_nll = -pack.take(grad_logprobs.to(head.dtype))
    with explain_out_of_memory("the backward pass of linear_logprobs", hidden, head, Wanted(*wanted), workspace_bytes):
        walk = Walk(hidden, head, target, pack, Wanted(*wanted), workspace_bytes)
        if grad_entropy is None:
            walk.run(FixedCoefficients(of_nll))
        else:
            walk.run_dense(of_nll, pack.take(grad_entropy.to(head.dtype)))
        grads = walk.grads
        return (
            grads.hidden.to(hidden.dtype),
            grads.weight.to(weight.dtype),
            grads.bias.to(weight.dtype if bias is None else bias.dtype),
        )


@linear_logprobs_backward.register_fake
def _(grad_logprobs, grad_entropy, hidden, weight, bias, target, *options):
    grad_hidden, grad_weight, grad_bias = options[-1]
    return (
        hidden.new_empty(hidden.shape if grad_hidden else (0,)),
        weight.new_empty(weight.shape if grad_weight else (0,)),
        (weight if bias is None else bias).new_empty(weight.shape[:1] if grad_bias else (0,)),
    )


def _save_logprobs_inputs(ctx, inputs, output):
    ctx.return_entropy = inputs[7]
    ctx.options = *inputs[4:7], *inputs[8:]
    ctx.inputs = len(inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4])


def _logprobs_backward(ctx, grad_logprobs, grad_entropy):
    forbid_double_backward("linear_logprobs")
    if not ctx.return_entropy:
        grad_entropy = None
    wanted = ctx.needs_input_grad[:3]
    if grad_logprobs is None and grad_entropy is None:
        grads = None, None, None
    else:
        grads = linear_logprobs_backward(grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.options, list(wanted))
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *[None] * (ctx.inputs - 3)


linear_logprobs.register_autograd(_logprobs_backward, setup_context=_save_logprobs_inputs)


def one_sequence(target: Tensor) -> Tensor:
    return torch.arange(2, device=target.device) * target.numel()
