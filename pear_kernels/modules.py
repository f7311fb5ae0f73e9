"""The losses as `nn.Module`s, with their options set once."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Concatenate, ParamSpec, Unpack

from torch import nn

from pear_kernels import losses
from pear_kernels.losses import LossOutput
from pear_kernels.options import (
    DistillKeywords,
    Objects,
    PEARKeywords,
    PolicyKeywords,
    WeightingConstants,
    gather,
    takes,
)

P = ParamSpec("P")


class LinearLoss(nn.Module):
    """A loss of an LM head with its options set once. It holds no parameter: the head's `weight` is an argument of
    `forward`, so it may be tied, sharded or frozen."""

    function: ClassVar[Callable[..., LossOutput]]

    def __init_subclass__(cls) -> None:
        if "function" in vars(cls):  # not a caller's subclass of one of the classes below
            takes(*cls.function.option_classes)(cls.__init__)  # type: ignore

    def __init__(self, options: Objects, keywords: Mapping[str, object]):
        super().__init__()
        classes = type(self).function.option_classes  # type: ignore[attr-defined]
        self.options = gather(type(self).__name__, classes, options, keywords)

    def extra_repr(self) -> str:
        fields = {name: value for each in self.options for name, value in each.asdict().items()}
        return ", ".join(f"{name}={value!r}" for name, value in fields.items())


def forward_of(function: Callable[P, LossOutput]) -> Callable[[object], Callable[Concatenate[Any, P], LossOutput]]:
    """Decorator of a module's `forward`, which becomes `function` with the module's options, in types and signature.

    Not an assignment: to a type checker that would have the type of `nn.Module.forward`, which takes anything.
    """

    def forward(self: LinearLoss, /, *arguments: P.args, **named: P.kwargs) -> LossOutput:
        """The function's tensors, and its other arguments that are no options: those are the module's."""
        return function(*arguments, **{**named, "options": self.options})  # type: ignore[arg-type]

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    options = {"options", *(name for cls in function.option_classes for name in cls.names())}  # type: ignore[attr-defined]
    left = [each for each in parameters if each.name not in options]
    forward.__signature__ = inspect.Signature([own, *left], return_annotation=LossOutput)  # type: ignore[attr-defined]
    return lambda _: forward


class LinearPEARLoss(LinearLoss):
    """`linear_pear_loss` (arXiv 2602.01058) as a module, with its keywords."""

    function = staticmethod(losses.linear_pear_loss)

    def __init__(self, *, options: Objects = (), **keywords: Unpack[PEARKeywords]):
        super().__init__(options, keywords)

    @forward_of(losses.linear_pear_loss)
    def forward(self) -> None: ...


class LinearWeightedLoss(LinearLoss):
    """`linear_weighted_loss` as a module, with its keywords: by a named weighting, or with weights in each call."""

    function = staticmethod(losses.linear_weighted_loss)

    def __init__(self, weighting: str | None = None, *, options: Objects = (), **keywords: Unpack[WeightingConstants]):
        super().__init__(options, keywords if weighting is None else {"weighting": weighting, **keywords})

    @forward_of(losses.linear_weighted_loss)
    def forward(self) -> None: ...


class LinearDistillLoss(LinearLoss):
    """`linear_distill_loss` as a module, with its keywords."""

    function = staticmethod(losses.linear_distill_loss)

    def __init__(self, *, options: Objects = (), **keywords: Unpack[DistillKeywords]):
        super().__init__(options, keywords)

    @forward_of(losses.linear_distill_loss)
    def forward(self) -> None: ...


class LinearPolicyLoss(LinearLoss):
    """`linear_policy_loss` as a module, with its keywords."""

    function = staticmethod(losses.linear_policy_loss)

    def __init__(self, *, options: Objects = (), **keywords: Unpack[PolicyKeywords]):
        super().__init__(options, keywords)

    @forward_of(losses.linear_policy_loss)
    def forward(self) -> None: ...
