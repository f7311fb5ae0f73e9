"""How many positions a transformers model has, and a check that a batch needs no more."""

from typing import Any

import torch
from torch import Tensor, nn


def position_limit(config: Any) -> int | None:
    """The longest sequence that a model with this config has positions for; None if nothing bounds it.

    The limit is `max_position_embeddings`, or `factor` times `original_max_position_embeddings` if RoPE scaling makes
    that longer. ALiBi, models without positions and dynamic RoPE scaling have no limit.
    """
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0 or getattr(config, "alibi", False):
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for scaling in [rope, *(layers for layers in rope.values() if isinstance(layers, dict))]:  # one per kind of layer
        if scaling.get("rope_type") == "dynamic":
            return None
        factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
        if factor and original:
            limit = max(limit, int(factor * original))
    return limit


def check_positions(
    model: nn.Module,
    tokens: int,
    position_ids: Tensor | None = None,  # (B, T)
    cu_seqlens: Tensor | None = None,  # (S+1,)
) -> None:
    """Raise ValueError if a sequence is longer than the model has positions for.

    A row has `tokens` tokens. In a pack, given by `cu_seqlens` or `position_ids`, each sequence is measured alone.
    """
    limit = position_limit(model.config)
    if limit is None or tokens <= limit:
        return
    lengths = position_ids if cu_seqlens is None else cu_seqlens
    if lengths is not None and lengths.is_meta:
        return  # there are no values to read
    if lengths is not None and not torch.compiler.is_compiling():
        tokens = int(lengths.max()) + 1 if cu_seqlens is None else int(lengths.diff().max())
    if tokens > limit and not (torch.compiler.is_compiling() and cu_seqlens is not None):
        raise ValueError(
            f"{type(model).__name__}: a sequence of {tokens} tokens, but the model has positions for {limit} (its "
            "config's max_position_embeddings). Cut the rows shorter, or load the model with a config that scales RoPE "
            "(rope_parameters) and has the longer max_position_embeddings."
        )
