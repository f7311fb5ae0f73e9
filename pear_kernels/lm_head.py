"""The LM head of a transformers model: which can be read at all, where its parameters are whole.

Models are looked at through themselves: nothing here imports transformers.
"""

import contextlib
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_head(model: nn.Module) -> None:
    """ValueError, by the model's class and with what to do, unless its head is a matrix and perhaps a bias."""
    name = type(model).__name__
    if not isinstance(getattr(model, "forward", None), types.MethodType):
        raise ValueError(f"{name}.forward was replaced before (by a device_map's hooks, say); load the model without")
    embeddings = getattr(model, "get_output_embeddings", None)
    head = None if embeddings is None else embeddings()
    if head is None or not hasattr(head, "weight"):
        raise ValueError(f"{name} has no output embeddings; give a causal language model")
    if hasattr(head, "lora_A") or hasattr(head, "base_layer"):
        raise ValueError(
            f"{name}: a PEFT adapter on the LM head is not supported: the loss reads the head's weight, which does not "
            "hold the adapter. Leave the head (`lm_head`) out of the adapter's target modules."
        )
    kind = type(innermost(head))
    quantized = "bitsandbytes" in kind.__module__ or hasattr(head.weight, "quant_state")
    if quantized or head.weight.dtype not in DTYPES:
        raise ValueError(
            f"{name}: the LM head's weight has dtype {head.weight.dtype} ({kind.__name__}); quantised heads are not "
            "supported. Keep the head in bfloat16 or float32: with bitsandbytes, "
            'BitsAndBytesConfig(..., llm_int8_skip_modules=["lm_head"]).'
        )


def innermost(head: nn.Module) -> nn.Module:
    """The module that multiplies, under PEFT's `modules_to_save` and FSDP1's wrapper."""
    while True:
        if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
            adapters = [name for name in head.active_adapters if name in head.modules_to_save]
            off = head.disable_adapters or not adapters
            head = head.original_module if off else head.modules_to_save[adapters[0]]
        elif hasattr(head, "_fsdp_wrapped_module"):
            head = head._fsdp_wrapped_module
        else:
            return head


def run_with_parameters(
    head: nn.Module,
    hidden: Tensor,  # (B, T, D)
    function: Callable[[Tensor, Tensor, Tensor | None], Any],
) -> Any:
    """`function(hidden, weight, bias)` where these are whole: of an FSDP unit of its own, or under DeepSpeed ZeRO-3,
    that is only within the head's call, which is what then runs the function.

    So the gradients go the way that they go for any module. (Gathering the weight by hand would leave out the sum over
    processes, or do it twice.)
    """
    leaf = innermost(head)
    if _is_whole(head, leaf):
        return function(hidden, leaf.weight, getattr(leaf, "bias", None))

    def forward(hidden: Tensor) -> Any:
        if leaf.weight.dim() != 2 or not leaf.weight.numel():
            raise ValueError(
                f"the LM head's weight has shape {tuple(leaf.weight.shape)} within its own forward: it is sharded, and "
                "nothing gathers it. Call the model through the module that FSDP or DeepSpeed wrapped."
            )
        return function(hidden, leaf.weight, getattr(leaf, "bias", None))

    with forward_replaced(leaf, forward):
        return head(hidden)


def _is_whole(head: nn.Module, leaf: nn.Module) -> bool:
    weight = leaf.weight
    if hasattr(head, "_fsdp_wrapped_module") or hasattr(weight, "ds_id"):  # FSDP1, DeepSpeed ZeRO-3
        return False
    return not (hasattr(weight, "full_tensor") and hasattr(leaf, "unshard"))  # FSDP2, and not tensor parallelism


@contextlib.contextmanager
def forward_replaced(module: nn.Module, forward: Callable):
    """Within it, `module` calls `forward`; its hooks (FSDP's, say) stay.

    After it, the `forward` of before is the instance's own even where it was the class's: `torch.compile` sees that an
    attribute is set, but cannot take one away that was not there when it began.
    """
    before = module.forward
    module.forward = forward
    try:
        yield
    finally:
        module.forward = before


def forget_forward(module: nn.Module) -> None:
    """Take away what `forward_replaced` left, where that is what the class has anyway."""
    own = module.__dict__.get("forward")
    if isinstance(own, types.MethodType) and own.__func__ is type(module).forward:
        del module.forward
