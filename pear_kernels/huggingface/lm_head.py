"""The LM head of a transformers model: which can be read at all, where its parameters are whole.

Models are looked at through themselves: nothing here imports transformers.
"""

import contextlib
import inspect
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
    check_linear(model)


def check_linear(model: nn.Module) -> None:
    """What `check_head` says of the head, and not of the forward around it."""
    name = type(model).__name__
    embeddings = getattr(model, "get_output_embeddings", None)
    head = None if embeddings is None else embeddings()
    if head is None or not hasattr(head, "weight"):
        raise ValueError(f"{name} has no output embeddings; give a causal language model")
    check_adapter(model)
    kind = type(innermost(head))
    homes = kind.__module__, type(head.weight).__module__  # torchao's weights say that they are bfloat16
    quantized = any(home.startswith(("bitsandbytes", "torchao")) for home in homes)
    if quantized or hasattr(head.weight, "quant_state") or head.weight.dtype not in DTYPES:
        raise ValueError(
            f"{name}: the LM head's weight has dtype {head.weight.dtype} ({homes[0]}.{kind.__name__}); quantised heads "
            "are not supported. Keep the head in bfloat16 or float32: with bitsandbytes, "
            'BitsAndBytesConfig(..., llm_int8_skip_modules=["lm_head"]).'
        )
    # PEFT's trainable tokens of a tied head are a wrapper around it, whose weight holds them
    if kind.forward is not nn.Linear.forward and not hasattr(innermost(head), "token_adapter"):
        raise ValueError(
            f"{name}: the LM head is a {homes[0]}.{kind.__name__}, whose forward is its own and not that of nn.Linear: "
            "the loss multiplies by the head's weight alone. Give a causal language model with a linear head."
        )


def check_adapter(model: nn.Module) -> None:
    """ValueError where PEFT has put an adapter on the head."""
    head = model.get_output_embeddings()
    if hasattr(head, "lora_A") or hasattr(head, "base_layer"):
        raise ValueError(
            f"{type(model).__name__}: a PEFT adapter on the LM head is not supported: the loss reads the head's "
            "weight, which does not hold the adapter. Leave the head (`lm_head`) out of the adapter's target modules."
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
    """`function(hidden, weight, bias)`, called once and within the model's forward, where these are whole.

    A head that FSDP made a unit of its own has its parameters within its own call alone, so that is what then runs the
    function, and their gradients go the way of any module's. (Gathered by hand, they would miss the sum over
    processes.) A weight that tensor parallelism shards stays a DTensor.

    Raises:
        ValueError: the weight is not whole even there.
    """
    leaf = innermost(head)

    def forward(hidden: Tensor) -> Any:
        weight, bias = leaf.weight, getattr(leaf, "bias", None)
        if weight.dim() != 2 or not weight.numel():
            raise ValueError(
                f"the LM head's weight has shape {tuple(weight.shape)}: FSDP has sharded or flattened it, and nothing "
                "gathers it here. Call the outermost module that FSDP wrapped, not a module within it."
            )
        return function(hidden, weight, bias)

    if hasattr(leaf.weight, "ds_id"):
        with _gathered_by_deepspeed(leaf.weight, getattr(leaf, "bias", None)):
            return forward(hidden)
    fsdp1 = hasattr(head, "_fsdp_wrapped_module")
    fsdp2 = hasattr(leaf.weight, "full_tensor") and hasattr(leaf, "unshard")
    if not fsdp1 and not fsdp2:
        return forward(hidden)
    with forward_replaced(leaf, forward):
        return head(hidden)


def _gathered_by_deepspeed(*parameters: Tensor | None) -> contextlib.AbstractContextManager:
    """The context in which ZeRO-3 holds parameters whole, as in TRL's `maybe_gather_lm_head_ctx`."""
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    missing = [p for p in parameters if p is not None and p.ds_status != ZeroParamStatus.AVAILABLE]
    return deepspeed.zero.GatheredParameters(missing) if missing else contextlib.nullcontext()


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


def accepted(function: Callable, **arguments: Any) -> dict[str, Any]:
    """Those of the arguments that a function has parameters for."""
    parameters = inspect.signature(function).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: value for name, value in arguments.items() if anything or name in parameters}


def forget_forward(module: nn.Module) -> None:
    """Take away what `forward_replaced` left, where that is what the class has anyway."""
    own = module.__dict__.get("forward")
    if isinstance(own, types.MethodType) and own.__func__ is type(module).forward:
        del module.forward
