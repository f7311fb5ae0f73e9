"""Argument checks: every error names the argument, what it got and what to do.

Two kinds. Checks of shapes, dtypes and options need no data and run before anything else, also while `torch.compile`
traces. Checks of values run inside the custom ops; on a CPU they raise, elsewhere they are device-side asserts, because
reading a value back would stall the stream. Such an assert prints its message and ends the process's use of the GPU.

PEAR_KERNELS_CHECK_VALUES=0 in the environment leaves the checks of values out, on a CPU too. What a call does with bad
values is then undefined.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pear_kernels.options import POSITIVE, check, is_integer, or_none

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOGPROBS = (torch.float32, torch.float64)
IDS = (torch.int32, torch.int64)
MAX_LOGPROB = 1e-4  # a log-prob may be this far above 0 by rounding; more is no log-prob
NO_RATIO = -1  # the block id of a token without a log-ratio
MAX_IDS = 2**31  # block ids are below this, so that a key of sequence and id is an int64
POLICY_OF = {  # whose each kind of log-probs are
    "behavior_logprobs": "its behaviour policy",
    "old_logprobs": "the policy before the update",
    "ref_logprobs": "the reference policy",
    "sampler_logprobs": "the policy as it was sampled from",
}
FINITE = {  # arguments that must be finite: the rule, and what to do
    "weights": ("weights must be finite where a token counts", ""),
    **dict.fromkeys(
        ("advantages", "sequence_advantages"),
        (
            "advantages must be finite",
            ": a reward was not finite, or was divided by the spread of a group whose rewards are all the same",
        ),
    ),
}
AGAIN = ": write them again with `pear score --top_k`"
P = ParamSpec("P")
VALUES_VARIABLE = "PEAR_KERNELS_CHECK_VALUES"


# ---- shapes and dtypes


class Kind(NamedTuple):
    """What a tensor argument must be."""

    dtypes: tuple[torch.dtype, ...]
    text: str  # the dtypes in an error
    remedy: str = ""
    one: str = ""  # of an argument (S,): what it has for each sequence; otherwise it has one value per token
    if_half: str = ""  # in place of `remedy` for half precision


FLOATS = Kind(DTYPES, "float32, bfloat16, float16 or float64")
TARGET = Kind((torch.int64,), "torch.int64 token ids", ": call target.long()")
BOUNDS = Kind(IDS, "torch.int32 or torch.int64")
LOGPROB = Kind(  # half precision rounds a log-prob by 4e-3, and the errors add up along the suffix
    LOGPROBS,
    "float32 (or float64)",
    if_half=": half precision is too coarse for ratios, so score again in float32 rather than cast",
)
KINDS = {
    **dict.fromkeys(POLICY_OF, LOGPROB),
    "weights": Kind(LOGPROBS, "float32 (or float64)", ": call weights.float()"),
    "block_ids": Kind(IDS, "torch.int32 or torch.int64", ": call block_ids.int()"),
    "mask": Kind((torch.bool,), "torch.bool, True at response tokens", ": call mask.bool()"),
    "sequence_label": Kind(
        (torch.bool,), "torch.bool, True where the response is right", ": call sequence_label.bool()", "flag"
    ),
    "sequence_scale": Kind((), "any dtype", one="number"),
}


def same_shape(name: str, tensor: Tensor, like: str, shape: Sequence[int]) -> None:
    check_tensor(name, tensor)
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have {like} {tuple(shape)}, got {tuple(tensor.shape)}")


def same_device(hidden: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{name} must be on the device of the other arguments, {hidden.device}, got {tensor.device}: "
                f"move it with {name}.to({str(hidden.device)!r})"
            )


def check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")


def check_dtype(name: str, tensor: Tensor, kind: Kind) -> None:
    check_tensor(name, tensor)
    if kind.dtypes and tensor.dtype not in kind.dtypes:
        half = kind.if_half and tensor.dtype in (torch.bfloat16, torch.float16)
        raise TypeError(f"{name} must be {kind.text}, got {tensor.dtype}{kind.if_half if half else kind.remedy}")


def check_columns(
    columns: Mapping[str, Tensor | None],  # by their names, which `KINDS` has; those that are None are left out
    like: Tensor,  # (N,) or (B, T)
    cu_seqlens: Tensor | None,  # checked here, too
    shape: str = "target's shape",  # the shape of `like`, in an error
    padded: str = "hidden is (B, T, D)",
) -> None:
    """The tensors that a function takes beside a head."""
    check_cu_seqlens_kind(cu_seqlens, like.dim(), padded)
    for name, column in columns.items():
        if column is not None:
            kind = KINDS[name]
            if kind.one:
                same_shape(name, column, f"(S,), one {kind.one} per sequence", sequence_count(like, cu_seqlens))
            else:
                same_shape(name, column, shape, like.shape)
            check_dtype(name, column, kind)
    same_device(like, **columns, cu_seqlens=cu_seqlens)


def check_cu_seqlens_kind(cu_seqlens: Tensor | None, dims: int, padded: str) -> None:
    """`cu_seqlens` goes with packs, and is a vector of integers."""
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor (S+1,) of int32 or int64, got {type(cu_seqlens).__name__}")
    if dims == 2:
        raise ValueError(
            f"cu_seqlens is for packs, but {padded}, one sequence per row: leave it out, or flatten to a pack"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must be (S+1,) with S >= 1, got shape {tuple(cu_seqlens.shape)}")
    check_dtype("cu_seqlens", cu_seqlens, BOUNDS)


def sequence_count(target: Tensor, cu_seqlens: Tensor | None) -> tuple[int]:
    """(S,): rows of (B, T), or the sequences between the bounds of a pack."""
    return (target.shape[0] if target.dim() == 2 else (1 if cu_seqlens is None else cu_seqlens.numel() - 1),)


def sequence_bounds(like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(S+1,) bounds of the flat tokens: the pack's own, one sequence per row for (B, T), or one sequence for (N,)."""
    if cu_seqlens is not None:
        return cu_seqlens.contiguous()
    rows, length = like.shape if like.dim() == 2 else (1, like.numel())
    return torch.arange(rows + 1, device=like.device) * length


def check_head(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, autocast: bool, least_rows: int = 2
) -> None:
    """`hidden` (N, D) or (B, T, D), `weight` (V, D), `target` of hidden's leading shape, `bias` (V,)."""
    if hidden.dim() not in (2, 3):
        raise ValueError(f"hidden must be (N, D) or (B, T, D), got shape {tuple(hidden.shape)}")
    if sharded_away(weight, least_rows):
        raise ValueError(
            f"weight must be (V, D), whole, got shape {tuple(weight.shape)} with {weight.numel()} numbers: FSDP or "
            "DeepSpeed has flattened it or taken it away, as they do outside the forward of the module that they "
            "wrapped. Compute the loss within that forward (pear_kernels.patch_causal_lm does), or gather the weight "
            "for it (FullyShardedDataParallel.summon_full_params, deepspeed.zero.GatheredParameters)"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be (V, D) with hidden's D = {hidden.shape[-1]}, got shape {tuple(weight.shape)}: "
            "pass the LM head's weight as nn.Linear stores it"
        )
    if weight.shape[0] < least_rows:
        raise ValueError(f"weight must have a vocabulary of at least 2 rows, got shape {tuple(weight.shape)}")
    same_shape("target", target, "hidden's leading shape", hidden.shape[:-1])
    check_dtype("target", target, TARGET)
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        check_dtype(name, tensor, FLOATS)
    if bias is not None:
        same_shape("bias", bias, "(V,)", weight.shape[:1])
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is not None and operand.dtype != hidden.dtype and not autocast:
            raise TypeError(
                f"hidden and {name} must have one dtype outside autocast, got {hidden.dtype} and {operand.dtype}: "
                "cast one of them, or run under torch.autocast"
            )
    same_device(hidden, weight=weight, target=target, bias=bias)


def sharded_away(weight: Tensor, least_rows: int) -> bool:
    """Whether a weight is what FSDP1 or ZeRO-3 leave of one: flat, empty, or a shape without memory."""
    if weight.dim() == 1 or (weight.dim() == 2 and weight.shape[0] < least_rows and not weight.numel()):
        return True
    if torch.compiler.is_compiling() or type(weight) not in (Tensor, torch.nn.Parameter) or weight.is_meta:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(weight):  # it refuses to give its storage
        return False
    return weight.numel() > 0 and weight.untyped_storage().size() == 0


def check_denominator(hidden: Tensor, denominator: Tensor) -> None:
    """One number in a tensor. (`CallOptions` checks a number.)"""
    if denominator.numel() != 1:
        raise ValueError(f"denominator must hold one number, got a tensor of shape {tuple(denominator.shape)}")
    same_device(hidden, denominator=denominator)


def check_advantages(target: Tensor, advantages: Tensor, cu_seqlens: Tensor | None) -> None:
    """One per sequence or per token."""
    check_tensor("advantages", advantages)
    count = sequence_count(target, cu_seqlens)
    if tuple(advantages.shape) not in (count, tuple(target.shape)):
        raise ValueError(
            f"advantages must be (S,) = {count}, one per sequence, or have target's shape {tuple(target.shape)}, "
            f"one per token, got {tuple(advantages.shape)}"
        )
    if not advantages.is_floating_point():
        raise TypeError(f"advantages must be floating-point, got {advantages.dtype}: call advantages.float()")
    same_device(target, advantages=advantages)


def check_level_of_blocks(block_ids: Tensor | None, level: str) -> None:
    if block_ids is not None and level == "token":
        raise ValueError(
            "block_ids must be None at level 'token', where every token is its own block: use level 'block'"
        )


def check_teacher(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    teacher: Any,  # `objectives.teachers.Teacher`
    autocast: Callable[[Tensor, Tensor], torch.dtype | None],  # to which dtype operands are rounded, if to any
    argument: str = "teacher",
) -> None:
    """A teacher in memory: hidden states and a head over the student's vocabulary."""
    x, w, bias, temperature, softcap = teacher
    for name, tensor in ((f"{argument}.hidden", x), (f"{argument}.weight", w)):
        check_dtype(name, tensor, FLOATS)
    if x.dim() != hidden.dim() or x.shape[:-1] != target.shape:
        raise ValueError(
            f"{argument}.hidden must have target's shape {tuple(target.shape)} and its own hidden size last, got "
            f"{tuple(x.shape)}"
        )
    if w.dim() != 2 or w.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{argument}.weight must be (V, D') with its hidden states' D' = {x.shape[-1]}, got {tuple(w.shape)}"
        )
    if w.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{argument}.weight has a vocabulary of {w.shape[0]}, and weight one of {weight.shape[0]}: a divergence "
            "needs the same tokens. If the longer one only has padding rows at its end, cut these off; else use "
            "another model"
        )
    if x.dtype != w.dtype and autocast(x, w) is None:
        raise TypeError(
            f"{argument}.hidden and {argument}.weight must have one dtype outside autocast, got {x.dtype} and "
            f"{w.dtype}: cast one of them, or run under torch.autocast"
        )
    if bias is not None:
        same_shape(f"{argument}.bias", bias, "(V,)", w.shape[:1])
    check(f"{argument}.temperature", temperature, POSITIVE)
    check(f"{argument}.softcap", softcap, or_none(POSITIVE, "be a positive number, or None"))
    same_device(hidden, **{f"{argument}.hidden": x, f"{argument}.weight": w, f"{argument}.bias": bias})


def check_top_k_teacher(hidden: Tensor, target: Tensor, teacher: tuple[Tensor, Tensor], vocabulary: int) -> None:
    """A teacher known by its K most likely tokens at each position."""
    ids, logprobs = teacher
    for name, tensor in (("teacher.ids", ids), ("teacher.logprobs", logprobs)):
        check_tensor(name, tensor)
        if tensor.dim() != target.dim() + 1 or tensor.shape[:-1] != target.shape:
            raise ValueError(
                f"{name} must have target's shape {tuple(target.shape)} and K last, got {tuple(tensor.shape)}"
            )
    same_shape("teacher.logprobs", logprobs, "the shape of teacher.ids", ids.shape)
    check_dtype("teacher.ids", ids, Kind(IDS, "torch.int64 or torch.int32"))
    check_dtype("teacher.logprobs", logprobs, LOGPROB)
    check_k("teacher.ids", ids.shape[-1], vocabulary)
    same_device(hidden, **{"teacher.ids": ids, "teacher.logprobs": logprobs})


def check_k(name: str, k: int, vocabulary: int) -> None:
    if not (is_integer(k) and k < vocabulary):
        raise ValueError(
            f"{name} must have a K of at least 1 and less than the vocabulary's {vocabulary} tokens, got {k!r}"
        )


# ---- values


def require(condition: Tensor, rule: str, found: Callable[[], str]) -> None:
    """ValueError "rule, got found" unless the 0-d bool tensor holds; off the CPU an assert on the device that says
    `rule` (less than 255 bytes), with no host sync: `found` reads values, so it is for the CPU alone."""
    if condition.device.type != "cpu":
        torch.ops.aten._assert_async.msg(condition, f"pear_kernels: {rule}")
    elif not bool(condition):
        raise ValueError(f"{rule}, got {found()}")


def values_are_checked() -> bool:
    """False where PEAR_KERNELS_CHECK_VALUES=0 switches the checks of values off."""
    setting = os.environ.get(VALUES_VARIABLE) or "1"
    if setting not in ("0", "1"):
        raise ValueError(f"{VALUES_VARIABLE} must be 0 (no checks of values) or 1, got {setting!r}")
    return setting == "1"


def value_check(function: Callable[P, None]) -> Callable[P, None]:
    """A check that PEAR_KERNELS_CHECK_VALUES=0 switches off."""

    @functools.wraps(function)
    def unless_switched_off(*arguments: P.args, **named: P.kwargs) -> None:
        if values_are_checked():
            function(*arguments, **named)

    return unless_switched_off


def none_of(bad: Tensor, rule: str, found: Callable[[int], object], remedy: str = "", such: str = "such") -> None:
    """`require` that no element of `bad` (k,) holds; `found` gives the value at a flat position."""

    def where() -> str:
        at = int(bad.nonzero()[0])
        return f"{found(at)} at flat position {at} ({int(bad.sum())} {such}){remedy}"

    require(~bad.any(), rule, where)


def shown(values: Tensor) -> str:
    """A number, or the first 20 of several."""
    return f"{values.tolist()[:20] if values.dim() else values.item()}"


def shown_at(values: Tensor, at: int) -> str:
    return shown(values[at])


@value_check
def check_values(columns: Mapping[str, Tensor], valid: Tensor, vocabulary: int = 0, ignore_index: int = 0) -> None:
    """Checks the values of every tensor in `columns` that has a rule, by the name of the argument.

    `valid` (N,) bool says which tokens count; values at other tokens are not checked. Nor is a behaviour log-prob of a
    token without a log-ratio. `backends.triton.values` has the same rules in one kernel.
    """
    block_ids = columns.get("block_ids")
    paired = valid if block_ids is None else valid & (block_ids > NO_RATIO)
    for name, column in columns.items():
        found = functools.partial(shown_at, column)
        if name == "target":
            rule = f"target must be in [0, {vocabulary}) or ignore_index ({ignore_index})"
            none_of(valid & ((column < 0) | (column >= vocabulary)), rule, found)
        elif name in POLICY_OF:
            bad = paired & ~(column.isfinite() & (column <= MAX_LOGPROB))
            remedy = f": score the data again under {POLICY_OF[name]}"
            none_of(bad, f"{name} must be finite and at most 0", found, remedy, "such tokens")
        elif name in FINITE:
            rule, remedy = FINITE[name]
            none_of(~column.isfinite() & (valid if name in ("advantages", "weights") else True), rule, found, remedy)
        elif name == "denominator":
            good = (column.isfinite() & (column > 0)).all()
            require(good, "denominator must be a positive number", functools.partial(shown, column))
        elif name == "sequence_scale":
            require(column.isfinite().all(), "sequence_scale must be finite", functools.partial(shown, column))
        elif name == "cu_seqlens":
            check_cu_seqlens(column, valid.numel())
    if "teacher_ids" in columns:
        check_top_k(columns["teacher_ids"], columns["teacher_logprobs"], valid, vocabulary)
    if block_ids is not None:
        check_block_ids(block_ids, valid, columns["cu_seqlens"])


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int) -> None:
    """From 0 to N, never descending (an empty sequence is allowed)."""
    require(
        (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens),
        f"cu_seqlens must begin with 0 and end at N = {tokens}",
        lambda: (
            f"{cu_seqlens[0].item()} and {cu_seqlens[-1].item()}: it holds the cumulative lengths of the sequences in "
            "the pack"
        ),
    )
    require((cu_seqlens.diff() >= 0).all(), "cu_seqlens must be ascending", lambda: f"{cu_seqlens.tolist()[:20]}")


@value_check
def check_valid_tokens(
    valid_tokens: int | None, valid: Tensor, what: str = "targets that are not ignore_index"
) -> None:
    """The number of tokens that count, where the caller gives one."""
    if valid_tokens is not None:
        rule = f"valid_tokens must be the number of {what}"
        require(valid.sum() == valid_tokens, rule, lambda: f"{valid_tokens} where there are {int(valid.sum())}")


def block_key(block_ids: Tensor, start: Tensor) -> Tensor:
    """(n,) int64 that orders tokens by their sequences, which begin at `start` (n,), and then by their block's id."""
    return start * 2 * MAX_IDS + (block_ids.long() - NO_RATIO)


def check_block_ids(block_ids: Tensor, valid: Tensor, cu_seqlens: Tensor) -> None:
    """Of tokens that count: in [-1, 2**31), and never descending within a sequence but for -1."""
    bounds, token = cu_seqlens.long(), torch.arange(valid.numel(), device=valid.device)
    start = bounds[torch.searchsorted(bounds[1:], token, right=True)]
    block_ids = torch.where(valid, block_ids, NO_RATIO)
    outside = (block_ids < NO_RATIO) | (block_ids > MAX_IDS - 1)  # int32 has no MAX_IDS
    none_of(outside, f"block_ids must be in [0, {MAX_IDS}), or -1 for no log-ratio", lambda i: block_ids[i].item())
    key = block_key(block_ids, start)
    highest = key.cummax(0).values
    none_of(
        (block_ids > NO_RATIO) & (key < highest),
        "block_ids must not descend within a sequence",
        lambda i: f"{block_ids[i].item()} after {int(highest[i] - start[i] * 2 * MAX_IDS) + NO_RATIO}",
    )


def check_top_k(ids: Tensor, logprobs: Tensor, valid: Tensor, vocabulary: int) -> None:
    """Of tokens that count: ids in the vocabulary and distinct, log-probs descending, with a sum of at most 1."""
    ordered, total = ids.sort(dim=1).values, logprobs.double().exp().sum(1)
    for column, good, rule in (
        (ids, ((ids >= 0) & (ids < vocabulary)).all(1), f"teacher.ids must be in [0, {vocabulary})"),
        (ids, (ordered.diff(dim=1) != 0).all(1), "teacher.ids must be distinct tokens"),
        (logprobs, logprobs.isfinite().all(1), "teacher.logprobs must be finite"),
        (logprobs, (logprobs.diff(dim=1) <= 0).all(1), "teacher.logprobs must be sorted, the largest first"),
        (total, total <= 1 + MAX_LOGPROB, "teacher.logprobs must have a sum of probabilities of at most 1"),
    ):
        none_of(valid & ~good, rule, functools.partial(shown_at, column), AGAIN)


# ---- what autograd may not ask


def refuse_transforms(name: str, *tensors: Tensor | None) -> None:
    """Gradients are made in the forward pass, which a transform of torch.func would have to transform too.

    Raises:
        RuntimeError: naming the function and what to do.
    """
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0:
        return

    def transformed(x: Tensor) -> bool:
        return torch._C._functorch.is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None

    if any(transformed(tensor) for tensor in tensors if tensor is not None):
        raise RuntimeError(
            f"{name} does not work under the transforms of torch.func (grad, vjp, jvp, vmap, jacrev, ...) and in "
            "forward mode: take gradients by loss.backward() or torch.autograd.grad, and give a batch as (B, T) or "
            "with cu_seqlens"
        )


def forbid_double_backward(name: str) -> None:
    """Gradients are recorded inside a backward pass only under create_graph=True."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name} has no second derivative: its gradients are made in the forward pass. Call backward without "
            "create_graph=True, or use pear_kernels.reference for a double backward"
        )
