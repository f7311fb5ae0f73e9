"""Kernels of per-row scalars: the target's logit, and a row's results once its sums are known.

Per-row scalars are float64, as in the torch path: errors of log p add up along a sequence's suffix. Only `anchor` is
float32, because it is subtracted from float32 logits; the target's logit less the anchor makes up for its rounding.
"""

import triton
import triton.language as tl

from pear_kernels.backends.triton.formulas import (
    MAX_EXPONENT_FLOAT64,
    activate,
    load_logits,
    row_results,
)


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=["target"])
def target_logits(
    x,  # (R, D)
    weight,  # (V, D)
    bias,  # (V,) or None
    target,  # (R,) int64
    logit,  # (R,) float64 out, softcap and temperature applied
    slope,  # (R,) float64 out, d logit / d raw logit, without the factor 1 / temperature
    anchor,  # (R,) float32 out, logit rounded
    R,
    D,
    softcap,
    inverse_temperature,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x . W[y] + b[y], one dot product per row, summed in float64."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < R
    y = tl.load(target + row, mask=live, other=0)
    products = tl.zeros((BLOCK_R, BLOCK_D), tl.float64)
    for k in range(0, D, BLOCK_D):
        column = k + tl.arange(0, BLOCK_D)
        inside = live[:, None] & (column < D)[None, :]
        a = tl.load(x + row.to(tl.int64)[:, None] * D + column[None, :], mask=inside, other=0.0)
        b = tl.load(weight + y[:, None] * D + column[None, :], mask=inside, other=0.0)
        products += a.to(tl.float64) * b.to(tl.float64)
    total = tl.sum(products, 1)
    if bias is not None:
        total += tl.load(bias + y, mask=live, other=0.0).to(tl.float64)
    z, dz = activate(total, softcap, inverse_temperature, SOFTCAP, TEMPERATURE)
    tl.store(logit + row, z, mask=live)
    tl.store(slope + row, dz, mask=live)
    tl.store(anchor + row, z.to(tl.float32), mask=live)


@triton.jit(do_not_specialize=["R"])
def finish(
    sums,  # (vocabulary tiles, R) float32, partial sums from exp_product
    maxima,  # likewise
    exp_logs,  # likewise, or None
    logit,  # (R,) float64, the target's
    slope,  # (R,) float64, likewise
    anchor,  # (R,) float32; the first pass moves it to the row's maximum where exp would overflow
    redo,  # (row tiles + 1,) int32; the first pass sets the entries of such rows' tiles to 1, and then the last entry
    logprob,  # (R,) float64 out
    row_scale,  # (R,) float64 out
    target_mass,  # (R,) float64 out
    top1,  # (R,) float64 out, 1 where the target's logit is above all others, else 0
    entropy,  # (R,) float64 out, or None
    R,
    tiles,
    inverse_temperature,
    max_exponent,
    AGAIN: tl.constexpr,  # the second pass, for tiles whose E was recomputed
    TILE_ROWS: tl.constexpr,  # rows of a tile of exp_product
    BLOCK_R: tl.constexpr,  # divides TILE_ROWS
    BLOCK_T: tl.constexpr,
):
    """Adds the tiles' partial sums of each row, in order, and computes the row's results.

    The first pass moves the anchors of rows where exp would overflow; `redo` names the tiles that the next exp_product
    recomputes. The host never reads it.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < R
    flag = redo + tl.program_id(0) * BLOCK_R // TILE_ROWS
    due = True
    if AGAIN:
        due = tl.load(flag) != 0
    if due:
        S = tl.zeros((BLOCK_R,), tl.float64)
        exp_log = tl.zeros((BLOCK_R,), tl.float64)
        largest = tl.full((BLOCK_R,), float("-inf"), tl.float32)
        for t in range(0, tiles, BLOCK_T):
            tile = t + tl.arange(0, BLOCK_T)
            inside = (tile < tiles)[:, None] & live[None, :]
            partial = tile.to(tl.int64)[:, None] * R + row[None, :]
            S += tl.sum(tl.load(sums + partial, mask=inside, other=0.0).to(tl.float64), 0)
            largest = tl.maximum(largest, tl.max(tl.load(maxima + partial, mask=inside, other=float("-inf")), 0))
            if exp_logs is not None:
                exp_log += tl.sum(tl.load(exp_logs + partial, mask=inside, other=0.0).to(tl.float64), 0)
        at = tl.load(anchor + row, mask=live, other=0.0)
        if not AGAIN:
            far = live & (largest > max_exponent)
            tl.store(anchor + row, at + largest, mask=far)
            if tl.max(far.to(tl.int32), 0) != 0:
                tl.store(flag, 1)
                tl.store(redo + tl.cdiv(R, TILE_ROWS), 1)
        below = tl.load(logit + row, mask=live, other=0.0) - at.to(tl.float64)
        tl.store(top1 + row, (below > largest).to(tl.float64), mask=live)  # the maxima exclude the target
        log_p, scale, H = row_results(S, exp_log, below, inverse_temperature)
        tl.store(logprob + row, log_p, mask=live)
        tl.store(row_scale + row, scale, mask=live)
        tl.store(target_mass + row, S * tl.load(slope + row, mask=live, other=0.0), mask=live)
        if entropy is not None:
            tl.store(entropy + row, H, mask=live)


@triton.jit(do_not_specialize_on_alignment=["target"])
def softmax_rows(
    logits,  # (R, V) float32, x W^T
    e,  # (R, V) out, or None. A row's E, in its own dtype, overwrites the front part of the row's logits
    stride,  # of logits, elements from row to row
    e_stride,  # of e, likewise
    bias,  # (V,) or None
    target,  # (R,) int64
    logit,  # (R,) float64, the target's
    slope,  # (R,) float64, likewise
    logprob,  # (R,) float64 out
    row_scale,  # (R,) float64 out
    target_mass,  # (R,) float64 out
    top1,  # (R,) float64 out, 1 where the target's logit is above all others, else 0
    entropy,  # (R,) float64 out, or None
    V,
    softcap,
    inverse_temperature,
    max_exponent,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The plain variant of exp_product's epilogue: one program per row reads the logits of cuBLAS's product."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target + row)
    target_logit = tl.load(logit + row)
    largest = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    for v in range(0, V, BLOCK_V):  # not `largest_logit`, which finds the column too and takes five registers more
        column = v + tl.arange(0, BLOCK_V)
        z, _ = load_logits(logits, stride, bias, row, column, V, softcap, inverse_temperature, SOFTCAP, TEMPERATURE, y)
        largest = tl.maximum(largest, z)
    top = tl.max(largest, 0)
    # max_exponent is -inf for float16: the anchor is the row's maximum, unless the target is so far above it that e_y
    # would overflow
    highest = tl.maximum(top, (target_logit - MAX_EXPONENT_FLOAT64).to(tl.float32))
    anchor = tl.where(top - target_logit > max_exponent, highest, target_logit.to(tl.float32))
    below = target_logit - anchor.to(tl.float64)
    hit = target_logit > top
    S, exp_log = below * 0, below * 0  # float64
    for v in range(0, V, BLOCK_V):
        column = v + tl.arange(0, BLOCK_V)
        z, dz = load_logits(logits, stride, bias, row, column, V, softcap, inverse_temperature, SOFTCAP, TEMPERATURE, y)
        exp = tl.exp(z - anchor)
        if e is not None:
            tl.debug_barrier()  # E overwrites logits that other threads of this program may not have read yet
            tl.store(e + row * e_stride + column, (exp * dz).to(e.dtype.element_ty), mask=column < V)
        S += tl.sum(exp, 0).to(tl.float64)
        if entropy is not None:
            exp_log += tl.sum(tl.where(exp > 0, exp * (z - anchor), 0.0), 0).to(tl.float64)
    tl.store(top1 + row, hit.to(tl.float64))
    log_p, scale, H = row_results(S, exp_log, below, inverse_temperature)
    tl.store(logprob + row, log_p)
    tl.store(row_scale + row, scale)
    tl.store(target_mass + row, S * tl.load(slope + row))
    if entropy is not None:
        tl.store(entropy + row, H)
