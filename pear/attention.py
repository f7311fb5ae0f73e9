"""Attention over packs: which implementation, and a trial on the model itself that no row reaches into another.

In a pack the rows stand one after the other and position ids start anew with each. flash-attn gets the rows' bounds;
flex, sdpa and eager get a block-diagonal mask that transformers builds where the positions restart. Not every model of
transformers passes them on (Falcon and AFMoE do not, in 5.23), and layers with a state (convolutions, linear attention)
need kernels of their own, so packs are tried out before any training.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pear.io import DataError
from pear.shown import one_line

HALF = (torch.float16, torch.bfloat16)
FLASH_HEAD = 256  # columns of a head that flash-attn takes, at most
FLEX_HEAD = 16  # and flex attention, at least


class Attention(NamedTuple):
    """What `attn_implementation` is to be; None leaves it to transformers."""

    name: str | None
    why: str


def choose_attention(
    config: PretrainedConfig, device: str, weights: torch.dtype | None, compute: torch.dtype | None
) -> Attention:
    """The attention for packs of this model: flash-attn, else flex, else sdpa, else eager.

    Args:
        device: "cuda", "cpu", ...
        weights: their dtype once loaded
        compute: that of products, which autocast may make narrower
    """
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model is None:
        return Attention(None, "transformers' own choice, of a model that is no causal language model to it")
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or _head_size(text)
    masked = "sdpa" if model._supports_sdpa else "eager"
    if device != "cuda":
        return Attention(
            masked, f"with a block-diagonal mask: flash-attn and flex attention train on a GPU, not {device}"
        )
    flash, flex = [], []  # why not
    if not is_flash_attn_2_available():
        flash.append("flash-attn is not installed")
    if not model._supports_flash_attn or "flash_attention_2" not in (
        getattr(model, "_compatible_flash_implementations", None) or ("flash_attention_2",)
    ):
        flash.append(f"{model.__name__} does not take flash-attn")
    if compute not in HALF:
        flash.append(f"flash-attn computes in bfloat16 or float16, not {compute}")
    if head > FLASH_HEAD:
        flash.append(f"heads of {head} are too wide for flash-attn")
    if not flash:
        return Attention("flash_attention_2", "flash-attn is installed, and is told where each row of a pack ends")
    if not model._supports_flex_attn:
        flex.append(f"{model.__name__} does not take flex attention")
    if weights not in HALF:  # autocast leaves queries in float32 there: refused by torch, or many times slower
        flex.append(f"flex attention wants weights in bfloat16 or float16, not {weights} (--dtype bfloat16)")
    if head < FLEX_HEAD:
        flex.append(f"heads of {head} are too narrow for flex attention")
    if getattr(text, "attention_dropout", 0.0):
        flex.append("flex attention has no dropout")
    if not flex:
        return Attention("flex_attention", f"with a mask by blocks that is never held whole; {flash[0]}")
    why = f"with a block-diagonal mask, whose memory grows with the square of a pack; {flash[0]}; {flex[0]}"
    return Attention(masked, why)


def _head_size(config: PretrainedConfig) -> int:
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "hidden_size", None)
    return width // heads if isinstance(heads, int) and isinstance(width, int) and heads else FLEX_HEAD


def attention_for(
    requested: str | None, args: SFTConfig, config: PretrainedConfig | None, dtype: str | torch.dtype | None, what: str
) -> str | None:
    """The `attn_implementation` to load a model with, said in a line where it is chosen here.

    Args:
        requested: a name, or None or "auto" for the choice
        config: of the model; None where there is none to read, which leaves the choice to transformers
        dtype: that it is loaded with
        what: it is called in the line
    """
    if requested not in (None, "auto"):
        return requested
    if config is None or not (args.packing or args.padding_free):
        return None
    chosen = choose_attention(config, args.device.type, *_dtypes(dtype, config, args.bf16, args.fp16))
    PartialState().print(one_line(f"attn_implementation of the {what}: {chosen.name or 'auto'} ({chosen.why})"))
    return chosen.name


def _dtypes(
    name: str | torch.dtype | None, config: PretrainedConfig, bf16: bool, fp16: bool
) -> tuple[torch.dtype, ...]:
    """(of the weights once loaded, of products), from the `dtype` that a model is loaded with and autocast's."""
    if name in (None, "auto"):
        name = getattr(config, "dtype", None) or torch.float32
    weights = getattr(torch, name) if isinstance(name, str) else name
    return weights, torch.bfloat16 if bf16 else torch.float16 if fp16 else weights


# ---------------------------------------------------------------------------------------------------------------------
# The trial

ROWS = (7, 9, 8)  # tokens of the rows of a trial pack, longer than the short convolutions of today's models
FAR, FAR_HALF = 0.02, 0.1  # relative differences, by median, that rounding never makes: in float32 (or TF32), in half


def check_packs(model: PreTrainedModel, tokens: Sequence[int], what: str = "model") -> None:
    """Run a small pack through a model's trunk and raise unless its rows are what they are alone.

    Two things must hold: the gradient of the middle row with respect to the embeddings of its neighbours is exactly
    0, which no rounding can blur; and the states are those of each row by itself, up to rounding, so positions start
    anew. It costs a forward and a backward of 24 tokens. Nothing is tried where weights are not there yet (on the meta
    device, or sharded by DeepSpeed ZeRO-3), nor where they are still on a device that the attention does not run on.

    Args:
        model: the causal language model itself, under PEFT
        tokens: ids of any text of its training data
        what: it is called in messages

    Raises:
        DataError: rows of a pack are not kept apart, by the model's name.
    """
    embeddings = model.get_input_embeddings()
    weight = next(embeddings.parameters(), None)
    attention = getattr(model.config, "_attn_implementation", None) or ""
    if weight is None or weight.is_meta or hasattr(weight, "ds_id"):
        return
    if weight.device.type == "cpu" and ("flash" in attention or "flex" in attention):
        return
    kept_apart = (
        f"packing and padding_free do not go with {what} {type(model).__name__} (attention {attention!r}, model type "
        f"{model.config.model_type!r})"
    )
    way_out = "Turn both off: rows are padded then, and the loss is the same."
    count = sum(ROWS)
    tokens = torch.tensor((list(tokens) * count)[:count])
    training = model.training
    model.eval()
    try:
        leak, difference = _try(model, embeddings, tokens)
    except (ValueError, NotImplementedError) as error:  # kernels that are missing, say
        raise DataError(f"{kept_apart}: {error} {way_out}") from error
    finally:
        model.train(training)
    if leak:
        raise DataError(f"{kept_apart}: its layers let the rows of a pack reach into each other. {way_out}")
    half = weight.dtype in HALF or torch.is_autocast_enabled(weight.device.type)
    if difference > (FAR_HALF if half else FAR):
        raise DataError(
            f"{kept_apart}: a row in a pack has other hidden states than alone (by {difference:.0%}), so positions do "
            f"not start anew with each row. {way_out}"
        )


def _try(model: PreTrainedModel, embeddings: torch.nn.Module, tokens: torch.Tensor) -> tuple[bool, float]:
    """(whether the middle row depends on its neighbours, median relative difference to rows alone)."""
    rows = tokens.split(ROWS)
    pack = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([{"input_ids": r.tolist()} for r in rows])
    pack = {name: x.to(model.device) if isinstance(x, torch.Tensor) else x for name, x in pack.items()}
    pack.pop("labels")
    embedded: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # some models scale it in place

    begin, end = ROWS[0], ROWS[0] + ROWS[1]
    hook = embeddings.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            hidden = model.base_model(**pack, use_cache=False).last_hidden_state[0]
            direction = torch.randn(hidden[begin:end].shape, generator=torch.Generator().manual_seed(0))
            middle = (hidden[begin:end] * direction.to(hidden)).sum()
            (gradient,) = torch.autograd.grad(middle, embedded[:1])
    finally:
        hook.remove()
    touched = gradient[0].ne(0).any(dim=-1)  # NaN counts
    touched[begin:end] = False
    with torch.no_grad():
        alone = [model.base_model(input_ids=row[None].to(model.device), use_cache=False) for row in rows]
        alone = torch.cat([output.last_hidden_state[0] for output in alone])
    difference = (hidden.detach() - alone).float().norm(dim=-1) / alone.float().norm(dim=-1).clamp(min=1e-12)
    return bool(touched.any()), difference.median().item()
