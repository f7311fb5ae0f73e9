"""How many positions a transformers model has, and that a batch needs no more."""

import torch
from torch import Tensor, nn


def position_limit(config) -> int | None:
    """The longest sequence that a model of this config has positions for; None where nothing bounds it.

    That is `max_position_embeddings`, or what RoPE scaling stretches it to (`factor` times
    `original_max_position_embeddings`). ALiBi, models without positions and dynamic RoPE scaling have no such bound.
    """
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0 or getattr(config, "alibi", False):
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for scaling in [rope, *(layers for layers in rope.values() if isinstance(layers, dict))]:  # by kinds of layers
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
    """ValueError where a sequence of a row of `tokens` is longer than the model has positions for. Of a pack, which
    `position_ids` or `cu_seqlens` show, each sequence counts by itself."""
    limit = position_limit(model.config)
    if limit is None or tokens <= limit:
        return
    lengths = position_ids if cu_seqlens is None else cu_seqlens
    if lengths is not None and lengths.is_meta:
        return  # no values to read
    if lengths is not None and not torch.compiler.is_compiling():
        tokens = int(position_ids.max()) + 1 if cu_seqlens is None else int(cu_seqlens.diff().max())
    if tokens > limit and not (torch.compiler.is_compiling() and cu_seqlens is not None):
        raise ValueError(
            f"{type(model).__name__}: a sequence of {tokens} tokens, but the model has positions for {limit} (its "
            "config's max_position_embeddings). Cut the rows shorter, or load the model with a config that scales RoPE "
            "(rope_parameters) and says the longer max_position_embeddings."
        )
