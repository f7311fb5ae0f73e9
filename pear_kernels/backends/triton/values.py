"""The checks of values in one kernel; `pear_kernels.checks` takes 7 to 15 launches for each argument.

The kernel asserts on the device: `tl.device_assert` with debug=True and sanitize_overflow=False, as `torch.compile`
does for its index checks (torch/_inductor/runtime/triton_heuristics.py; the same in triton 3.6 and 3.9). It compiles to
`__assertfail` with the rule as its message. A failed assert ends as a failed `torch._assert_async` does: CUDA prints
the rule to stderr, every later call on that GPU raises, and only a new process can use it again. The alternative, flags
from the kernel and one `torch._assert_async` per rule, would cost a launch per rule. Nothing is read back, so the
launch is legal while a CUDA graph is captured; a replay checks again.
"""

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from pear_kernels import checks
from pear_kernels.backends.triton.launch import launch

BLOCK = 1024  # tokens, or sequences, that a program checks at a time
MAX_LOGPROB = tl.constexpr(checks.MAX_LOGPROB)
MAX_IDS = tl.constexpr(checks.MAX_IDS)
NO_RATIO = tl.constexpr(checks.NO_RATIO)
COLUMNS = (  # what the kernel takes, in its order
    "target", "cu_seqlens", "block_ids", *checks.POLICY_OF, "advantages", "weights",
    "sequence_advantages", "sequence_scale", "denominator",
)  # fmt: skip


def check_values(columns: Mapping[str, Tensor], valid: Tensor, vocabulary: int = 0, ignore_index: int = 0) -> None:
    """`checks.check_values` of tensors on a GPU. An offline teacher's K tokens stay with `checks`, which sorts them."""
    if not checks.values_are_checked():
        return
    if "teacher_ids" in columns:
        checks.check_top_k(columns["teacher_ids"], columns["teacher_logprobs"], valid, vocabulary)
    given = [None if name not in columns else columns[name].contiguous() for name in COLUMNS]
    cu_seqlens = columns.get("cu_seqlens")
    # the rule of `target` is a constant of the compiled kernel: one compilation for each vocabulary, none per length
    rule = f"pear_kernels: target must be in [0, {vocabulary}) or ignore_index ({ignore_index})"
    launch(
        check_columns, (max(1, -(-valid.numel() // BLOCK)),),
        valid.contiguous(), *given, valid.numel(), 0 if cu_seqlens is None else cu_seqlens.numel() - 1, vocabulary,
        TARGET_RULE=rule, BLOCK=BLOCK, debug=True, sanitize_overflow=False,
    )  # fmt: skip


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")  # False for NaN


@triton.jit
def is_logprob(x):
    return is_finite(x) & (x <= MAX_LOGPROB)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit(
    do_not_specialize=["tokens", "sequences", "vocabulary"],
    do_not_specialize_on_alignment=["valid", *COLUMNS],
)
def check_columns(
    valid,  # (N,) bool, which tokens count; what stands at the others is not checked
    target,  # (N,) int64; this and all that follow are None where a call has no such argument
    cu_seqlens,  # (S + 1,)
    block_ids,  # (N,)
    behavior_logprobs,  # (N,), not checked where a token has no log-ratio
    old_logprobs,  # (N,)
    ref_logprobs,  # (N,)
    sampler_logprobs,  # (N,)
    advantages,  # (N,)
    weights,  # (N,)
    sequence_advantages,  # (S,)
    sequence_scale,  # (S,)
    denominator,  # one number
    tokens,
    sequences,
    vocabulary,
    TARGET_RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program checks a block of tokens, and its share of the sequences: any number, empty ones among them."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    counts = inside & (tl.load(valid + token, mask=inside, other=0) != 0)
    if target is not None:
        y = tl.load(target + token, mask=counts, other=0)
        tl.device_assert((y >= 0) & (y < vocabulary), TARGET_RULE, mask=counts)
    if behavior_logprobs is not None:
        paired = counts
        if block_ids is not None:
            paired = counts & (tl.load(block_ids + token, mask=counts, other=0) > NO_RATIO)
        good = is_logprob(tl.load(behavior_logprobs + token, mask=paired, other=0.0))
        tl.device_assert(good, "pear_kernels: behavior_logprobs must be finite and at most 0", mask=paired)
    if old_logprobs is not None:
        good = is_logprob(tl.load(old_logprobs + token, mask=counts, other=0.0))
        tl.device_assert(good, "pear_kernels: old_logprobs must be finite and at most 0", mask=counts)
    if ref_logprobs is not None:
        good = is_logprob(tl.load(ref_logprobs + token, mask=counts, other=0.0))
        tl.device_assert(good, "pear_kernels: ref_logprobs must be finite and at most 0", mask=counts)
    if sampler_logprobs is not None:
        good = is_logprob(tl.load(sampler_logprobs + token, mask=counts, other=0.0))
        tl.device_assert(good, "pear_kernels: sampler_logprobs must be finite and at most 0", mask=counts)
    if advantages is not None:
        good = is_finite(tl.load(advantages + token, mask=counts, other=0.0))
        tl.device_assert(good, "pear_kernels: advantages must be finite", mask=counts)
    if weights is not None:
        good = is_finite(tl.load(weights + token, mask=counts, other=0.0))
        tl.device_assert(good, "pear_kernels: weights must be finite where a token counts", mask=counts)
    if denominator is not None:
        if tl.program_id(0) == 0:
            number = tl.load(denominator).to(tl.float64)
            tl.device_assert(is_finite(number) & (number > 0), "pear_kernels: denominator must be a positive number")
    if cu_seqlens is not None:
        for left in range(tl.program_id(0) * BLOCK, sequences, tl.num_programs(0) * BLOCK):
            sequence = left + tl.arange(0, BLOCK)
            live = sequence < sequences
            begin = tl.load(cu_seqlens + sequence, mask=live, other=0)
            end = tl.load(cu_seqlens + sequence + 1, mask=live, other=0)
            ends = ((sequence > 0) | (begin == 0)) & ((sequence < sequences - 1) | (end == tokens))
            tl.device_assert(
                ends, "pear_kernels: cu_seqlens must begin with 0 and end at N, the number of tokens", mask=live
            )
            tl.device_assert(begin <= end, "pear_kernels: cu_seqlens must be ascending", mask=live)
            if sequence_scale is not None:
                good = is_finite(tl.load(sequence_scale + sequence, mask=live, other=0).to(tl.float64))
                tl.device_assert(good, "pear_kernels: sequence_scale must be finite", mask=live)
            if sequence_advantages is not None:
                good = is_finite(tl.load(sequence_advantages + sequence, mask=live, other=0.0))
                tl.device_assert(good, "pear_kernels: advantages must be finite", mask=live)
        if block_ids is not None:
            for sequence in range(tl.program_id(0), sequences, tl.num_programs(0)):
                end = tl.minimum(tl.load(cu_seqlens + sequence + 1), tokens)
                highest = tl.full((BLOCK,), NO_RATIO, tl.int64)
                for left in range(tl.maximum(tl.load(cu_seqlens + sequence), 0), end, BLOCK):
                    token = left + tl.arange(0, BLOCK)
                    counts = token < end
                    counts = counts & (tl.load(valid + token, mask=counts, other=0) != 0)
                    block = tl.load(block_ids + token, mask=counts, other=NO_RATIO).to(tl.int64)
                    good = (block >= NO_RATIO) & (block < MAX_IDS)
                    tl.device_assert(
                        good, "pear_kernels: block_ids must be in [0, 2147483648), or -1 for no log-ratio", mask=counts
                    )
                    highest = tl.maximum(highest, tl.associative_scan(block, 0, larger))
                    good = (block == NO_RATIO) | (block >= highest)
                    tl.device_assert(good, "pear_kernels: block_ids must not descend within a sequence", mask=counts)
                    highest = tl.zeros_like(highest) + tl.max(highest, 0)  # of all blocks of tokens so far
