"""`model.generate` in stages: after every few tokens the rows that have ended leave the batch.

transformers' `generate` carries a row that has ended, token by token, until the longest one ends too; where lengths
differ, most of what it computes is padding. Here it is called for STAGE tokens at a time on the rows that are not yet
done, with one growing cache between the calls. The distribution of the completions is the same; the random numbers,
drawn for fewer rows, are others.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from pear.cache import growing_cache
from pear.io import DataError

STAGE = 16  # tokens a call
# Options that mean the same in stages; one that is set and not among them is left to one plain call.
STAGED = {
    "_from_model_config", "bos_token_id", "disable_compile", "do_sample", "eos_token_id", "max_length",
    "max_new_tokens", "min_p", "pad_token_id", "repetition_penalty", "temperature", "top_k", "top_p",
    "transformers_version", "use_cache",
}  # fmt: skip


def decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,  # (B, P), padded on the left
    attention_mask: torch.Tensor,  # (B, P), 0 at padding
    generation_config: GenerationConfig,
    generate: Callable[..., torch.Tensor] | None = None,
    **options: Any,
) -> torch.Tensor:
    """(B, P + T) token ids as `model.generate` returns them: rows that ended early are padded, T is the longest row's.

    `generate` is the model's own unless given. Where stages could mean something else (beams, several processes,
    models whose cache is no list of keys and values, options not in STAGED) it is called once, for everything.
    """
    generate = model.generate if generate is None else generate
    cache = growing_cache(model) if _can_be_staged(model, generation_config, options) else None
    if cache is None:
        return generate(
            input_ids=input_ids, attention_mask=attention_mask, generation_config=generation_config, **options
        )
    end = torch.as_tensor(generation_config.eos_token_id, device=input_ids.device)
    pad, left = generation_config.pad_token_id, generation_config.max_new_tokens
    width = input_ids.shape[1]
    out = input_ids.new_full((len(input_ids), width + left), pad)
    out[:, :width] = input_ids
    rows = torch.arange(len(input_ids), device=input_ids.device)  # which row of `out` each row in hand is
    ids, mask, longest = input_ids, attention_mask, width
    while left and len(rows):
        config = copy.deepcopy(generation_config)
        config.max_new_tokens = min(STAGE, left)
        grown = generate(input_ids=ids, attention_mask=mask, generation_config=config, past_key_values=cache, **options)
        new = grown[:, ids.shape[1] :]  # (R, S)
        out[rows, ids.shape[1] : grown.shape[1]] = new
        longest, left = grown.shape[1], left - new.shape[1]
        going = ~torch.isin(new, end).any(dim=1)
        mask = torch.cat([mask, mask.new_ones(new.shape)], dim=1)
        ids = grown
        if not going.all():
            kept = going.nonzero().squeeze(1)
            rows, ids, mask = rows[kept], ids[kept], mask[kept]
            if len(kept):
                cache.batch_select_indices(kept)
    return out[:, :longest]


def _can_be_staged(model: PreTrainedModel, config: GenerationConfig, options: dict[str, Any]) -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    given = {  # what the call leaves unset, `generate` takes from the model's own configuration
        name: value
        for each in (model.generation_config, config)
        for name, value in each.to_dict().items()
        if value is not None
    }
    return (
        not (distributed and torch.distributed.get_world_size() > 1)  # ranks would take part in each other's calls
        and all(name in STAGED or value is False for name, value in given.items())
        and options.keys() <= {"disable_compile"}
        and given.get("use_cache") is not False
        and config.max_new_tokens is not None
        and config.eos_token_id is not None
        and config.pad_token_id is not None
    )


@contextmanager
def finite_logits() -> Iterator[None]:
    """Logits of NaN, from which transformers cannot draw, are a DataError."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise DataError(
            "the model's logits are not finite (NaN), so no token can be drawn from it: its weights may be damaged, or "
            "its dtype too narrow"
        ) from error


@contextmanager
def decoding_in_stages(model: PreTrainedModel) -> Iterator[None]:
    """Within, `model.generate(input_ids=, attention_mask=, generation_config=)` is `decode`."""
    generate, own = model.generate, vars(model).get("generate")

    def staged(*args: Any, **kwargs: Any) -> torch.Tensor:
        needed = ("input_ids", "attention_mask", "generation_config")
        if args or any(kwargs.get(name) is None for name in needed):
            return generate(*args, **kwargs)
        return decode(model, generate=generate, **kwargs)

    model.generate = staged
    try:
        yield
    finally:
        if own is None:
            del model.generate  # the instance's; the class has its own
        else:
            model.generate = own
