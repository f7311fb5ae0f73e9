"""Runs the decoder's trunk and then our pass over its hidden states, inside the model's own forward.

`add_fused_head(model)` teaches `model.forward` one more keyword, `pear`. With it the forward returns log-probs or the
PEAR loss and never makes logits; without it nothing changes, so `generate` works as before. It happens inside the
forward because that is where FSDP and DeepSpeed have the parameters gathered, and where autocast and PEFT are active.
"""

import contextlib
import functools
import types
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from pear.io import DataError
from pear_kernels import LossOutput, linear_logprobs, linear_pear_loss

IGNORE = -100
# How models name a constant that their logits are multiplied by, or (logits_scaling) divided by.
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def add_fused_head(model: PreTrainedModel) -> None:
    """Patch `model.forward`, once. Call it on the model itself, under PEFT and before FSDP or DDP wraps it.

    After it, with `input_ids` and `labels` (B, T) unshifted, labels -100 at every token that is not scored:

        model(input_ids=..., labels=labels, pear={})
            -> float32 (B, T): log p(labels[t] | before t), 0 where the label is -100
        model(input_ids=..., labels=labels, behavior_logprobs=b, pear={"level": "token", ...})
            -> LossOutput of `linear_pear_loss`, given what `pear` holds; `logprobs` and `weights` are (B, T) too

    Row t is about token t, as in `labels`; position 0 has nothing before it and is 0. With `cu_seq_lens_q` (S+1,), the
    batch is one row (1, T) of packed sequences, and the first token of each is such a position.

    Raises:
        DataError: the model's head does something that our pass cannot repeat exactly; the message names it.
    """
    if getattr(model, "_pear_fused_head", False):
        return
    head_options = logit_options(model.config.get_text_config())
    check_head(model)
    # The function, not the bound method, so that a deep copy of the model runs its own forward.
    original_forward = model.forward.__func__

    @functools.wraps(type(model).forward)  # the signature stays: `generate` and the Trainer read it
    def forward(self, *args, pear=None, labels=None, behavior_logprobs=None, **kwargs):
        if pear is None:
            if labels is not None:
                kwargs["labels"] = labels
            return original_forward(self, *args, **kwargs)
        # Trunk and head are looked up on each call: FSDP and PEFT replace them after patching.
        kwargs["use_cache"] = False
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        hidden = self.base_model(*args, **kwargs).last_hidden_state  # (B, T, D)
        weight, bias, gathered = _head_parameters(self)
        with gathered:
            return _run_head(
                hidden.to(weight.device), weight, bias, labels, behavior_logprobs, cu_seqlens, pear | head_options
            )

    model.forward = types.MethodType(forward, model)
    model._pear_fused_head = True


def _run_head(
    hidden: torch.Tensor,  # (B, T, D), or (1, T, D) with cu_seqlens
    weight: torch.Tensor,  # (V, D)
    bias: torch.Tensor | None,  # (V,)
    labels: torch.Tensor,  # (B, T), unshifted
    behavior_logprobs: torch.Tensor | None,  # (B, T), unshifted
    cu_seqlens: torch.Tensor | None,  # (S+1,)
    options: dict[str, Any],
) -> torch.Tensor | LossOutput:
    target = shift_left(first_tokens_ignored(labels.to(weight.device), cu_seqlens), IGNORE)
    if behavior_logprobs is None:
        return shift_right(linear_logprobs(hidden, weight, target, bias=bias, **options))
    behavior = shift_left(behavior_logprobs.to(weight.device), 0.0)
    if cu_seqlens is None:
        output = linear_pear_loss(hidden, weight, target, behavior, bias=bias, **options)
    else:
        output = linear_pear_loss(
            hidden[0], weight, target[0], behavior[0], bias=bias, cu_seqlens=cu_seqlens.to(weight.device), **options
        )
        output = output._replace(logprobs=output.logprobs[None], weights=output.weights[None])
    return output._replace(logprobs=shift_right(output.logprobs), weights=shift_right(output.weights))


def first_tokens_ignored(labels: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """Labels (B, T) with -100 where no earlier token of the same sequence can predict them."""
    labels = labels.clone()
    labels[:, 0] = IGNORE
    if cu_seqlens is not None:
        labels[0, cu_seqlens[:-1].long()] = IGNORE
    return labels


def shift_left(x: torch.Tensor, fill: float) -> torch.Tensor:
    """(B, T): what stands at t + 1, to meet the hidden state at t that predicts it."""
    return torch.cat([x[:, 1:], x.new_full((x.shape[0], 1), fill)], dim=1)


def shift_right(x: torch.Tensor) -> torch.Tensor:
    """(B, T): back from the position that predicts to the token that is predicted."""
    return torch.cat([x.new_zeros((x.shape[0], 1)), x[:, :-1]], dim=1)


def _head_parameters(
    model: PreTrainedModel,
) -> tuple[torch.Tensor, torch.Tensor | None, contextlib.AbstractContextManager]:
    """Weight and bias of the LM head, read once, and the context in which DeepSpeed ZeRO-3 holds them whole."""
    head = model.get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    if hasattr(weight, "full_tensor"):  # FSDP2 and tensor parallelism show sharded parameters as DTensors
        weight = weight.full_tensor()
        bias = None if bias is None else bias.full_tensor()
    if hasattr(weight, "ds_id"):  # DeepSpeed ZeRO-3 has partitioned it
        from trl.trainer.utils import maybe_gather_lm_head_ctx

        return weight, bias, maybe_gather_lm_head_ctx(weight, bias)
    return weight, bias, contextlib.nullcontext()


def check_head(model: PreTrainedModel) -> None:
    """Raise DataError where the head is more than a matrix and a bias."""
    head = model.get_output_embeddings()
    if not isinstance(getattr(model, "forward", None), types.MethodType):
        raise DataError(
            f"{type(model).__name__}.forward was replaced before (by a device_map's hooks, say); load the model without"
        )
    if head is None or not hasattr(head, "weight"):
        raise DataError(f"{type(model).__name__} has no output embeddings; give a causal language model")
    if not isinstance(getattr(model.base_model, "forward", None), types.MethodType) or model.base_model is model:
        raise DataError(f"{type(model).__name__} has no decoder trunk of its own (`base_model`); it cannot be used")
    if not any(child is head for child in model.children()):
        raise DataError(
            f"{type(model).__name__}: its output embeddings sit inside another module, which may do more than multiply "
            "(as the heads of BERT's kind do); give a causal language model with a linear head of its own"
        )
    if hasattr(head, "lora_A") or hasattr(head, "base_layer"):
        raise DataError(
            "a PEFT adapter on the LM head is not supported: the loss reads the head's weight, which does not hold the "
            "adapter. Leave the head (`lm_head`) out of the adapter's target modules."
        )
    if head.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise DataError(
            f"the LM head's weight has dtype {head.weight.dtype}; quantised heads are not supported. Keep the head in "
            "bfloat16 or float32."
        )


def logit_options(config: PretrainedConfig) -> dict[str, float]:
    """`softcap` and `temperature` of our pass that repeat what the model's own forward does to its logits.

    Raises:
        DataError: a logit scale that is no positive number, or a scale together with a softcap.
    """
    softcap = next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None)) is not None), None)
    scales = {name: getattr(config, name, None) for name in _MULTIPLIERS}
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        # The same name means a factor in HyperCLOVA X, and a divisor elsewhere (Granite, MiniCPM3).
        scales["logits_scaling"] = divisor if config.model_type == "hyperclovax" else 1 / divisor
    scales = {name: scale for name, scale in scales.items() if scale is not None and scale != 1}
    if not scales:
        return {} if softcap is None else {"softcap": float(softcap)}
    (name, scale), *more = scales.items()
    if more or isinstance(scale, str) or scale <= 0:
        raise DataError(f"model type {config.model_type!r}: logit scales {scales} in its config are not supported")
    if softcap is not None:
        raise DataError(
            f"model type {config.model_type!r} has both `{name}` = {scale} and `final_logit_softcapping` = {softcap}; "
            "their combination is not supported"
        )
    return {"temperature": 1 / float(scale)}
