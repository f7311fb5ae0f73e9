"""Between models and losses: row t of a model's inputs is about token t, row t of a loss's about token t + 1."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pear_kernels.losses import LossOutput, linear_distill_loss, linear_pear_loss, linear_weighted_loss
from pear_kernels.objectives.teachers import TopKTeacher
from pear_kernels.options import HeadOptions

IGNORE = HeadOptions.ignore_index
TOP_K = ("top_k_ids", "top_k_logprobs")


def first_tokens_ignored(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int = IGNORE) -> Tensor:
    """Labels (B, T) with `ignore_index` at the first token of each sequence, which no earlier token predicts."""
    labels = torch.nn.functional.pad(labels, (0, 1))  # an empty sequence at the end of a pack begins at T
    labels[:, 0] = ignore_index
    if cu_seqlens is not None:
        labels[0, cu_seqlens[:-1].long().clamp(0, labels.shape[1] - 1)] = ignore_index
    return labels[:, :-1].contiguous()


def shift_left(x: Tensor, fill: float) -> Tensor:
    """(B, T) or (B, T, K): row t + 1 moves to t, the position of the hidden state that predicts it."""
    return torch.cat([x[:, 1:], torch.full_like(x[:, :1], fill)], dim=1)


def shift_right(x: Tensor) -> Tensor:
    """(B, T) or (B, T, K): from the position that predicts back to the token that is predicted; row 0 is zero."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def targets(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int = IGNORE) -> Tensor:
    """(B, T): at t the label of token t + 1, or `ignore_index` if that begins another sequence."""
    return shift_left(first_tokens_ignored(labels, cu_seqlens, ignore_index), ignore_index)


def supervised_loss(
    hidden: Tensor,  # (B, T, D), or (1, T, D) with cu_seqlens
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (B, T), shifted
    columns: dict[str, Tensor],  # (B, T) or (B, T, K), shifted
    cu_seqlens: Tensor | None,  # (S+1,)
    options: dict[str, Any],
) -> LossOutput:
    """The loss that has these options, with results in target's shape. Top-k log-probs in `columns` are a teacher."""
    columns, options = dict(columns), dict(options)
    if cu_seqlens is not None:
        hidden, target = hidden[0], target[0]
        columns = {name: column[0] for name, column in columns.items()}
        options["cu_seqlens"] = cu_seqlens.to(weight.device)
        for name in ("teacher", "reference"):
            if (held := options.get(name)) is not None:
                options[name] = held._replace(hidden=held.hidden[0])
    if TOP_K[0] in columns:
        options["teacher"] = TopKTeacher(*(columns.pop(name) for name in TOP_K))
    loss: Callable[..., LossOutput] = linear_pear_loss
    if "weighting" in options:
        loss = linear_weighted_loss
    elif "divergence" in options:
        loss = linear_distill_loss
    output = loss(hidden, weight, target=target, bias=bias, **columns, **options)
    if cu_seqlens is not None:
        output = output._replace(logprobs=output.logprobs[None], weights=output.weights[None])
    return output


def bounds(position_ids: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """(S+1,): the sequences of a row (1, T), which begin wherever positions do not continue.

    None for other shapes, and on the meta device, where there are no values to read.
    """
    if position_ids is None or position_ids.shape != shape or shape[0] != 1 or position_ids.is_meta:
        return None
    starts = (position_ids[0].diff() != 1).nonzero()[:, 0] + 1
    return torch.cat([starts.new_zeros(1), starts, starts.new_full((1,), shape[1])])
