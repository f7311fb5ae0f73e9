"""Runs the decoder's trunk and then our pass over its hidden states, inside the model's own forward.

`add_fused_head(model)` teaches `model.forward` one more keyword, `pear`. With it the forward returns log-probs or one
of the losses of `pear_kernels` and never makes logits; without it nothing changes, so `generate` works as before. It
happens inside the forward because that is where FSDP and DeepSpeed have the parameters gathered, and where autocast and
PEFT are active.
"""

import contextlib
import functools
import types
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import PretrainedConfig, PreTrainedModel

from pear.io import DataError
from pear_kernels import LossOutput, linear_logprobs, linear_policy_loss, linear_topk_logprobs, lm_head
from pear_kernels.shifted import (
    IGNORE,
    TOP_K,
    first_flags,
    first_tokens_ignored,
    shift_left,
    shift_right,
    supervised_loss,
)

# How models name a constant that their logits are multiplied by, or (logits_scaling) divided by.
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


LOGPROBS = ("behavior_logprobs", "old_logprobs", "ref_logprobs")
COLUMNS = (*LOGPROBS, *TOP_K, "block_ids", "advantages", "sequence_label")  # (B, T), TOP_K (B, T, K), unshifted


def add_fused_head(
    model: PreTrainedModel,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    float32: bool = False,
    offloaded: bool = False,
) -> None:
    """Patch `model.forward`, once. Call it on the model itself, under PEFT and before FSDP or DDP wraps it.

    After it, with `input_ids` and `labels` (B, T) unshifted, labels -100 at every token that is not scored:

        model(input_ids=..., labels=labels, pear={})
            -> float32 (B, T): log p(labels[t] | before t), 0 where the label is -100
        model(input_ids=..., labels=labels, pear={"top_k": K, "top_k_temperature": 1.0})
            -> those log-probs, and a TopKTeacher of ids and log-probs (B, T, K): the K most likely tokens in the place
            of labels[t], at that temperature (which the log-probs before are not at); anything where it is -100
        model(input_ids=..., labels=labels, behavior_logprobs=b, pear={"level": "token", ...})
            -> LossOutput of `linear_pear_loss`, given what `pear` holds; `logprobs` and `weights` are (B, T) too. With
            `block_ids` (B, T), which here and below may stand beside `behavior_logprobs`, those are the blocks
        model(input_ids=..., labels=labels, behavior_logprobs=b, sequence_label=l, pear={"negative_lambda": 0.1, ...})
            -> the same with wrong answers: `sequence_label` is bool (B, T), False at all tokens of a wrong one
        model(input_ids=..., labels=labels, pear={"weighting": "dft", ...})
            -> LossOutput of `linear_weighted_loss`; with `ref_logprobs` (B, T) where the weighting needs them, or of
            "asft" with "reference": Teacher(...) in `pear`, as below
        model(input_ids=..., labels=labels, pear={"divergence": "forward", "teacher": Teacher(...), ...})
            -> LossOutput of `linear_distill_loss`, towards a teacher's hidden states (B, T, D') at the same positions;
            or without "teacher" to `top_k_ids` and `top_k_logprobs` (B, T, K), whose row t is about token t; weighted
            where `behavior_logprobs` are given
        model(input_ids=..., labels=labels, advantages=a, pear={"objective": "grpo", ...})
            -> LossOutput of `linear_policy_loss`; `advantages` are (B,) or (B, T), with `old_logprobs` and
            `ref_logprobs` (B, T) where there are any
        model(input_ids=..., labels=labels, fused_lm_head=True)
            -> what TRL's `add_fused_lm_head` returns, from our pass: `log_probs` (B, T - 1), and `entropy` if asked
            for. (Where router logits are asked for too, TRL's own: it makes the auxiliary loss of mixtures of experts.)

    Row t is about token t, as in `labels`; position 0 has nothing before it and is 0. With `cu_seq_lens_q` (S+1,), the
    batch is one row (1, T) of packed sequences, and the first token of each is such a position.

    Args:
        temperature: divides the logits, besides what the model's own forward does to them.
        entropy: whether TRL's keyword is answered with entropies too.
        float32: run the head in float32, outside autocast (TRL's `cast_lm_head_to_fp32`).
        offloaded: whether TRL's `activation_offloading` is on, which is kept away from the gradients that our pass
            has made already: they are needed first, and that of the weight is as large as the head.

    Raises:
        DataError: the model's head does something that our pass cannot repeat exactly; the message names it.
    """
    options = logit_options(model.config.get_text_config())
    if temperature != 1.0:
        options["temperature"] = temperature * options.get("temperature", 1.0)
    if getattr(model.forward, "is_pear_forward", False):  # ours, and nobody else's around it
        model._pear_fused_head = FusedHead(options, entropy, float32, offloaded)  # the latest call's hold
        return
    check_head(model)
    model._pear_fused_head = FusedHead(options, entropy, float32, offloaded)
    # The function, not the bound method, so that a deep copy of the model runs its own forward.
    original_forward = model.forward.__func__

    @functools.wraps(type(model).forward)  # the signature stays: `generate` and the Trainer read it
    def forward(self, *args, pear=None, labels=None, fused_lm_head=False, **kwargs):
        for_trl = fused_lm_head and not kwargs.get("output_router_logits")
        if pear is None and not for_trl:
            if labels is not None:
                kwargs["labels"] = labels
            if fused_lm_head:
                kwargs["fused_lm_head"] = True
            return original_forward(self, *args, **kwargs)
        head: FusedHead = self._pear_fused_head
        columns = {name: kwargs.pop(name) for name in COLUMNS if kwargs.get(name) is not None}
        # Trunk and head are looked up on each call: FSDP and PEFT replace them after patching.
        kwargs["use_cache"] = False
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        hidden = self.base_model(*args, **kwargs).last_hidden_state  # (B, T, D)
        autocast = contextlib.nullcontext()
        if head.float32:
            hidden, autocast = hidden.float(), torch.autocast(hidden.device.type, enabled=False)
        kept = saved_tensors_hooks(_itself, _itself) if head.offloaded else contextlib.nullcontext()

        def run(hidden, weight, bias):
            if hasattr(weight, "full_tensor"):  # tensor parallelism shows a share of it, which not every loss takes
                weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
            hidden = hidden.to(weight.device)
            if for_trl:
                return _run_head_for_trl(hidden, weight, bias, labels, head)
            return _run_head(hidden, weight, bias, labels, columns, cu_seqlens, pear | head.options)

        with autocast, kept:
            return lm_head.run_with_parameters(self.get_output_embeddings(), hidden, run)

    forward.is_pear_forward = True
    model.forward = types.MethodType(forward, model)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class FusedHead(NamedTuple):
    """How `model.forward` runs our pass."""

    options: dict[str, float]  # what repeats the model's own treatment of its logits
    entropy: bool
    float32: bool
    offloaded: bool


def _run_head(
    hidden: torch.Tensor,  # (B, T, D), or (1, T, D) with cu_seqlens
    weight: torch.Tensor,  # (V, D)
    bias: torch.Tensor | None,  # (V,)
    labels: torch.Tensor,  # (B, T), unshifted
    columns: dict[str, torch.Tensor],  # (B, T), unshifted; of `advantages` also (B,)
    cu_seqlens: torch.Tensor | None,  # (S+1,)
    options: dict[str, Any],
) -> torch.Tensor | LossOutput:
    target = shift_left(first_tokens_ignored(labels.to(weight.device), cu_seqlens), IGNORE)
    columns = {name: column.to(weight.device) for name, column in columns.items()}
    label = columns.pop("sequence_label", None)
    columns = {name: shift_left(column, 0) if column.dim() >= 2 else column for name, column in columns.items()}
    if not columns and not options.keys() & {"weighting", "divergence"}:
        top_k, top_k_temperature = options.pop("top_k", None), options.pop("top_k_temperature", 1.0)
        logprobs = shift_right(linear_logprobs(hidden, weight, target, bias=bias, **options))
        if top_k is None:
            return logprobs
        options["temperature"] = top_k_temperature * options.get("temperature", 1.0)
        top = linear_topk_logprobs(hidden, weight, target, top_k, bias=bias, **options)
        return logprobs, top._replace(ids=shift_right(top.ids), logprobs=shift_right(top.logprobs))
    if "advantages" in columns:
        old = columns.pop("old_logprobs", None)
        advantages = columns.pop("advantages")
        output = linear_policy_loss(hidden, weight, target, old, advantages, bias=bias, **columns, **options)
    else:
        if label is not None:  # the same at all tokens of a sequence, so its first one tells
            options["sequence_label"] = first_flags(label, cu_seqlens)
        output = supervised_loss(hidden, weight, bias, target, columns, cu_seqlens, options)
    return output._replace(logprobs=shift_right(output.logprobs), weights=shift_right(output.weights))


def _run_head_for_trl(hidden, weight, bias, labels, head: FusedHead):
    """TRL's fused output, its rows already shifted: (B, T - 1)."""
    from trl.trainer.utils import FusedCausalLMOutput

    target = labels.to(weight.device)[:, 1:].contiguous()
    found = linear_logprobs(hidden[:, :-1], weight, target, bias=bias, return_entropy=head.entropy, **head.options)
    logprobs, entropy = found if head.entropy else (found, None)
    return FusedCausalLMOutput(log_probs=logprobs, entropy=entropy, label_mask=target != IGNORE)


def check_head(model: PreTrainedModel) -> None:
    """Raise DataError where the head is more than a matrix and a bias, or does not get the trunk's hidden states."""
    try:
        lm_head.check_head(model)
    except ValueError as error:
        raise DataError(str(error)) from None
    if not isinstance(getattr(model.base_model, "forward", None), types.MethodType) or model.base_model is model:
        raise DataError(f"{type(model).__name__} has no decoder trunk of its own (`base_model`); it cannot be used")
    if not any(child is model.get_output_embeddings() for child in model.children()):
        raise DataError(
            f"{type(model).__name__}: its output embeddings sit inside another module, which may do more than multiply "
            "(as the heads of BERT's kind do); give a causal language model with a linear head of its own"
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
