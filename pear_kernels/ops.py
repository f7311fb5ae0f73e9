"""The custom ops: what autograd and `torch.compile` see of the engine, with their shapes (fakes) and gradients.

A loss makes its gradients in the forward pass, so its backward pass only multiplies them by the upstream scalar.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from pear_kernels import checks
from pear_kernels.backend import dense_head_class, head_class, objective_class, weights_class
from pear_kernels.distill import AnchoredObjective, DistillObjective, LoadedTeacher, OfflineTeacher
from pear_kernels.divergence import DivergenceOptions
from pear_kernels.engine import DenseWalk, Objective, Walk
from pear_kernels.head import DenseHead
from pear_kernels.memory import explain_out_of_memory
from pear_kernels.negatives import WRONG_STATS, LabelledObjective
from pear_kernels.objectives import STATS, FixedCoefficients, token_scale
from pear_kernels.packing import Pack, pack_tokens, unpack
from pear_kernels.policy import POLICY_STATS, EntropyBonus, PolicyObjective, PolicyOptions, policy_scale
from pear_kernels.schedule import Wanted
from pear_kernels.weightings import WEIGHTED_STATS, WEIGHTINGS, Tokens, WeightedObjective, WeightingOptions, by
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


def checked_pack(
    target: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S+1,)
    vocabulary: int,
    ignore_index: int,
    logprobs: dict[str, Tensor | None],  # (N,) each
    sequence_scale: Tensor | None,  # (S,)
    denominator: Tensor | None,  # ()
) -> Pack:
    """The tokens that count, once the values of what every loss takes are checked."""
    valid = target != ignore_index
    checks.check_cu_seqlens(cu_seqlens, target.numel())
    checks.check_target(target, valid, vocabulary, ignore_index)
    for name, column in logprobs.items():
        if column is not None:
            checks.check_logprobs(name, column, valid)
    if sequence_scale is not None:
        checks.check_sequence_scale(sequence_scale)
    if denominator is not None:
        checks.check_denominator(denominator)
    return pack_tokens(valid, cu_seqlens)


def teacher_head(student: DenseHead, hidden: Tensor, weight: Tensor, bias: Tensor | None, *options) -> DenseHead:
    """A teacher's head on the student's backend, with the teacher's own options: as exact as the student's, no more."""
    dtype = torch.float32 if hidden.dtype == torch.float64 else hidden.dtype
    dtype = torch.float64 if student.dtype == torch.float64 else dtype
    return type(student)(weight, bias, *options, dtype)


def loss_results(walk: Walk, loss: Tensor, weights: Tensor, stats: Tensor, size: int) -> tuple[Tensor, ...]:
    """What a loss's op returns, after `walk`: the numbers in the result's dtype, tokens in the caller's order."""
    pack, grads = walk.pack, walk.grads
    results = loss, unpack(walk.logprobs, pack, size), unpack(weights, pack, size), stats
    return *(result.to(walk.head.dtype) for result in results), grads.hidden, grads.weight, grads.bias


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
    sequence_label: Tensor | None,  # (S,)
    behavior_logprobs: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S+1,)
    sequence_scale: Tensor | None,  # (S,)
    denominator: Tensor | None,  # ()
    negative_lambda: float,
    logprob_floor: float,
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
    """(loss, logprobs (N,), weights (N,), stats, dX, dW, db); the last three are empty where not wanted.

    9 statistics, or 13 with labels.
    """
    columns = {"behavior_logprobs": behavior_logprobs}
    pack = checked_pack(target, cu_seqlens, weight.shape[0], ignore_index, columns, sequence_scale, denominator)
    head = head_class(backend, hidden.device, compute_dtype)(weight, bias, temperature, softcap, compute_dtype)
    options = PEAROptions(level, block_size, gamma, tuple(clips[:2]), tuple(clips[2:]))
    behavior = pack.take(behavior_logprobs)
    if sequence_label is None:
        of_backend = objective_class(backend, hidden.device, compute_dtype)
        objective = of_backend(behavior, pack, options, reduction, denominator, sequence_scale)
    else:
        objective = LabelledObjective(
            behavior, pack, options, token_scale(pack, reduction, denominator, sequence_scale), sequence_label,
            negative_lambda, logprob_floor, weights_class(backend, hidden.device, compute_dtype),
        )  # fmt: skip
    with explain_out_of_memory("linear_pear_loss", hidden, head, Wanted(*wanted), workspace_bytes):
        walk = Walk(hidden, head, target, pack, Wanted(*wanted), workspace_bytes)
        walk.run(objective)
    return loss_results(walk, *objective.finish(walk.logprobs), target.numel())


@linear_pear_loss.register_fake
def _(hidden, weight, bias, target, sequence_label, *options):
    stats = len(STATS) + (0 if sequence_label is None else len(WRONG_STATS))
    return loss_outputs(hidden, weight, target, stats, *options[-2:])


linear_pear_loss.register_autograd(loss_backward("linear_pear_loss"), setup_context=save_loss_gradients)


# ---- linear_weighted_loss

# functions of log-probs, which no op can take, by the number that stands for each while its call runs
functions: dict[int, Callable[[Tokens], Tensor]] = {}
function_keys = itertools.count()


@torch.library.custom_op("pear_kernels::linear_weighted_loss", mutates_args=())
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
    compute_dtype: torch.dtype,
    wanted: list[bool],  # gradients of hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logprobs (N,), weights (N,), stats (7,), dX, dW, db); the last three are empty where not wanted."""
    columns = {"ref_logprobs": ref_logprobs}
    pack = checked_pack(target, cu_seqlens, weight.shape[0], ignore_index, columns, sequence_scale, denominator)
    anchored = ref_hidden is not None
    of_backend = (dense_head_class if anchored else head_class)(backend, hidden.device, compute_dtype)
    head = of_backend(weight, bias, temperature, softcap, compute_dtype)
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
            of_ref = teacher_head(head, ref_hidden, ref_weight, ref_bias, ref_temperature, ref_softcap)
            teacher = LoadedTeacher(ref_hidden, of_ref, pack, DivergenceOptions("forward"))
            anchor = AnchoredObjective(objective, asft_kl)
            walk = DenseWalk(hidden, head, target, pack, Wanted(*wanted), workspace_bytes, teacher=teacher)
            walk.run(anchor)
            return loss_results(walk, *anchor.finish(walk.logprobs, walk.divergence), target.numel())
        walk = Walk(hidden, head, target, pack, Wanted(*wanted), workspace_bytes, entropy=chosen.needs_entropy)
        walk.run(objective)
    return loss_results(walk, *objective.finish(walk.logprobs), target.numel())


@linear_weighted_loss.register_fake
def _(hidden, weight, bias, target, *options):
    return loss_outputs(hidden, weight, target, len(WEIGHTED_STATS), *options[-2:])


linear_weighted_loss.register_autograd(loss_backward("linear_weighted_loss"), setup_context=save_loss_gradients)


# ---- linear_distill_loss


@torch.library.custom_op("pear_kernels::linear_distill_loss", mutates_args=())
def linear_distill_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    behavior_logprobs: Tensor | None,  # (N,)
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
    """(loss, logprobs (N,), weights (N,), stats, dX, dW, db); the last three are empty where not wanted.

    The statistics are the mean divergence and those of the weights: 10, or 8 without behaviour log-probs.
    """
    columns = {"behavior_logprobs": behavior_logprobs}
    pack = checked_pack(target, cu_seqlens, weight.shape[0], ignore_index, columns, sequence_scale, denominator)
    dense_head = dense_head_class(backend, hidden.device, compute_dtype)
    head = dense_head(weight, bias, temperature, softcap, compute_dtype)
    options = DivergenceOptions(divergence, js_beta, distill_temperature)
    if teacher_hidden is not None:
        of_teacher = teacher_head(
            head, teacher_hidden, teacher_weight, teacher_bias, teacher_temperature, teacher_softcap
        )
        teacher = LoadedTeacher(teacher_hidden, of_teacher, pack, options)
    else:
        checks.check_top_k(teacher_ids, teacher_logprobs, target != ignore_index, weight.shape[0])
        teacher = OfflineTeacher(teacher_ids, teacher_logprobs, pack, options)
    if behavior_logprobs is None:
        scale = token_scale(pack, reduction, denominator, sequence_scale)
        of_weights: Objective = WeightedObjective(pack, WEIGHTINGS["none"], scale)
    else:
        pear = PEAROptions(level, block_size, gamma, tuple(clips[:2]), tuple(clips[2:]))
        of_backend = objective_class(backend, hidden.device, compute_dtype)
        of_weights = of_backend(pack.take(behavior_logprobs), pack, pear, reduction, denominator, sequence_scale)
    objective = DistillObjective(of_weights, nll_coef)
    with explain_out_of_memory("linear_distill_loss", hidden, head, Wanted(*wanted), workspace_bytes):
        walk = DenseWalk(hidden, head, target, pack, Wanted(*wanted), workspace_bytes, teacher=teacher)
        walk.run(objective)
    return loss_results(walk, *objective.finish(walk.logprobs, walk.divergence), target.numel())


@linear_distill_loss.register_fake
def _(hidden, weight, bias, target, behavior_logprobs, *options):
    stats = 1 + len(WEIGHTED_STATS if behavior_logprobs is None else STATS)
    return loss_outputs(hidden, weight, target, stats, *options[-2:])


linear_distill_loss.register_autograd(loss_backward("linear_distill_loss"), setup_context=save_loss_gradients)


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
    columns = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "sampler_logprobs": sampler_logprobs}
    pack = checked_pack(target, cu_seqlens, weight.shape[0], ignore_index, columns, sequence_scale, denominator)
    checks.check_advantages(advantages, None if by_sequence else target != ignore_index)
    bonus = entropy_coef != 0 and any(wanted)
    of_backend = (dense_head_class if bonus else head_class)(backend, hidden.device, compute_dtype)
    head = of_backend(weight, bias, temperature, softcap, compute_dtype)
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
        kind = DenseWalk if bonus else Walk
        walk = kind(hidden, head, target, pack, Wanted(*wanted), workspace_bytes, entropy=True)
        walk.run(EntropyBonus(policy) if bonus else policy)
    return loss_results(walk, *policy.finish(walk.entropy), target.numel())


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
    dense = grad_entropy is not None
    of_backend = (dense_head_class if dense else head_class)(backend, hidden.device, compute_dtype)
    head = of_backend(weight, bias, temperature, softcap, compute_dtype)
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


# ---- linear_topk_logprobs


@torch.library.custom_op("pear_kernels::linear_topk_logprobs", mutates_args=())
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
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(ids (N, k), logprobs (N, k)); at ignored tokens 0..k-1 and 0."""
    checks.check_target(target, target != ignore_index, weight.shape[0], ignore_index)
    pack = pack_tokens(target != ignore_index, one_sequence(target))
    head = dense_head_class(backend, hidden.device, compute_dtype)(weight, bias, temperature, softcap, compute_dtype)
    nothing, size = Wanted(False, False, False), target.numel()
    ids = torch.arange(k, device=target.device).repeat(size, 1)
    logprobs = torch.zeros(size, k, dtype=head.dtype, device=target.device)
    with explain_out_of_memory("linear_topk_logprobs", hidden, head, nothing, workspace_bytes):
        walk = DenseWalk(hidden, head, target, pack, nothing, workspace_bytes)
        for _, chunks in walk.start().steps:
            for begin, end in chunks:
                top, where = head.log_softmax(walk.rows(begin, end), 1.0).topk(k, dim=1)
                index = pack.index[begin:end]
                if pack.counts is None:
                    ids[index], logprobs[index] = where, top
                else:
                    counts = pack.counts[begin:end, None]
                    ids[index] = torch.where(counts, where, ids[index])
                    logprobs[index] = torch.where(counts, top, 0.0)
    return ids, logprobs


@linear_topk_logprobs.register_fake
def _(hidden, weight, bias, target, k, *options):
    shape = *target.shape, k
    return hidden.new_empty(shape, dtype=torch.int64), hidden.new_empty(shape, dtype=result_dtype(options[-1]))


def one_sequence(target: Tensor) -> Tensor:
    return torch.arange(2, device=target.device) * target.numel()
