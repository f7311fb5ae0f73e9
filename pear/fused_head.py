"""Runs our pass inside the model's own forward, over the hidden states that its head is given.

`add_fused_head(model)` teaches `model.forward` one more keyword, `pear`. With it the forward returns log-probs or one
of the losses of `pear_kernels` and never makes logits; without it nothing changes, so `generate` works as before. It
happens inside the forward because that is where FSDP and DeepSpeed have the parameters gathered, and where autocast and
PEFT are active. The model's forward itself runs, as it does for `patch_causal_lm`: see
`pear_kernels/huggingface/causal_lm.py`.
"""

import contextlib
import functools
import types
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from pear.io import DataError
from pear_kernels import LossOutput, linear_logprobs, linear_policy_loss, linear_topk_logprobs
from pear_kernels.huggingface.causal_lm import Call
from pear_kernels.huggingface.lm_head import accepted, forward_replaced, innermost
from pear_kernels.huggingface.shifted import (
    IGNORE,
    TOP_K,
    shift_left,
    shift_right,
    supervised_loss,
    targets,
)
from pear_kernels.huggingface.treatment import ADVICE, Treatment, checked_treatment

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
            for.

    Row t is about token t, as in `labels`; position 0 has nothing before it and is 0. With `cu_seq_lens_q` (S+1,), the
    batch is one row (1, T) of packed sequences, and the first token of each is such a position.

    PEFT's prompt tuning puts tokens before a row, and as many -100 before its labels: say their number by
    "virtual_tokens" in `pear`. The columns are filled up likewise, and results are about the labels that were given.

    Where a mixture of experts has an auxiliary loss (`output_router_logits`), it is `aux_loss` in a LossOutput's
    `stats` and in TRL's output, with its gradient, and no part of `loss`.

    Args:
        temperature: divides the logits, besides what the model's own forward does to them.
        entropy: whether TRL's keyword is answered with entropies too.
        float32: run the head in float32, outside autocast (TRL's `cast_lm_head_to_fp32`).
        offloaded: whether TRL's `activation_offloading` is on, which is kept away from the gradients that our pass
            has made already: they are needed first, and that of the weight is as large as the head.

    Raises:
        DataError: the model's forward does something that our pass cannot repeat exactly; the message names it.
    """
    treatment = check_model(model)
    model._pear_fused_head = FusedHead(treatment, temperature, entropy, float32, offloaded)  # the latest call's hold
    if getattr(model.forward, "is_pear_forward", False):  # ours, and nobody else's around it
        return
    # The function, not the bound method, so that a deep copy of the model runs its own forward.
    original_forward = model.forward.__func__
    fixed = accepted(original_forward, use_cache=False, return_dict=True)

    @functools.wraps(type(model).forward)  # the signature stays: `generate` and the Trainer read it
    def forward(self, *args, pear=None, labels=None, fused_lm_head=False, **kwargs):
        if pear is None and not fused_lm_head:
            if labels is not None:
                kwargs["labels"] = labels
            return original_forward(self, *args, **kwargs)
        columns = {name: kwargs.pop(name) for name in COLUMNS if kwargs.get(name) is not None}
        call = FusedCall(self, pear, columns, kwargs.get("cu_seq_lens_q"))
        output = call.run(original_forward, *args, labels=labels, **(kwargs | fixed))
        aux_loss = getattr(output, "aux_loss", None)
        if aux_loss is not None and isinstance(call.found, LossOutput):
            return call.found._replace(stats=call.found.stats | {"aux_loss": aux_loss})
        if pear is None:
            call.found.aux_loss = aux_loss
        return call.found

    forward.is_pear_forward = True
    model.forward = types.MethodType(forward, model)


class FusedHead(NamedTuple):
    """How `model.forward` runs our pass."""

    treatment: Treatment  # what the model's own forward does to its logits
    temperature: float
    entropy: bool
    float32: bool
    offloaded: bool

    def options(self) -> dict[str, float]:
        """Of our losses, what repeats the treatment and divides by the temperature."""
        return self.treatment._replace(temperature=self.treatment.temperature * self.temperature).options()


class FusedCall(Call):
    """A call with `pear`, or of TRL's where that is None; `found` is what it returns."""

    def __init__(self, model: PreTrainedModel, pear: dict[str, Any] | None, columns, cu_seqlens):
        self.fused: FusedHead = model._pear_fused_head
        super().__init__(model, self.fused.treatment, columns, cu_seqlens)
        self.pear = pear

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        if self.found is None:  # a forward may have further losses, of tokens that come later
            self.found = self.multiply(functools.partial(self._run, labels))
        return logits.new_zeros(())

    def _run(self, labels, hidden, weight, bias):
        autocast = contextlib.nullcontext()
        if self.fused.float32:
            hidden, autocast = hidden.float(), torch.autocast(hidden.device.type, enabled=False)
        kept = saved_tensors_hooks(_itself, _itself) if self.fused.offloaded else contextlib.nullcontext()
        with autocast, kept:
            if hasattr(weight, "full_tensor"):  # tensor parallelism shows a share of it, which not every loss takes
                weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
            hidden = hidden.to(weight.device)
            if self.pear is None:
                return _run_head_for_trl(hidden, weight, bias, labels, self.fused)
            options = self.pear | self.fused.options()
            virtual = options.pop("virtual_tokens", 0)
            columns = {name: _filled_up(column, virtual) for name, column in self.columns.items()}
            for name in ("teacher", "reference"):
                if virtual and options.get(name) is not None:
                    options[name] = options[name]._replace(hidden=_filled_up(options[name].hidden, virtual))
            return _cut(_run_head(hidden, weight, bias, labels, columns, self.cu_seqlens, options), virtual)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _filled_up(column: torch.Tensor, virtual: int) -> torch.Tensor:
    """(B, T, ...) -> (B, virtual + T, ...), with the first token's, which counts for nothing under labels of -100."""
    if not virtual or column.dim() < 2:
        return column
    return torch.cat([*[column[:, :1]] * virtual, column], dim=1)


def _cut(found: Any, virtual: int) -> Any:
    """What was found, (B, virtual + T, ...), about the T tokens."""
    if not virtual:
        return found
    if isinstance(found, torch.Tensor):
        return found[:, virtual:]
    if isinstance(found, LossOutput):
        return found._replace(logprobs=found.logprobs[:, virtual:], weights=found.weights[:, virtual:])
    logprobs, top = found
    return logprobs[:, virtual:], type(top)(*(x[:, virtual:] for x in top))


def _run_head(
    hidden: torch.Tensor,  # (B, T, D), or (1, T, D) with cu_seqlens
    weight: torch.Tensor,  # (V, D)
    bias: torch.Tensor | None,  # (V,)
    labels: torch.Tensor,  # (B, T), unshifted
    columns: dict[str, torch.Tensor],  # (B, T), unshifted; of `advantages` also (B,)
    cu_seqlens: torch.Tensor | None,  # (S+1,)
    options: dict[str, Any],
) -> torch.Tensor | LossOutput:
    target = targets(labels.to(weight.device), cu_seqlens)
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
            options["sequence_label"] = _first_flags(label, cu_seqlens)
        output = supervised_loss(hidden, weight, bias, target, columns, cu_seqlens, options)
    return output._replace(logprobs=shift_right(output.logprobs), weights=shift_right(output.weights))


def _first_flags(flags: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """(B,) or (S,): the flag (B, T) at the first token of each sequence. The flag of an empty sequence is arbitrary."""
    if cu_seqlens is None:
        return flags[:, 0]
    return flags[0, cu_seqlens[:-1].long().clamp(0, flags.shape[1] - 1)]


def _run_head_for_trl(hidden, weight, bias, labels, head: FusedHead):
    """TRL's fused output, its rows already shifted: (B, T - 1)."""
    from trl.trainer.utils import FusedCausalLMOutput

    target = labels.to(weight.device)[:, 1:].contiguous()
    options = head.options()
    found = linear_logprobs(hidden[:, :-1], weight, target, bias=bias, return_entropy=head.entropy, **options)
    logprobs, entropy = found if head.entropy else (found, None)
    return FusedCausalLMOutput(log_probs=logprobs, entropy=entropy, label_mask=target != IGNORE)


def check_model(model: PreTrainedModel) -> Treatment:
    """What a model does to its logits; DataError, by its name, where our pass cannot repeat what its forward does."""
    try:
        return checked_treatment(model)
    except ValueError as error:
        said = str(error).replace(ADVICE, "`pear` would not train what the model computes: give another model.")
        raise DataError(said) from None


def head_states(model: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    """(B, T, D): what a model's head is given, by the model's own forward without labels. No logits are made."""
    call = Call(model, Treatment())
    with forward_replaced(innermost(model.get_output_embeddings()), call.take):
        model(**inputs, **accepted(model.forward, use_cache=False))
    return call.hidden
