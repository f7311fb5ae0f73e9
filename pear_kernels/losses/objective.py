"""A loss of the caller: `linear_objective_loss`."""

from collections.abc import Callable
from typing import Unpack

from torch import Tensor

from pear_kernels.engine.objective import Objective
from pear_kernels.engine.packing import Pack
from pear_kernels.losses.shared import LossOutput, checked_inputs, run_with
from pear_kernels.objectives.custom import objective_by
from pear_kernels.options import HeadKeywords, HeadOptions, Objects, gather, takes


@takes(HeadOptions)
def linear_objective_loss(
    hidden: Tensor,  # (N, D) or (B, T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) or (B, T)
    objective: Callable[[Pack], Objective],
    *,
    bias: Tensor | None = None,  # (V,)
    cu_seqlens: Tensor | None = None,  # (S+1,)
    valid_tokens: int | None = None,
    return_entropy: bool = False,
    options: Objects = (),
    **keywords: Unpack[HeadKeywords],
) -> LossOutput:
    """A loss of your own on an LM head, head included, without ever holding the (N, V) logits.

    As many matrix products as `linear_pear_loss` (a coupled objective: as that at sequence level).

    Args:
        hidden, weight, target, bias, cu_seqlens, valid_tokens, return_entropy: see `linear_pear_loss`.
        objective: a function from the call's `Pack` to an `Objective`, such as a subclass of it. The objective gets
            log-probs and returns their coefficients; the pack says where tokens stand, and `pack.take(values)` brings
            your (N, ...) tensors into its order. (`torch.compile` breaks the graph there.)
        options: an object of `HeadOptions`, as in `linear_pear_loss`.

    Returns:
        LossOutput. `weights` and `stats` are those that `Objective.finish` returns, the latter by the names in
        `Objective.stats`; "token_accuracy" (and "entropy") are added as in `linear_pear_loss`.

    Raises:
        ValueError, TypeError, torch.OutOfMemoryError, RuntimeError: as `linear_pear_loss`; also if the objective
            returns coefficients of another shape than one per token, or another number of statistics than it names.
    """
    if not callable(objective):
        raise TypeError(f"objective must be a function from a Pack to an Objective, got {type(objective).__name__}")
    given = gather("linear_objective_loss", (HeadOptions,), options, keywords)
    inputs = checked_inputs(hidden, weight, target, bias, None, valid_tokens, return_entropy, {}, cu_seqlens)
    return run_with(objective_by, objective, "linear_objective_loss", inputs, given)
