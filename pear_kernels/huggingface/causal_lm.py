"""`patch_causal_lm`: the fused loss behind `model(**inputs, labels=...)`, for any causal LM of transformers.

The model's own forward runs, with two of its parts replaced during the call. Its head keeps the hidden states that it
receives and returns a placeholder for the logits. Its `loss_function` receives the placeholder and runs the fused loss
over these hidden states. Whatever else a forward does (auxiliary losses of experts, caches, images) is unchanged.

What the forward does to logits between the two, a scale or a soft cap, is measured when the model is patched
(`treatment.py`), not read from names in its config.
"""

import copy
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar, Unpack, cast

import torch
from torch import Tensor, nn

from pear_kernels.huggingface import lm_head, shifted
from pear_kernels.huggingface.lm_head import CausalLM
from pear_kernels.huggingface.positions import check_positions
from pear_kernels.huggingface.treatment import Treatment, check_loss, checked_treatment
from pear_kernels.losses import LossOutput, pear, weighted
from pear_kernels.options import HeadOptions, PEARKeywords, Reduction, WeightingConstants, gather

COLUMNS = ("behavior_logprobs", "block_ids", "ref_logprobs")  # (B, T), unshifted
OF_MODEL = {"temperature", "softcap", "ignore_index"}  # options of a loss that the model itself determines
PLAIN = {*HeadOptions.names(), *Reduction.names()} - OF_MODEL  # options of a cross-entropy

Model = TypeVar("Model", bound=nn.Module)


class PatchKeywords(PEARKeywords, WeightingConstants, total=False):
    """Options of either loss. Those `OF_MODEL`, and those of the other loss, are an error when a model is patched."""

    return_entropy: bool


def patch_causal_lm(model: Model, *, weighting: str | None = None, **options: Unpack[PatchKeywords]) -> Model:
    """Make `model(**inputs, labels=...)` return the fused loss, without ever holding the (B, T, V) logits.

    With `input_ids` and `labels` (B, T), unshifted and -100 at tokens that do not count, the patched model returns the
    same output as before, with `logits` None and one more key, `log_probs` (B, T) float32 without gradients: log p of
    labels[t] given the tokens before t, 0 where the label is -100. `loss` is

    - without further columns, the mean cross-entropy as before, divided by `num_items_in_batch` if that is given,
      auxiliary losses of mixtures of experts included (but 0, not NaN, where no token counts);
    - with `behavior_logprobs` (B, T) float32, whose row t is about token t, PEAR's: `linear_pear_loss` with `options`,
      and with `block_ids` (B, T) if given. A model patched with an option of PEAR's weights (level, gamma, ...) needs
      them wherever gradients are recorded: for plain cross-entropy patch it again with `weighting="none"`. Under
      `torch.no_grad()`, as trainers evaluate, a call without them returns the cross-entropy;
    - with `weighting`: `linear_weighted_loss` of that name, which may require `ref_logprobs` (B, T).

    A row (1, T) with `cu_seq_lens_q` (S+1,) is a pack: sums along a sequence stop at its bounds, and its first token is
    no target. If only `position_ids` separate the sequences, the losses with such sums derive the bounds from these.
    transformers keeps attention within a sequence, for which it needs `position_ids` or flash attention. A call with
    `cu_seq_lens_q` or `position_ids` makes no cache unless `use_cache` asks for one, since a cache switches that off.

    Without `labels` nothing changes: logits, `generate` and caches are the unpatched model's.

    Args:
        model: a causal LM of transformers, or a PeftModel of one. Changed in place. Patch it before FSDP, DDP or
            `torch.compile` wrap it; adapters may be added before or after.
        weighting: a row of the table of `linear_weighted_loss`.
        options: of `linear_pear_loss` (level, gamma, block_size, log_ratio_clip, ..., workspace_bytes, backend), or
            with `weighting` of `linear_weighted_loss`. `reduction` may be changed if no call has `num_items_in_batch`.
            `gradient_tolerance` holds for plain cross-entropy too; loss and `log_probs` stay exact.

    Returns:
        The model. A second call replaces the options; `unpatch_causal_lm` undoes the patch.

    Raises:
        ValueError: naming the model's class and the reason: no linear head, a quantised one, an adapter on it, or a
            loss or logits that its forward makes in a way that the fused loss cannot repeat. When called: more tokens
            than the model has positions for, or arguments that do not go together.
        TypeError: an option that the loss does not have.
    """
    classes = pear.CLASSES if weighting is None else weighted.CLASSES
    allowed = {name for each in classes for name in each.names()} - OF_MODEL | {"return_entropy"}
    if unknown := sorted(options.keys() - allowed):
        raise TypeError(f"{unknown[0]} is no option of patch_causal_lm; it takes {', '.join(sorted(allowed))}")
    given = dict(options) if weighting is None else {**options, "weighting": weighting}
    fields = {name: value for name, value in given.items() if name != "return_entropy"}
    gather("patch_causal_lm", classes, (), fields)  # checks each value before the model is touched
    # here, since it imports torch._dynamo, which takes a second
    torch.compiler.assume_constant_result(_constant_class)  # type: ignore[no-untyped-call]
    inner = _causal_lm(model)
    patch = inner.__dict__.get("_pear_patch")
    if patch is None or not _in_place(inner):
        treatment = checked_treatment(inner, options.get("backend"))
        before = inner.__dict__.get("forward")
        if patch is None:
            hook = model.register_forward_hook(_check_output, with_kwargs=True)  # PEFT does not call its base's hooks
            patch = Patch({}, before, inner.__dict__.get("_loss_function"), treatment, hook)
        patch = patch._replace(forward=before, treatment=treatment)
        inner.forward = types.MethodType(_forward(inner), inner)
    inner._pear_patch = patch._replace(options=given)
    return model


def unpatch_causal_lm(model: Model) -> Model:
    """Undo `patch_causal_lm` and return the model; a model that is not patched stays as it is.

    Raises:
        ValueError: something else has wrapped the model's forward since (accelerate's mixed precision, for example).
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
    head = lm_head.innermost(inner.get_output_embeddings())
    own = head.__dict__.get("forward")
    if isinstance(own, types.MethodType) and own.__func__ is type(head).forward:  # what `forward_replaced` leaves
        del head.forward
    if patch.loss is None:
        inner.__dict__.pop("_loss_function", None)
    return model


def _in_place(model: CausalLM) -> bool:
    """Whether a patched model's forward is still the patch's, possibly wrapped by others."""
    forward: Callable[..., Any] | None = model.forward
    while forward is not None and not getattr(forward, "is_pear_patch", False):
        forward = getattr(forward, "__wrapped__", None)
    return forward is not None


def _check_output(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook: raise ValueError if another forward ran, which would silently ignore `behavior_logprobs`.

    accelerate's `unwrap_model` can remove the patch's forward, and with `use_liger_kernel` the Trainer replaces it by
    liger-kernel's.
    """
    if kwargs.get("labels") is not None and hasattr(output, "loss") and not hasattr(output, "log_probs"):
        raise ValueError(
            f"{type(model).__name__} is patched, but its forward was replaced since, and its loss is not the fused "
            "one: call patch_causal_lm again. With use_liger_kernel, keep liger-kernel's losses out: "
            'liger_kernel_config={"fused_linear_cross_entropy": False, "cross_entropy": False}'
        )


class Patch(NamedTuple):
    """The state of a patched model, in its attribute `_pear_patch`."""

    options: dict[str, Any]  # of the loss
    forward: Any  # the instance's own before the patch, if it had one
    loss: Any  # the instance's own `_loss_function` before the patch, if it had one
    treatment: Treatment  # of its logits
    hook: torch.utils.hooks.RemovableHandle  # of `_check_output`

    def __deepcopy__(self, memo: dict[int, Any]) -> "Patch":
        return Patch._make(copy.deepcopy(value, memo) for value in self)

    def __reduce__(self) -> NoReturn:
        """Refuse: a bound method is pickled by its name, so the copy would run its class's forward, unpatched."""
        raise TypeError(
            "a patched model cannot be pickled (by torch.save of a whole model, or on its way to a spawned process): "
            "save its state_dict, call unpatch_causal_lm first, or patch it in the process that runs it"
        )


def _causal_lm(model: Any) -> CausalLM:
    """The transformers model, without PEFT's wrapper."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    parts = ("get_output_embeddings", "loss_function")
    if not isinstance(inner, nn.Module) or not all(hasattr(inner, part) for part in parts):
        raise ValueError(
            f"model must be a causal language model of transformers, or a PeftModel of one, got {type(inner).__name__}:"
            " patch it before FSDP, DDP, torch.compile or another module wraps it"
        )
    if getattr(inner.forward, "is_pear_forward", False):
        raise ValueError(f"{type(inner).__name__} runs pear's own fused head (pear sft, pear rl): it needs no patch")
    return cast(CausalLM, inner)


def _forward(model: CausalLM) -> Callable[..., Any]:
    """The function that replaces `model.forward`."""
    original = model.forward.__func__  # not the bound method, so that a deep copy of the model runs its own forward
    signature = inspect.signature(original)
    positional = tuple(signature.parameters)[1:]

    @functools.wraps(original)
    def forward(self: CausalLM, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(positional, args, strict=False))
        given = {name: kwargs.pop(name, None) for name in COLUMNS}
        columns = {name: column for name, column in given.items() if column is not None}
        for name, column in {**columns, "cu_seq_lens_q": kwargs.get("cu_seq_lens_q")}.items():
            if column is not None and not isinstance(column, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(column).__name__}: have the collator make it one")
        if kwargs.get("labels") is None:
            if columns:
                raise ValueError(f"{next(iter(columns))} is given without labels, and the loss is made of both")
            return original(self, **kwargs)
        # The head may have been replaced, quantised or adapted since the patch. The whole check cannot be traced.
        lm_head.check_adapter(self) if torch.compiler.is_compiling() else lm_head.check_linear(self)
        check_loss(self)
        cu_seqlens, position_ids = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
        if (tokens := kwargs.get("input_ids")) is None:
            tokens = kwargs.get("inputs_embeds")
        if tokens is not None:  # otherwise the model's forward raises its own error
            check_positions(self, tokens.shape[1], position_ids, cu_seqlens)
        if kwargs.get("use_cache") is None and (cu_seqlens is not None or position_ids is not None):
            kwargs["use_cache"] = False  # with a cache, transformers would let sequences of a pack attend to each other
        returns_dict = self.config.return_dict if kwargs.get("return_dict") is None else kwargs["return_dict"]
        if not returns_dict:
            kwargs["return_dict"] = True
        call = PatchedCall(self, self._pear_patch.treatment, columns, cu_seqlens, position_ids)
        output = with_log_probs(call.run(original, **kwargs), call.found)
        return output if returns_dict else output.to_tuple()

    parameters = list(signature.parameters.values())
    last = [parameters.pop()] if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    # transformers' Trainer keeps those columns of a dataset whose names are in the signature
    columns = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in COLUMNS]
    signature = signature.replace(parameters=[*parameters, *columns, *last])
    forward.__dict__.update(__signature__=signature, is_pear_patch=True)
    return forward


@dataclasses.dataclass(eq=False)
class Call:
    """One run of a model's own forward, with `take` in place of its head and `loss` in place of its loss function.

    A subclass implements `loss`: it runs a fused loss by `multiply`, keeps the result of its first call in `found`, and
    returns the scalar that the model takes as its loss.
    """

    model: CausalLM
    treatment: Treatment
    columns: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # (B, T), unshifted
    cu_seqlens: Tensor | None = None  # (S+1,)
    position_ids: Tensor | None = None  # (B, T)
    hidden: Tensor = dataclasses.field(init=False)  # (B, T, D), once the head was called
    found: Any = None

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The output of the model's own `forward`, a function of its class."""
        with lm_head.head_and_loss_replaced(self.model, self.take, self.loss):
            output = forward(self.model, *args, **kwargs)
        if self.found is None:
            raise ValueError(f"{type(self.model).__name__}: its forward made no loss of the labels")
        return output

    def take(self, hidden: Tensor) -> Tensor:
        """Keep hidden (B, T, D) and return (B, T, 1) in place of logits."""
        self.hidden = hidden
        return torch.zeros_like(hidden[..., :1])

    def loss(self, logits: Tensor, labels: Tensor, *_: Any, **__: Any) -> Tensor:
        """Arguments and result of transformers' `ForCausalLMLoss`."""
        raise NotImplementedError

    def multiply(self, function: Callable[[Tensor, Tensor, Tensor | None], Any]) -> Any:
        """`function(hidden, weight, bias)` of the head's input and of those of its rows that have logits."""

        def without_padding(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            return function(hidden, *self.treatment.rows_of(weight, bias))

        return lm_head.run_with_parameters(self.model.get_output_embeddings(), self.hidden, without_padding)


class PatchedCall(Call):
    """A call of a model that `patch_causal_lm` has patched; `found` holds its log-probs (B, T)."""

    def loss(
        self,
        logits: Tensor,  # (B, T, 1)
        labels: Tensor,  # (B, T)
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = shifted.IGNORE,
        shift_labels: Tensor | None = None,  # (B, T)
        *_: Any,
        **__: Any,
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
        if ignore_index != shifted.IGNORE:
            options["ignore_index"] = ignore_index
        if shift_labels is not None and self.columns:
            raise ValueError(f"{next(iter(self.columns))} does not go with shift_labels: give labels, unshifted")

        def run(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> LossOutput:
            device = weight.device
            if isinstance(options.get("denominator"), Tensor):
                options["denominator"] = options["denominator"].to(device)
            cu_seqlens, target = self.cu_seqlens, given.to(device)
            if cu_seqlens is None and (self.columns or options.get("reduction") == "sequence_mean"):
                cu_seqlens = shifted.bounds(self.position_ids, target.shape)
            if shift_labels is None:
                target = shifted.targets(target, cu_seqlens, ignore_index)
            columns = {name: shifted.shift_left(column.to(device), 0) for name, column in self.columns.items()}
            return shifted.supervised_loss(hidden.to(device), weight, bias, target, columns, cu_seqlens, options)

        output: LossOutput = self.multiply(run)
        if self.found is None:  # a forward may compute further losses, of later tokens
            self.found = (shifted.shift_right(output.logprobs) if shift_labels is None else output.logprobs).float()
        return output.loss

    def _options(self, num_items_in_batch: Tensor | int | None) -> dict[str, Any]:
        """Options of `supervised_loss` for this call's arguments."""
        options = dict(self.model._pear_patch.options)
        weighting = options.get("weighting")
        for name in self.columns:
            if (name == "ref_logprobs") != (weighting is not None):
                raise ValueError(f"{name} does not go with weighting={weighting!r}, with which the model is patched")
        if weighting is None and "behavior_logprobs" not in self.columns:
            if self.columns:
                raise ValueError("block_ids is given without behavior_logprobs, and the loss is made of both")
            pears = [name for name in options if name not in PLAIN]
            if pears and torch.is_grad_enabled():
                raise ValueError(
                    f"behavior_logprobs is missing, but the model is patched with {pears[0]}={options[pears[0]]!r}, an "
                    "option of PEAR's weights, which are made of it: have the collator give it beside labels. For "
                    'plain cross-entropy call patch_causal_lm(model, weighting="none"), or evaluate under '
                    "torch.no_grad()."
                )
            options = {name: options[name] for name in options if name in PLAIN} | {"weighting": "none"}
        if num_items_in_batch is not None:
            if options.get("reduction", "mean") != "mean":
                raise ValueError(
                    f"num_items_in_batch counts tokens, and reduction {options['reduction']!r} divides by something "
                    "else: patch the model with reduction='mean', or leave num_items_in_batch out"
                )
            options["denominator"] = num_items_in_batch + (num_items_in_batch == 0)  # 0 / 1 where no token counts
        return options | self.treatment.options()


def with_log_probs(output: Any, log_probs: Tensor) -> Any:
    """`output`, a ModelOutput, without its logits and with a field `log_probs`."""
    fields = {name: value for name, value in output.items() if name != "logits"}
    return _constant_class(type(output))(**fields, log_probs=log_probs)


def _constant_class(kind: type) -> type:
    """`_class_with_log_probs`, which `torch.compile` calls instead of tracing it: see `patch_causal_lm`."""
    return _class_with_log_probs(kind)


@functools.cache
def _class_with_log_probs(kind: type) -> type:
    """A subclass with that field. It is a dataclass, since DDP takes outputs apart and rebuilds them by fields."""

    def __reduce__(self: Any) -> tuple[Any, ...]:  # by a function, since no module holds this class
        fields = dict(self.items())
        log_probs = fields.pop("log_probs", None)
        return with_log_probs, (kind(**fields), log_probs)

    fields = [("log_probs", Tensor | None, None)]
    return dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), namespace={"__reduce__": __reduce__})
