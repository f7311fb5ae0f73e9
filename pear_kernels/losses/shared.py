"""What every loss does around its op: inputs are checked and flattened, a `LossOutput` comes out."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pear_kernels import checks
from pear_kernels.objectives import LOSSES
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
    # 0-d tensors; the tables named *_STATS beside each loss's formulas, and OF_ALL and OF_GRADIENT of
    # `objectives.base`, say what each is
    stats: dict[str, Tensor]


class Inputs(NamedTuple):
    """What every function takes, as this rank's own tensors, checked."""

    hidden: Tensor  # (N, D) or (B, T, D)
    weight: Tensor  # (V, D) or (V_r, D)
    target: Tensor  # (N,) or (B, T)
    bias: Tensor | None  # (V,) or (V_r,)
    group: str | None  # name of the process group whose ranks share the vocabulary
    compute_dtype: torch.dtype  # operands of products are rounded to it
    options: list[Options]  # but those that the function gathers
    return_entropy: bool
    columns: dict[str, Tensor]  # of the op, flat and without gradients; only those that were given

    def add(self, columns: Mapping[str, Tensor | None]) -> None:
        """Puts what has no gradient into `columns`, as (N,) or (S,)."""
        self.columns.update((name, each.detach().reshape(-1)) for name, each in columns.items() if each is not None)

    def spec_and_numbers(self, name: str, options: Sequence[Options]) -> tuple[str, Tensor]:
        """What the op of the function `name` takes after its tensors."""
        return spec_and_numbers(name, self.columns, self.compute_dtype, (*options, *self.options), self.return_entropy)

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
    valid_tokens: int | None,
    return_entropy: bool = False,
    columns: Mapping[str, Tensor | None] | None = None,  # of a loss, by their names; None where one is left out
    cu_seqlens: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> Inputs:
    hidden, weight, target, bias, shared = local_head(hidden, weight, target, bias, group)
    autocast = autocast_dtype(hidden, weight)
    checks.check_head(hidden, weight, target, bias, autocast is not None, 2 if shared is None else 0)
    number = None if isinstance(denominator, Tensor) else denominator
    call = CallOptions(valid_tokens=valid_tokens, denominator=number)
    inputs = Inputs(hidden, weight, target, bias, shared, autocast or hidden.dtype, [call], return_entropy, {})
    if columns is not None:
        checks.check_columns(columns, target, cu_seqlens)
        inputs.add({**columns, "cu_seqlens": checks.sequence_bounds(target, cu_seqlens)})
        if isinstance(denominator, Tensor):
            checks.check_denominator(hidden, denominator)
            inputs.columns["denominator"] = denominator.detach()
    return inputs


def autocast_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype | None:
    """What autocast rounds the operands of F.linear(hidden, weight) to. None where it rounds nothing: it is off, an
    operand is float64, or the device (such as "meta") has no autocast."""
    device_type = hidden.device.type
    on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on and torch.float64 not in (hidden.dtype, weight.dtype) else None


def run(name: str, inputs: Inputs, options: Sequence[Options]) -> LossOutput:
    """The op `linear_loss`, as the loss of this name."""
    columns, head = inputs.columns, inputs.flat
    spec, numbers = inputs.spec_and_numbers(name, options)
    checks.refuse_transforms(name, *head, *columns.values())
    grad = torch.is_grad_enabled()
    wanted = [grad and tensor is not None and tensor.requires_grad for tensor in head[:3]]
    found = linear_loss(*head, [*columns.values()], numbers, spec, inputs.group, wanted)
    loss, logprobs, weights, stats, *_ = found
    names = LOSSES[name].all_stats(tuple(columns), inputs.return_entropy, "gradient_tolerance=#" in spec)
    values = dict(zip(names, stats.unbind(), strict=True))
    shape = inputs.target.shape
    return LossOutput(loss, logprobs.view(shape), weights.view(shape), values)


def run_with(
    lend: Callable[[Any], AbstractContextManager[None]],
    function: Any,
    name: str,
    inputs: Inputs,
    options: Sequence[Options],
) -> LossOutput:
    """`run` with a function of the caller, which `lend` brings into the op. `torch.compile` breaks the graph there."""

    def call() -> LossOutput:
        with lend(function):
            return run(name, inputs, options)

    if torch.compiler.is_compiling():
        # not by a decorator, which would import torch._dynamo, for a second, with this package
        return torch.compiler.disable(call)()  # type: ignore[no-any-return, no-untyped-call]
    return call()


def add_teacher(inputs: Inputs, teacher: Teacher, argument: str) -> None:
    """Checks a teacher in memory, and puts its tensors (hidden as (N, D'), all of them rounded as autocast rounds
    operands) and its head's options into `inputs`."""
    checks.check_teacher(inputs.hidden, inputs.weight, inputs.target, teacher, autocast_dtype, argument)
    hidden, weight, bias, temperature, softcap = teacher
    dtype = autocast_dtype(hidden, weight)
    columns = {"teacher_hidden": hidden.flatten(0, -2), "teacher_weight": weight, "teacher_bias": bias}
    given = {name: each.detach() for name, each in columns.items() if each is not None}
    inputs.columns.update(given if dtype is None else {name: each.to(dtype) for name, each in given.items()})
    inputs.options.append(TeacherOptions(temperature=temperature, softcap=softcap))
