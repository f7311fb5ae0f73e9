"""What every loss does around its op: inputs are checked and flattened, a `LossOutput` comes out."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pear_kernels import checks
from pear_kernels.objectives import LOSSES
from pear_kernels.objectives.base import OF_ALL
from pear_kernels.objectives.teachers import Teacher
from pear_kernels.ops.call import spec_and_numbers
from pear_kernels.ops.loss import linear_loss
from pear_kernels.options import CallOptions, Options, TeacherOptions
from pear_kernels.sharding import local_head


class LossOutput(NamedTuple):
    """What a fused loss returns. Only `loss` carries gradients."""

    loss: Tensor  # (), float32 (float64 for float64 inputs)
    logprobs: Tensor  # target's shape, log pi of each target, 0 at ignored tokens
    # target's shape, what multiplies each token's -log pi: G, or a policy loss's r A; 0 at ignored tokens
    weights: Tensor
    # 0-d tensors; the tables named *_STATS beside each loss's formulas, and `objectives.base.OF_ALL`, say what each is
    stats: dict[str, Tensor]


class Inputs(NamedTuple):
    """What every function takes, as this rank's own tensors, checked."""

    hidden: Tensor  # (N, D) or (B, T, D)
    weight: Tensor  # (V, D) or (V_r, D)
    target: Tensor  # (N,) or (B, T)
    bias: Tensor | None  # (V,) or (V_r,)
    group: str | None  # name of the process group whose ranks share the vocabulary
    compute_dtype: torch.dtype  # operands of products are rounded to it
    columns: dict[str, Tensor | None]  # of the op, flat; those that are None were not given
    denominator: float | None

    @property
    def flat(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """hidden (N, D), weight, bias and target (N,), as the ops take them."""
        return self.hidden.reshape(-1, self.hidden.shape[-1]), self.weight, self.bias, self.target.reshape(-1)


def checked_inputs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    group: "torch.distributed.ProcessGroup | None",
    logprobs: dict[str, Tensor | None] | None = None,  # by their names, of a loss
    cu_seqlens: Tensor | None = None,
    sequence_scale: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> Inputs:
    hidden, weight, target, bias, shared = local_head(hidden, weight, target, bias, group)
    autocast = autocast_dtype(hidden, weight)
    checks.check_head(hidden, weight, target, bias, autocast is not None, 2 if shared is None else 0)
    columns: dict[str, Tensor | None] = {}
    if logprobs is not None:
        checks.check_loss_arguments(hidden, target, logprobs, cu_seqlens, sequence_scale, denominator)
        columns = {name: flat(column) for name, column in logprobs.items()}
        columns["sequence_scale"] = flat(sequence_scale)
        columns["cu_seqlens"] = checks.sequence_bounds(target.shape, cu_seqlens, hidden.device)
    number = denominator
    if isinstance(number, Tensor):
        columns["denominator"], number = number.detach(), None
    return Inputs(hidden, weight, target, bias, shared, autocast or hidden.dtype, columns, number)


def autocast_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype | None:
    """What autocast rounds the operands of F.linear(hidden, weight) to. None where it rounds nothing: it is off, an
    operand is float64, or the device (such as "meta") has no autocast."""
    device_type = hidden.device.type
    on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on and torch.float64 not in (hidden.dtype, weight.dtype) else None


def run(
    name: str,
    inputs: Inputs,
    options: Sequence[Options],
    columns: dict[str, Tensor | None] | None = None,  # flat, of this loss alone
    *,
    return_entropy: bool = False,
    valid_tokens: int | None = None,
) -> LossOutput:
    """The op `linear_loss`, as the loss of this name."""
    given = {key: column for key, column in (inputs.columns | (columns or {})).items() if column is not None}
    call = CallOptions(valid_tokens=valid_tokens, denominator=inputs.denominator)
    spec, numbers = spec_and_numbers(name, given, inputs.compute_dtype, (*options, call), return_entropy)
    checks.refuse_transforms(name, *inputs.flat, *given.values())
    wanted = wanted_gradients(inputs.hidden, inputs.weight, inputs.bias)
    found = linear_loss(*inputs.flat, [*given.values()], numbers, spec, inputs.group, wanted)
    loss, logprobs, weights, stats, *_ = found
    names = LOSSES[name].stats(tuple(given)) + OF_ALL
    values = dict(zip(names[: len(stats)], stats.unbind(), strict=True))
    shape = inputs.target.shape
    return LossOutput(loss, logprobs.view(shape), weights.view(shape), values)


def untraced(call: Callable[[], LossOutput]) -> Callable[[], LossOutput]:
    """`call`, for which `torch.compile` breaks the graph: it calls a function of the caller inside the op."""
    if torch.compiler.is_compiling():
        # not by a decorator, which would import torch._dynamo, for a second, with this package
        return torch.compiler.disable(call)  # type: ignore[no-any-return, no-untyped-call]
    return call


def flat(values: Tensor | None) -> Tensor | None:
    """What has no gradient, as (N,) or (S,)."""
    return None if values is None else values.detach().reshape(-1)


def teacher_columns(teacher: Teacher | None) -> tuple[dict[str, Tensor | None], TeacherOptions]:
    """Hidden states (N, D'), weight and bias of a teacher in memory, rounded by autocast, and its head's options."""
    if teacher is None:
        return {}, TeacherOptions()
    hidden, weight, bias, temperature, softcap = teacher
    dtype = autocast_dtype(hidden, weight)
    if dtype is not None:
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    hidden = hidden.detach().reshape(-1, hidden.shape[-1])
    columns = {"teacher_hidden": hidden, "teacher_weight": weight.detach(), "teacher_bias": flat(bias)}
    return columns, TeacherOptions(temperature=temperature, softcap=softcap)


def wanted_gradients(*tensors: Tensor | None) -> list[bool]:
    """Whether each of them gets a gradient."""
    grad = torch.is_grad_enabled()
    return [grad and tensor is not None and tensor.requires_grad for tensor in tensors]
