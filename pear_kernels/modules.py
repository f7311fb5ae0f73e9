"""The losses as `nn.Module`s, with their options set once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Unpack

from torch import nn

from pear_kernels.losses import (
    LossOutput,
    linear_distill_loss,
    linear_pear_loss,
    linear_policy_loss,
    linear_weighted_loss,
)
from pear_kernels.options import (
    DistillKeywords,
    Options,
    PEARKeywords,
    PolicyKeywords,
    WeightingConstants,
    gather,
    takes,
)


class LinearLoss(nn.Module):
    """A loss of an LM head with its options set once. It holds no parameter: the head's `weight` is an argument of
    `forward`, so it may be tied, sharded or frozen."""

    function: ClassVar[Callable[..., LossOutput]]

    def __init__(self, options: Options | Sequence[Options], keywords: Mapping[str, object]):
        super().__init__()
        classes = self.function.option_classes  # type: ignore[attr-defined]
        self.options: tuple[Options, ...] = gather(type(self).__name__, classes, options, keywords)

    def forward(self, *arguments: Any, **named: Any) -> LossOutput:
        """The tensors of the function, and its other arguments that are no options, in its order."""
        return self.function(*arguments, options=self.options, **named)

    def extra_repr(self) -> str:
        fields = {name: value for each in self.options for name, value in each.asdict().items()}
        return ", ".join(f"{name}={value!r}" for name, value in fields.items())


class LinearPEARLoss(LinearLoss):
    """`linear_pear_loss` (arXiv 2602.01058) as a module, with its keywords."""

    function = staticmethod(linear_pear_loss)

    @takes(*linear_pear_loss.option_classes)  # type: ignore[attr-defined]
    def __init__(self, *, options: Options | Sequence[Options] = (), **keywords: Unpack[PEARKeywords]):
        super().__init__(options, keywords)


class LinearWeightedLoss(LinearLoss):
    """`linear_weighted_loss` as a module, with its keywords: by a named weighting, or with weights in each call."""

    function = staticmethod(linear_weighted_loss)

    @takes(*linear_weighted_loss.option_classes)  # type: ignore[attr-defined]
    def __init__(
        self,
        weighting: str | None = None,
        *,
        options: Options | Sequence[Options] = (),
        **keywords: Unpack[WeightingConstants],
    ):
        super().__init__(options, keywords if weighting is None else {"weighting": weighting, **keywords})


class LinearDistillLoss(LinearLoss):
    """`linear_distill_loss` as a module, with its keywords."""

    function = staticmethod(linear_distill_loss)

    @takes(*linear_distill_loss.option_classes)  # type: ignore[attr-defined]
    def __init__(self, *, options: Options | Sequence[Options] = (), **keywords: Unpack[DistillKeywords]):
        super().__init__(options, keywords)


class LinearPolicyLoss(LinearLoss):
    """`linear_policy_loss` as a module, with its keywords."""

    function = staticmethod(linear_policy_loss)

    @takes(*linear_policy_loss.option_classes)  # type: ignore[attr-defined]
    def __init__(self, *, options: Options | Sequence[Options] = (), **keywords: Unpack[PolicyKeywords]):
        super().__init__(options, keywords)
