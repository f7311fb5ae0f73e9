"""The public losses: check arguments, run one pass of the engine, shape the result."""

from typing import NamedTuple

import torch
from torch import Tensor

from pear_kernels import checks, ops
from pear_kernels.backend import check_backend
from pear_kernels.objectives import STATS
from pear_kernels.weights import DEFAULTS, PEAROptions


class LossOutput(NamedTuple):
    """What a fused loss returns. Only `loss` carries gradients."""

    loss: Tensor  # (), float32 (float64 for float64 inputs)
    logprobs: Tensor  # target's shape, log pi of each target, 0 at ignored tokens
    weights: Tensor  # target's shape, G of each token, 0 at ignored tokens
    stats: dict[str, Tensor]  # 0-d tensors; `objectives.STATS` says what each is


def linear_pear_loss(
    hidden: Tensor,  # (N, D) or (B, T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) or (B, T)
    behavior_logprobs: Tensor,  # (N,) or (B, T)
    *,
    bias: Tensor | None = None,  # (V,)
    cu_seqlens: Tensor | None = None,  # (S+1,)
    level: str = DEFAULTS.level,
    block_size: int = DEFAULTS.block_size,
    gamma: float = DEFAULTS.gamma,
    log_ratio_clip: tuple[float, float] = DEFAULTS.log_ratio_clip,
    log_weight_clip: tuple[float, float] = DEFAULTS.log_weight_clip,
    sequence_scale: Tensor | None = None,  # (S,)
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> LossOutput:
    """PEAR loss of an LM head (arXiv 2602.01058), head included, without ever holding the (N, V) logits.

        L = sum_t stop_gradient(G_t) * -log pi(y_t | x, y_<t) / divisor

    with G from `pear_weights` over the response tokens of each sequence, `pi` being the softmax of
    `softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature`. Gradients are made in the forward pass: three
    matrix products when the head is trained, two when `weight` needs no gradient, one without gradients. (Sequence
    level: of several sequences longer than a chunk, those after the first cost up to a fourth product if the workspace
    has no room for a second (V, D) buffer; `pear_kernels.plan` says how much.)

    Args:
        hidden: (N, D), a pack, or (B, T, D), one sequence a row; float32, bfloat16, float16 or float64.
        weight: (V, D), the LM head, of hidden's dtype. Under autocast the two may differ, and are rounded to autocast's
            dtype as in `F.linear`.
        target: (N,) or (B, T) int64, already shifted: target[t] is what hidden[t] predicts. `ignore_index` marks
            prompt, padding and whatever else is no response token.
        behavior_logprobs: like target, float32 or float64: log pi_b of each target under the policy that wrote the
            data. What stands at ignored tokens does not matter.
        bias: (V,), the head's bias.
        cu_seqlens: (S+1,) int32 or int64 on hidden's device: the sequences of a pack; None means one sequence.
        level, block_size, gamma, log_ratio_clip, log_weight_clip: see `pear_weights`.
        sequence_scale: (S,) or (B,), multiplies each sequence's loss; not part of G. Ours, not the paper's.
        reduction: the divisor, on which the paper is silent (the default is ours): "mean", the call's valid tokens;
            "sum", 1; "sequence_mean", the mean over sequences with a valid token of their token means.
        denominator: a number or 0-d tensor that replaces the divisor, such as the tokens of all accumulation steps
            (for "sequence_mean": the sequences of all steps).
        temperature: divides the logits.
        softcap: bound of the logits, for heads that have one.
        ignore_index: the target of tokens that do not count.
        workspace_bytes: size of the chunk of logits. None: the size of a float32 gradient of the head, within 128 MiB
            and 1 GiB. It changes speed and memory, not the result.
        backend: "triton", kernels for NVIDIA GPUs of compute capability 8.0 or newer, or "torch", any device; None:
            the environment variable PEAR_KERNELS_BACKEND, or else the kernels wherever they run. float64 is always
            computed by "torch".

    Returns:
        LossOutput. With every token ignored: loss 0 and zero gradients.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what to do. Values (of target, behavior_logprobs,
            cu_seqlens, sequence_scale, denominator) are checked where they are: on a GPU by device-side asserts, so
            without waiting for it. PEAR_KERNELS_CHECK_VALUES=0 in the environment leaves that out on every device.
        torch.OutOfMemoryError: naming the workspace's size. (On a CPU, where that is torch's error, RuntimeError.)
        RuntimeError: for a double backward.
    """
    checks.check_options(PEAROptions(level, block_size, gamma, log_ratio_clip, log_weight_clip))
    checks.check_reduction(reduction, denominator)
    compute_dtype = checked_head(hidden, weight, target, bias, temperature, softcap, workspace_bytes, backend)
    checks.check_loss_arguments(hidden, target, behavior_logprobs, cu_seqlens, sequence_scale, denominator)
    if denominator is not None and not isinstance(denominator, Tensor):
        denominator = torch.full((), float(denominator), dtype=torch.float64, device=hidden.device)
    grad = torch.is_grad_enabled()
    loss, logprobs, weights, stats, *_ = ops.linear_pear_loss(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        target.reshape(-1),
        behavior_logprobs.detach().reshape(-1),
        checks.sequence_bounds(target.shape, cu_seqlens, hidden.device),
        None if sequence_scale is None else sequence_scale.detach(),
        None if denominator is None else denominator.detach(),
        level,
        block_size,
        gamma,
        [float(bound) for bound in (*log_ratio_clip, *log_weight_clip)],
        reduction,
        temperature,
        softcap,
        ignore_index,
        workspace_bytes,
        backend,
        compute_dtype,
        [
            grad and hidden.requires_grad,
            grad and weight.requires_grad,
            grad and bias is not None and bias.requires_grad,
        ],
    )
    return LossOutput(
        loss, logprobs.view(target.shape), weights.view(target.shape), dict(zip(STATS, stats.unbind(), strict=True))
    )


def linear_logprobs(
    hidden: Tensor,  # (N, D) or (B, T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) or (B, T)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log pi of each target under an LM head, without ever holding the (N, V) logits; any loss may be built on top.

    One matrix product where no gradient is asked for, and nothing kept; otherwise four in all, since the backward pass
    makes the logits again. Arguments as in `linear_pear_loss`.

    Returns:
        Log-probs of target's shape, float32 (float64 for float64 inputs), 0 at ignored tokens; with `return_entropy`
        also the entropy of each token's distribution in nats, likewise. Both are differentiable, once.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what to do.
        RuntimeError: for a double backward.
    """
    compute_dtype = checked_head(hidden, weight, target, bias, temperature, softcap, workspace_bytes, backend)
    logprobs, entropy = ops.linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        target.reshape(-1),
        temperature,
        softcap,
        ignore_index,
        return_entropy,
        workspace_bytes,
        backend,
        compute_dtype,
    )
    if return_entropy:
        return logprobs.view(target.shape), entropy.view(target.shape)
    return logprobs.view(target.shape)


def checked_head(hidden, weight, target, bias, temperature, softcap, workspace_bytes, backend) -> torch.dtype:
    """Checks the arguments that every function shares; returns the dtype that operands are rounded to."""
    device_type = hidden.device.type
    # autocast leaves float64 alone, as it does in F.linear
    autocast = torch.is_autocast_enabled(device_type) and torch.float64 not in (hidden.dtype, weight.dtype)
    checks.check_head(hidden, weight, target, bias, autocast)
    checks.check_head_options(temperature, softcap, workspace_bytes)
    check_backend(backend)
    return torch.get_autocast_dtype(device_type) if autocast else hidden.dtype
