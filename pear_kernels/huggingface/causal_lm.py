"""`patch_causal_lm`: the fused loss behind `model(**inputs, labels=...)`, for any causal LM of transformers.

The model's own forward runs, with two of its parts replaced while it does. Its head hands on a few numbers in place of
logits, and its `loss_function`, when it is given these, runs our pass over the hidden states that the head was given.
So whatever else a forward does (auxiliary losses of experts, caches, images) is as before, by the same code.

What the forward does to logits between the two, a scale or a soft cap, is measured when the model is patched
(`treatment.py`), not read from names in its config.
"""

import copy
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pear_kernels.huggingface.agreement import checked_treatment
from pear_kernels.huggingface.lm_head import (
    check_adapter,
    check_linear,
    forget_forward,
    forward_replaced,
    innermost,
    run_with_parameters,
)
from pear_kernels.huggingface.positions import check_positions
from pear_kernels.huggingface.shifted import (
    IGNORE,
    bounds,
    first_tokens_ignored,
    shift_left,
    shift_right,
    supervised_loss,
)
from pear_kernels.huggingface.treatment import Treatment, check_loss, loss_replaced
from pear_kernels.losses import LossOutput, linear_pear_loss, linear_weighted_loss
from pear_kernels.options import check_backend

COLUMNS = ("behavior_logprobs", "block_ids", "ref_logprobs")  # (B, T), unshifted
_PLAIN = ("workspace_bytes", "backend", "reduction")  # the options of a cross-entropy
_NOT_OPTIONS = {
    *("hidden", "weight", "weights", "target", *COLUMNS, "reference", "bias", "cu_seqlens", "sequence_label"),
    *("sequence_scale", "denominator", "temperature", "softcap", "ignore_index", "group", "valid_tokens", "options"),
}


def patch_causal_lm(model: nn.Module, *, weighting: str | None = None, **options: Any) -> nn.Module:
    """Make `model(**inputs, labels=...)` return the fused loss, and never the (B, T, V) logits that it is made of.

    With `input_ids` and `labels` (B, T), unshifted and -100 at tokens that do not count, the patched model returns what
    it returned before, with `logits` None and one key more, `log_probs` (B, T) float32 without gradients: log p of
    labels[t] given what is before t, 0 where the label is -100. `loss` is

    - without more, the mean cross-entropy as before, divided by `num_items_in_batch` if that is given, auxiliary losses
      of mixtures of experts included (but 0, not NaN, where no token counts);
    - with `behavior_logprobs` (B, T) float32, whose row t is about token t: PEAR's, `linear_pear_loss` with `options`,
      and with `block_ids` (B, T) where these are given. Where gradients are recorded, a model that was patched with an
      option of PEAR's weights (level, gamma, ...) needs them: patch it once more, with `weighting="none"`, for plain
      cross-entropy. Under `torch.no_grad()`, as trainers evaluate, a call without them has the cross-entropy;
    - with `weighting`: `linear_weighted_loss` of that name, which may ask for `ref_logprobs` (B, T).

    A row (1, T) with `cu_seq_lens_q` (S+1,) is a pack: sums along a sequence stop at its bounds, and its first token is
    no target. Where only `position_ids` tell sequences apart, the losses with such sums read the bounds off these. That
    no token attends to another sequence is transformers' part, which needs `position_ids` or flash attention; a call
    with either of the two makes no cache unless asked to, since it is not done with one.

    Without `labels` nothing is changed: logits, `generate` and caches are the unpatched model's.

    Args:
        model: a causal LM of transformers, or a PeftModel of one. Changed in place. Patch it before FSDP, DDP or
            `torch.compile` wrap it; adapters may come before or after.
        weighting: a row of the table of `linear_weighted_loss`.
        options: of `linear_pear_loss` (level, gamma, block_size, log_ratio_clip, ..., workspace_bytes, backend), or
            with `weighting` of `linear_weighted_loss`. `reduction` may be changed where no `num_items_in_batch` comes.

    Returns:
        The model. A second call replaces the options; `unpatch_causal_lm` undoes it.

    Raises:
        ValueError: by the model's class and with the reason: no linear head, a quantised one, an adapter on it, a loss
            or logits that the model's forward makes in a way that our pass cannot repeat. When called: more tokens than
            the model has positions for, or arguments that do not go together.
        TypeError: an option that the loss does not have.
    """
    loss = linear_pear_loss if weighting is None else linear_weighted_loss
    allowed = {name for name in inspect.signature(loss).parameters if name not in _NOT_OPTIONS}
    if unknown := sorted(options.keys() - allowed):
        raise TypeError(f"{unknown[0]} is no option of patch_causal_lm; it takes {', '.join(sorted(allowed))}")
    if weighting is not None:
        options["weighting"] = weighting
    _check_values(options)
    torch.compiler.assume_constant_result(_constant_class)  # here, as it imports torch._dynamo, which takes a second
    inner = _causal_lm(model)
    patch = inner.__dict__.get("_pear_patch")
    if patch is None or not _in_place(inner):
        treatment = checked_treatment(inner, options.get("backend"))
        before = inner.__dict__.get("forward")
        if patch is None:
            hook = model.register_forward_hook(_check_output, with_kwargs=True)  # PEFT calls no hooks of its base
            patch = Patch({}, before, inner.__dict__.get("_loss_function"), treatment, hook)
        patch = patch._replace(forward=before, treatment=treatment)
        inner.forward = types.MethodType(_forward(inner), inner)
    inner._pear_patch = patch._replace(options=options)
    return model


def unpatch_causal_lm(model: nn.Module) -> nn.Module:
    """Undo `patch_causal_lm`, on a model that may never have been patched; returns the model.

    Raises:
        ValueError: something else wrapped the model's forward since (accelerate's mixed precision, say).
    """
    inner = _causal_lm(model)
    if (patch := inner.__dict__.get("_pear_patch")) is None:
        return model
    if not getattr(inner.__dict__.get("forward"), "is_pear_patch", False):
        raise ValueError(f"{type(inner).__name__}.forward was wrapped after it was patched: undo that first")
    patch.hook.remove()
    del inner._pear_patch, inner.forward
    if patch.forward is not None:
        inner.forward = patch.forward
    forget_forward(innermost(inner.get_output_embeddings()))
    if patch.loss is None:
        inner.__dict__.pop("_loss_function", None)
    return model


def _in_place(model: nn.Module) -> bool:
    """Whether a patched model's forward still is ours, perhaps within others."""
    forward = model.forward
    while forward is not None and not getattr(forward, "is_pear_patch", False):
        forward = getattr(forward, "__wrapped__", None)
    return forward is not None


def _check_output(model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """A hook: ValueError where another forward ran, which would take `behavior_logprobs` and say nothing.

    accelerate's `unwrap_model` can peel ours off, and for `use_liger_kernel` the Trainer puts liger-kernel's there.
    """
    if kwargs.get("labels") is not None and hasattr(output, "loss") and not hasattr(output, "log_probs"):
        raise ValueError(
            f"{type(model).__name__} is patched, but its forward was replaced since, and its loss is not ours: call "
            "patch_causal_lm again. With use_liger_kernel, keep liger-kernel's losses out: "
            'liger_kernel_config={"fused_linear_cross_entropy": False, "cross_entropy": False}'
        )


def _check_values(options: dict[str, Any]) -> None:
    """Raise what the loss says of its options, before a model is touched: by a loss of one token."""
    check_backend(options.get("backend"))
    given = {name: value for name, value in options.items() if name != "backend"}  # the model may be moved to it yet
    column = {"behavior_logprobs" if "weighting" not in options else "ref_logprobs": torch.zeros(1)}
    with torch.no_grad():
        supervised_loss(torch.zeros(1, 1), torch.zeros(2, 1), None, torch.zeros(1).long(), column, None, given)


class Patch(NamedTuple):
    """What a patched model holds."""

    options: dict[str, Any]  # of the loss
    forward: Any  # the instance's own before, if it had one
    loss: Any  # likewise its `_loss_function`
    treatment: Treatment  # of its logits
    hook: torch.utils.hooks.RemovableHandle  # of `_check_output`

    def __deepcopy__(self, memo: dict) -> "Patch":
        return Patch(*(copy.deepcopy(value, memo) for value in self))

    def __reduce__(self):
        """A method pickles as its name, so the copy would run its class's forward, and drop `behavior_logprobs`."""
        raise TypeError(
            "a patched model cannot be pickled (by torch.save of a whole model, or on its way to a spawned process): "
            "save its state_dict, call unpatch_causal_lm first, or patch it in the process that runs it"
        )


def _causal_lm(model: nn.Module) -> nn.Module:
    """The model of transformers under PEFT."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    parts = ("get_output_embeddings", "loss_function")
    if not isinstance(inner, nn.Module) or not all(hasattr(inner, part) for part in parts):
        raise ValueError(
            f"model must be a causal language model of transformers, or a PeftModel of one, got {type(inner).__name__}:"
            " patch it before FSDP, DDP, torch.compile or another module wraps it"
        )
    if getattr(inner.forward, "is_pear_forward", False):
        raise ValueError(f"{type(inner).__name__} runs pear's own fused head (pear sft, pear rl): it needs no patch")
    return inner


def _forward(model: nn.Module):
    """What replaces `model.forward`."""
    original = model.forward.__func__  # not the bound method, so that a deep copy of the model runs its own forward
    signature = inspect.signature(original)
    positional = tuple(signature.parameters)[1:]

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        kwargs.update(zip(positional, args, strict=False))
        columns = {name: kwargs.pop(name, None) for name in COLUMNS}
        columns = {name: column for name, column in columns.items() if column is not None}
        for name, column in {**columns, "cu_seq_lens_q": kwargs.get("cu_seq_lens_q")}.items():
            if column is not None and not isinstance(column, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(column).__name__}: have the collator make it one")
        if kwargs.get("labels") is None:
            if columns:
                raise ValueError(f"{next(iter(columns))} is given without labels, and the loss is made of both")
            return original(self, **kwargs)
        # the head may be another since, quantised or adapted; the whole check cannot be traced
        check_adapter(self) if torch.compiler.is_compiling() else check_linear(self)
        check_loss(self)
        cu_seqlens, position_ids = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
        if (tokens := kwargs.get("input_ids")) is None:
            tokens = kwargs.get("inputs_embeds")
        if tokens is not None:  # or the forward says what it needs
            check_positions(self, tokens.shape[1], position_ids, cu_seqlens)
        if kwargs.get("use_cache") is None and (cu_seqlens is not None or position_ids is not None):
            kwargs["use_cache"] = False  # with a cache, transformers would not keep the sequences of a pack apart
        returns_dict = self.config.return_dict if kwargs.get("return_dict") is None else kwargs["return_dict"]
        if not returns_dict:
            kwargs["return_dict"] = True
        call = PatchedCall(self, self._pear_patch, columns, cu_seqlens, position_ids)
        output = with_log_probs(call.run(original, **kwargs), call.found)
        return output if returns_dict else output.to_tuple()

    parameters = list(signature.parameters.values())
    last = [parameters.pop()] if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    # transformers' Trainer keeps the columns of a data set that it finds in the signature
    columns = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in COLUMNS]
    forward.__signature__ = signature.replace(parameters=[*parameters, *columns, *last])
    forward.is_pear_patch = True
    return forward


class Call:
    """One call of a model's own forward, with `take` in place of its head and `loss` in place of its loss function.

    A subclass has the `loss`, which runs our pass by `multiply`, keeps in `found` what the first call of it found, and
    returns what the model takes for the loss.
    """

    def __init__(self, model: nn.Module, treatment: Treatment):
        self.model, self.head, self.treatment = model, model.get_output_embeddings(), treatment
        self.hidden: Tensor | None = None  # (B, T, D)
        self.found: Any = None

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the model's own `forward`, a function of the class, returns."""
        with forward_replaced(innermost(self.head), self.take), loss_replaced(self.model, self.loss):
            output = forward(self.model, *args, **kwargs)
        if self.found is None:
            raise ValueError(f"{type(self.model).__name__}: its forward made no loss of the labels")
        return output

    def take(self, hidden: Tensor) -> Tensor:
        """Keep hidden (B, T, D) and return (B, T, 1) in place of logits."""
        self.hidden = hidden
        return torch.zeros_like(hidden[..., :1])

    def loss(self, logits: Tensor, labels: Tensor, *_: Any, **__: Any) -> Tensor:
        """What transformers' `ForCausalLMLoss` is given, and what it returns."""
        raise NotImplementedError

    def multiply(self, function: Callable[[Tensor, Tensor, Tensor | None], Any]) -> Any:
        """`function(hidden, weight, bias)` of what the head was given and its rows that have logits."""
        treatment = self.treatment
        return run_with_parameters(
            self.head, self.hidden, lambda hidden, *head: function(hidden, *treatment.rows_of(*head))
        )


class PatchedCall(Call):
    """A call of a model that `patch_causal_lm` has patched; `found` are its log-probs (B, T)."""

    def __init__(self, model: nn.Module, patch: Patch, columns: dict[str, Tensor], cu_seqlens, position_ids):
        super().__init__(model, patch.treatment)
        self.patch, self.columns = patch, columns
        self.cu_seqlens, self.position_ids = cu_seqlens, position_ids

    def loss(
        self,
        logits: Tensor,  # (B, T, 1)
        labels: Tensor,  # (B, T)
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORE,
        shift_labels: Tensor | None = None,  # (B, T)
        **_: Any,
    ) -> Tensor:
        if logits.shape[-1] != 1:
            raise ValueError(f"the model's forward has a loss of other logits, {tuple(logits.shape)}, than its head's")
        given = labels if shift_labels is None else shift_labels
        if given.shape != logits.shape[:-1] or logits.shape[:-1] != self.hidden.shape[:-1]:
            raise ValueError(
                f"labels must be (B, T) like the tokens, got {tuple(given.shape)} for hidden states of "
                f"{tuple(self.hidden.shape[:-1])}: leave logits_to_keep out where labels are given"
            )
        if self.cu_seqlens is not None and given.shape[0] != 1:
            raise ValueError(f"cu_seq_lens_q is of a pack, a row (1, T), but labels are {tuple(given.shape)}")
        options = self._options(num_items_in_batch)
        if ignore_index != IGNORE:
            options["ignore_index"] = ignore_index
        shifted = shift_labels is not None
        if shifted and self.columns:
            raise ValueError(f"{next(iter(self.columns))} does not go with shift_labels: give labels, unshifted")
        run = functools.partial(self._run, given, shifted, ignore_index, options)
        output: LossOutput = self.multiply(run)
        if self.found is None:  # a forward may have further losses, of tokens that come later
            self.found = (output.logprobs if shifted else shift_right(output.logprobs)).float()
        return output.loss

    def _options(self, num_items_in_batch: Tensor | int | None) -> dict[str, Any]:
        """Of `supervised_loss`, for what this call was given."""
        options = dict(self.patch.options)
        weighting = options.get("weighting")
        for name in self.columns:
            if (name == "ref_logprobs") != (weighting is not None):
                raise ValueError(f"{name} does not go with weighting={weighting!r}, with which the model is patched")
        if weighting is None and "behavior_logprobs" not in self.columns:
            if self.columns:
                raise ValueError("block_ids is given without behavior_logprobs, and the loss is made of both")
            pears = [name for name in options if name not in _PLAIN]
            if pears and torch.is_grad_enabled():
                raise ValueError(
                    f"behavior_logprobs is missing, but the model is patched with {pears[0]}={options[pears[0]]!r}, an "
                    "option of PEAR's weights, which are made of it: have the collator give it beside labels. For "
                    'plain cross-entropy call patch_causal_lm(model, weighting="none"), or evaluate under '
                    "torch.no_grad()."
                )
            options = {name: options[name] for name in _PLAIN if name in options} | {"weighting": "none"}
        if num_items_in_batch is not None:
            if options.get("reduction", "mean") != "mean":
                raise ValueError(
                    f"num_items_in_batch counts tokens, and reduction {options['reduction']!r} divides by something "
                    "else: patch the model with reduction='mean', or leave num_items_in_batch out"
                )
            options["denominator"] = num_items_in_batch + (num_items_in_batch == 0)  # 0 / 1 where no token counts
        return options | self.treatment.options()

    def _run(self, labels, shifted, ignore_index, options, hidden, weight, bias) -> LossOutput:
        device = weight.device
        if isinstance(options.get("denominator"), Tensor):
            options["denominator"] = options["denominator"].to(device)
        cu_seqlens = self.cu_seqlens
        if cu_seqlens is None and (self.columns or options.get("reduction") == "sequence_mean"):
            cu_seqlens = bounds(self.position_ids, labels.shape)
        labels = labels.to(device)
        if not shifted:
            labels = shift_left(first_tokens_ignored(labels, cu_seqlens, ignore_index), ignore_index)
        columns = {name: shift_left(column.to(device), 0) for name, column in self.columns.items()}
        return supervised_loss(hidden.to(device), weight, bias, labels, columns, cu_seqlens, options)


def with_log_probs(output: Any, log_probs: Tensor) -> Any:
    """`output`, a ModelOutput, without its logits and with `log_probs`, of a class that has that field too."""
    fields = {name: value for name, value in output.items() if name != "logits"}
    return _constant_class(type(output))(**fields, log_probs=log_probs)


def _constant_class(kind: type) -> type:
    """What `torch.compile` need not trace."""
    return _class_with_log_probs(kind)


@functools.cache
def _class_with_log_probs(kind: type) -> type:
    """A dataclass: what takes outputs apart and puts them together again (DDP does) goes by its fields."""

    def __reduce__(self):  # by a function, as no module has this class
        fields = dict(self.items())
        log_probs = fields.pop("log_probs", None)
        return with_log_probs, (kind(**fields), log_probs)

    fields = [("log_probs", Tensor | None, None)]
    return dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), namespace={"__reduce__": __reduce__})
