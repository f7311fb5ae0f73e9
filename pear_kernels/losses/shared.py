"""What every loss does around its op: checked and flattened arguments go in, a `LossOutput` comes out."""

from typing import NamedTuple

import torch
from torch import Tensor

from pear_kernels import checks
from pear_kernels.backend import check_backend
from pear_kernels.distill import Teacher
from pear_kernels.objectives import OF_ALL
from pear_kernels.scalars import as_tensor


class LossOutput(NamedTuple):
    """What a fused loss returns. Only `loss` carries gradients."""

    loss: Tensor  # (), float32 (float64 for float64 inputs)
    logprobs: Tensor  # target's shape, log pi of each target, 0 at ignored tokens
    weights: (
        Tensor  # target's shape, what multiplies each token's -log pi: G, or a policy loss's r A; 0 at ignored ones
    )
    # 0-d tensors; the tables named *_STATS beside each loss's formulas, and `objectives.OF_ALL`, say what each is
    stats: dict[str, Tensor]


def loss_output(found: tuple[Tensor, ...], target: Tensor, names: tuple[str, ...]) -> LossOutput:
    """What an op returned, in target's shape, and its statistics by their names, `OF_ALL` last."""
    loss, logprobs, weights, stats, *_ = found
    names += OF_ALL
    stats = dict(zip(names[: len(stats)], stats.unbind(), strict=True))
    return LossOutput(loss, logprobs.view(target.shape), weights.view(target.shape), stats)


def checked_head(
    hidden, weight, target, bias, temperature, softcap, workspace_bytes, backend, shared: str | None
) -> torch.dtype:
    """Checks the arguments that every function takes; returns the dtype that operands are rounded to.

    `shared` is the name of the group whose ranks share the vocabulary.
    """
    autocast = autocast_dtype(hidden, weight)
    checks.check_head(hidden, weight, target, bias, autocast is not None, 2 if shared is None else 0)
    checks.check_head_options(temperature, softcap, workspace_bytes)
    check_backend(backend)
    return autocast or hidden.dtype


def autocast_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype | None:
    """What autocast rounds the operands of F.linear(hidden, weight) to; None where it leaves them alone, as it does
    float64, and on a device such as "meta", which has no autocast."""
    device_type = hidden.device.type
    on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on and torch.float64 not in (hidden.dtype, weight.dtype) else None


def flat(values: Tensor | None) -> Tensor | None:
    """What has no gradient, as (N,) or (S,)."""
    return None if values is None else values.detach().reshape(-1)


def flat_teacher(teacher: Teacher | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Hidden states (N, D'), weight and bias of a teacher in memory, which gets no gradient, as autocast has them."""
    if teacher is None:
        return None, None, None
    hidden, weight, bias, *_ = teacher
    dtype = autocast_dtype(hidden, weight)
    hidden, weight, bias = (x if x is None or dtype is None else x.to(dtype) for x in (hidden, weight, bias))
    return hidden.detach().reshape(-1, hidden.shape[-1]), weight.detach(), flat(bias)


def divisor(denominator: float | Tensor | None, device: torch.device) -> Tensor | None:
    """A number as a 0-d tensor: the op takes any other one, and is compiled once for all of them."""
    if denominator is None or isinstance(denominator, Tensor):
        return denominator if denominator is None else denominator.detach()
    return as_tensor(float(denominator), device)


def wanted_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[bool]:
    """Whether each of them gets a gradient."""
    grad = torch.is_grad_enabled()
    return [grad and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
