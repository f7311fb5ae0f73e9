"""LoRA and its kin as plain weights: merging that keeps the function, and folders that hold an adapter alone."""

import contextlib
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from pear.io import DataError

if TYPE_CHECKING:  # imported where it is needed: it takes a second
    from peft import PeftModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROW = 32  # tokens of the row whose logits are compared
# Largest difference of two passes over one row that rounding explains, as a share of the largest logit. Merged weights
# are rounded once more, to 8 or 11 bits: a few roundings add up over the layers.
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 2**-7, torch.bfloat16: 2**-5}


class MergeError(ValueError):
    """An adapter that cannot be merged into plain weights without changing what the model computes."""


def can_merge(model: torch.nn.Module) -> bool:
    """Whether `model` is an adapter on weights that it can be added to: no prompt learning, no quantised weights."""
    from peft import PeftModel

    return (
        isinstance(model, PeftModel)
        and hasattr(model.base_model, "merge_and_unload")
        and getattr(model, "hf_quantizer", None) is None
        and getattr(model.get_base_model(), "hf_quantizer", None) is None
    )


def merge(model: "PeftModel", autocast: AbstractContextManager | None = None) -> PreTrainedModel:
    """The plain model that computes what `model` does; `model` is used up.

    Tied input and output embeddings are one tensor until an adapter is on one of them, or on both with values of their
    own. They are two from here on, unless they end up equal.

    The logits of one row are compared before and after.

    Args:
        autocast: what the forward pass needs, if anything (flash attention does not run in float32)

    Raises:
        MergeError: the adapter has no merged form, or the merged model computes something else
    """
    base = model.get_base_model()
    try:
        before = logits(model, autocast)
        tied = _untie(base)
        merged = model.merge_and_unload()
        if tied:
            _tie_again(merged)
    except Exception as error:
        raise MergeError(f"merging failed with {type(error).__name__}: {' '.join(str(error).split()):.300}") from error
    if (off := difference(before, logits(merged, autocast))) > rounding(merged, autocast):
        raise MergeError(f"the merged model's logits differ from the adapter's by {off:.2g} of the largest")
    return merged


def logits(model: torch.nn.Module, autocast: AbstractContextManager | None = None) -> torch.Tensor:
    """Logits (T, V) of a row of T tokens spread over the vocabulary, in float32, without dropout."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    embeddings = base.get_input_embeddings().weight
    ids = torch.linspace(0, len(embeddings) - 1, ROW, device=embeddings.device).long()[None]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast or contextlib.nullcontext():
            return model(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        model.train(training)


def rounding(model: PreTrainedModel, autocast: AbstractContextManager | None) -> float:
    return ROUNDING.get(model.dtype if autocast is None else torch.bfloat16, 2**-5)


def difference(before: torch.Tensor, after: torch.Tensor) -> float:
    """The largest difference of two tensors of logits, as a share of the largest logit; inf for NaN in one of them."""
    off = (before - after.to(before.device)).abs().max() / before.abs().max().clamp(min=1e-6)
    return float("inf") if off.isnan() and not (before.isnan() & after.isnan()).any() else off.nan_to_num(0.0).item()


def _embeddings(model: PreTrainedModel) -> tuple[torch.nn.Module, torch.nn.Module] | None:
    """The modules, under any adapter, that hold the weights of the input and output embeddings."""
    found = model.get_input_embeddings(), model.get_output_embeddings()
    if None in found:
        return None
    modules = tuple(_plain(module) for module in found)
    return modules if all(getattr(module, "weight", None) is not None for module in modules) else None


def _plain(module: torch.nn.Module) -> torch.nn.Module:
    while (inner := getattr(module, "base_layer", getattr(module, "original_module", None))) is not None:
        module = inner
    return module


def _untie(base: PreTrainedModel) -> bool:
    """Give input and output embeddings a tensor each, where they share one and an adapter is on one of them."""
    modules = _embeddings(base)
    if modules is None or modules[0].weight is not modules[1].weight:
        return False
    adapted = {id(base.get_input_embeddings()), id(base.get_output_embeddings())} != {id(each) for each in modules}
    if adapted:
        modules[1].weight = torch.nn.Parameter(modules[1].weight.detach().clone(), requires_grad=False)
    return adapted


def _tie_again(merged: PreTrainedModel) -> None:
    first, second = _embeddings(merged)
    tied = torch.equal(first.weight, second.weight)
    if tied:
        second.weight = first.weight
    for config in {id(each): each for each in (merged.config, merged.config.get_text_config())}.values():
        if hasattr(config, "tie_word_embeddings"):
            config.tie_word_embeddings = tied
    if not tied:
        keys = getattr(merged, "all_tied_weights_keys", None) or {}
        names = {name for name, module in merged.named_modules() if module is second}
        merged.all_tied_weights_keys = {
            key: source for key, source in keys.items() if key.rpartition(".")[0] not in names
        }


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def read_adapter(name: str) -> dict[str, Any] | None:
    """The adapter_config.json of a folder that holds an adapter and no model of its own; None of any other name.

    Raises:
        DataError: the folder's adapter cannot be used: no safetensors, or a base that it does not name
    """
    folder = Path(name)
    path = folder / CONFIG
    if not path.is_file() or any(folder.glob("model*.safetensors")):
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"model {name!r}: {CONFIG} cannot be read ({type(error).__name__}: {error})") from None
    if not (folder / WEIGHTS).is_file():
        raise DataError(f"model {name!r} is an adapter folder without {WEIGHTS}; only safetensors are read")
    if not isinstance(base, str) or not base:
        raise DataError(
            f"model {name!r} is an adapter folder whose {CONFIG} names no base_model_name_or_path: write there the "
            "model that the adapter was trained on"
        )
    return config


def load_adapter(name: str, base: PreTrainedModel) -> PreTrainedModel:
    """`base` with the adapter of folder `name` merged into it; on quantised weights it stays beside them, active.

    Raises:
        DataError: the adapter does not belong to this base, or has no merged form
    """
    from peft import PeftModel

    try:
        model = PeftModel.from_pretrained(base, name, autocast_adapter_dtype=False)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        said = " ".join(str(error).split())
        raise DataError(f"model {name!r}: its adapter does not fit {base.name_or_path!r}: {said:.300}") from None
    if not can_merge(model):
        if not hasattr(model.base_model, "merge_and_unload"):
            raise DataError(
                f"model {name!r} is a {model.active_peft_config.peft_type} adapter, which has no weights to add to its "
                "base; use the base, or an adapter of another kind, such as LoRA"
            )
        return model.get_base_model()
    try:
        return merge(model).requires_grad_(True)  # PEFT froze the base
    except MergeError as error:
        raise DataError(f"model {name!r}: its adapter cannot be made part of its base: {error}") from error


def has_own_targets(config: PretrainedConfig) -> bool:
    """Whether PEFT knows by itself which modules of such a model get LoRA."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    return config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


def check_targets(config: PretrainedConfig, *given: Any) -> None:
    """DataError where LoRA is to be trained and neither the user, by any of `given`, nor PEFT says on which modules."""
    if not any(given) and not has_own_targets(config):
        raise DataError(
            f"use_peft: PEFT has no modules of its own for models of type {config.model_type!r}: give them by "
            "--lora_target_modules, such as --lora_target_modules all-linear"
        )
