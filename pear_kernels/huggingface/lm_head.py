"""The LM head of a transformers model: which heads the fused losses can read, and where their parameters are whole.

Nothing in this folder imports transformers: it inspects the model object itself.
"""

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class CausalLM(nn.Module):
    """For type checkers alone: what this folder uses of transformers' `PreTrainedModel`."""

    config: Any
    base_model: nn.Module
    forward: types.MethodType
    loss_function: Callable[..., Tensor]
    get_output_embeddings: Callable[[], nn.Linear]
    _pear_patch: Any  # `causal_lm.Patch` of a patched model


def check_linear(model: CausalLM) -> None:
    """Check that the LM head is a matrix, perhaps with a bias, that the losses can read.

    Raises:
        ValueError: naming the model's class, the reason and what to do.
    """
    name = type(model).__name__
    embeddings = getattr(model, "get_output_embeddings", None)
    head = None if embeddings is None else embeddings()
    if head is None or not hasattr(head, "weight"):
        raise ValueError(f"{name} has no output embeddings; give a causal language model")
    check_adapter(model)
    kind = type(innermost(head))
    homes = kind.__module__, type(head.weight).__module__  # torchao's weights report dtype bfloat16
    quantized = any(home.startswith(("bitsandbytes", "torchao")) for home in homes)
    if quantized or hasattr(head.weight, "quant_state") or head.weight.dtype not in DTYPES:
        raise ValueError(
            f"{name}: the LM head's weight has dtype {head.weight.dtype} ({homes[0]}.{kind.__name__}); quantised heads "
            "are not supported. Keep the head in bfloat16 or float32: with bitsandbytes, "
            'BitsAndBytesConfig(..., llm_int8_skip_modules=["lm_head"]).'
        )
    # PEFT wraps a tied head whose tokens are trained (`token_adapter`); the wrapper's weight includes those tokens.
    if kind.forward is not nn.Linear.forward and not hasattr(innermost(head), "token_adapter"):
        raise ValueError(
            f"{name}: the LM head is a {homes[0]}.{kind.__name__}, whose forward is its own and not that of nn.Linear: "
            "the loss multiplies by the head's weight alone. Give a causal language model with a linear head."
        )


def check_adapter(model: CausalLM) -> None:
    """Raise ValueError if PEFT has put an adapter on the head."""
    head = model.get_output_embeddings()
    if hasattr(head, "lora_A") or hasattr(head, "base_layer"):
        raise ValueError(
            f"{type(model).__name__}: a PEFT adapter on the LM head is not supported: the loss reads the head's "
            "weight, which does not hold the adapter. Leave the head (`lm_head`) out of the adapter's target modules."
        )


def innermost(head: nn.Module) -> nn.Linear:
    """The module that multiplies, inside PEFT's `modules_to_save` wrapper and FSDP1's wrapper."""
    leaf: Any = head  # wrappers have attributes that nn.Module does not declare
    while True:
        if hasattr(leaf, "modules_to_save") and hasattr(leaf, "original_module"):
            adapters = [name for name in leaf.active_adapters if name in leaf.modules_to_save]
            off = leaf.disable_adapters or not adapters
            leaf = leaf.original_module if off else leaf.modules_to_save[adapters[0]]
        elif hasattr(leaf, "_fsdp_wrapped_module"):
            leaf = leaf._fsdp_wrapped_module
        else:
            return cast(nn.Linear, leaf)


def run_with_parameters(
    head: nn.Module,
    hidden: Tensor,  # (B, T, D)
    function: Callable[[Tensor, Tensor, Tensor | None], Any],
) -> Any:
    """Call `function(hidden, weight, bias)` once, inside the model's forward, where weight and bias are whole.

    A head that is an FSDP unit of its own has whole parameters only during its own call. The function then runs inside
    that call, and gradients are reduced like any module's. (Parameters gathered by hand would miss the reduction over
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


def _gathered_by_deepspeed(*parameters: Any) -> contextlib.AbstractContextManager[Any]:
    """A context in which ZeRO-3 holds the parameters whole, as in TRL's `maybe_gather_lm_head_ctx`."""
    import deepspeed  # optional, but installed wherever a parameter has `ds_id`
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    missing = [p for p in parameters if p is not None and p.ds_status != ZeroParamStatus.AVAILABLE]
    return deepspeed.zero.GatheredParameters(missing) if missing else contextlib.nullcontext()


@contextlib.contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A context in which `module` calls `forward`; the module's hooks (FSDP's, for example) still run.

    Afterwards the previous `forward` is an attribute of the instance, even if it was its class's: `torch.compile` can
    trace setting an attribute, but not deleting one that did not exist when tracing began.
    """
    before = module.forward
    module.forward = forward
    try:
        yield
    finally:
        module.forward = before


@contextlib.contextmanager
def head_and_loss_replaced(
    model: CausalLM, head: Callable[[Tensor], Tensor], loss: Callable[..., Tensor]
) -> Iterator[None]:
    """A context in which `head` is the forward of the model's LM head and `loss` its `loss_function`.

    Afterwards `_loss_function` is an attribute of the instance; see `forward_replaced`.
    """
    before = model.loss_function
    with forward_replaced(innermost(model.get_output_embeddings()), head):
        model._loss_function = loss  # type: ignore[assignment]  # nn.Module types attributes as tensors or modules
        try:
            yield
        finally:
            model._loss_function = before  # type: ignore[assignment]


def accepted(function: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """Those of the arguments that the function has parameters for."""
    parameters = inspect.signature(function).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: value for name, value in arguments.items() if anything or name in parameters}
