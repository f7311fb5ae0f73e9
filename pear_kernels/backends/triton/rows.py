"""Kernels with one number a row: the target's logit, and what becomes of a row once its sums are known.

One number a row means float64, as on a CPU: errors of log p add up along a sequence's suffix. `anchor` alone is
float32, to meet the logits; `below`, the target's logit less the anchor, makes up for its rounding.
"""

import triton
import triton.language as tl

from pear_kernels.backends.triton.product import activate


@triton.jit
def log1p(u):
    """log(1 + u) for float64 u >= 0: the rounding of 1 + u is divided out again."""
    w = 1.0 + u
    return tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def xlogx(u):
    return tl.where(u > 0, u * tl.log(tl.where(u > 0, u, 1.0)), 0.0)


@triton.jit
def outcome(S, exp_log, below, inverse_temperature):
    """(log p, 1 / ((e_y + S) temperature), entropy) from S = sum_{v != y} E_v, sum E log E and e_y = exp(below)."""
    # -log p = log(1 + S / e_y), to the last digits for S near 0 and for e_y near 0 alike
    u = tl.log(S) - below
    nll = tl.where(u > 0, u, 0.0) + log1p(tl.exp(-tl.abs(u)))
    nll = tl.where(S == S, nll, S)  # a comparison loses NaN
    e_y = tl.exp(below)
    Z = e_y + S
    # H = log Z - sum_v p_v log(p_v Z); log Z = below + nll where Z is near 1
    log_z = tl.where(below < -1, tl.log(Z), below + nll)
    entropy = log_z - (exp_log + xlogx(e_y)) / Z
    return -nll, inverse_temperature / Z, entropy


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=["target"])
def target_logits(
    x,  # (R, D)
    weight,  # (V, D)
    bias,  # (V,) or None
    target,  # (R,) int64
    logit,  # (R,) float64 out, softcap and temperature applied
    slope,  # (R,) float64 out, d logit / d raw logit but for the 1 / temperature
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
    """x . W[y] + b[y], a dot product a row, summed in float64."""
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
    z, of_z = activate(total, softcap, inverse_temperature, SOFTCAP, TEMPERATURE)
    tl.store(logit + row, z, mask=live)
    tl.store(slope + row, of_z, mask=live)
    tl.store(anchor + row, z.to(tl.float32), mask=live)


@triton.jit(do_not_specialize=["R"])
def finish(
    sums,  # (vocabulary tiles, R) float32, from exp_product
    maxima,  # likewise
    exp_logs,  # likewise, or None
    logit,  # (R,) float64, the target's
    slope,  # (R,) float64, likewise
    anchor,  # (R,) float32; in the first look, moved for rows where the target's logit does not serve
    redo,  # (row tiles + 1,) int32; in the first look, set to 1 for their tiles, and the last one if there are any
    logprob,  # (R,) float64 out
    row_scale,  # (R,) float64 out
    target_mass,  # (R,) float64 out
    top1,  # (R,) float64 out, 1 where the target's logit is above all others, else 0
    entropy,  # (R,) float64 out, or None
    R,
    tiles,
    inverse_temperature,
    max_exponent,
    AGAIN: tl.constexpr,  # the second look, at rows whose E was made again
    TILE_ROWS: tl.constexpr,  # rows of a tile of exp_product
    BLOCK_R: tl.constexpr,  # divides TILE_ROWS
    BLOCK_T: tl.constexpr,
):
    """Adds up the tiles' shares of each row, in order. Rows where exp would overflow get another anchor, their maximum.

    `redo` tells the next exp_product which tiles to make again; nobody waits for the answer on the host.
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
            share = tile.to(tl.int64)[:, None] * R + row[None, :]
            S += tl.sum(tl.load(sums + share, mask=inside, other=0.0).to(tl.float64), 0)
            largest = tl.maximum(largest, tl.max(tl.load(maxima + share, mask=inside, other=float("-inf")), 0))
            if exp_logs is not None:
                exp_log += tl.sum(tl.load(exp_logs + share, mask=inside, other=0.0).to(tl.float64), 0)
        at = tl.load(anchor + row, mask=live, other=0.0)
        if not AGAIN:
            far = live & (largest > max_exponent)
            tl.store(anchor + row, at + largest, mask=far)
            if tl.max(far.to(tl.int32), 0) != 0:
                tl.store(flag, 1)
                tl.store(redo + tl.cdiv(R, TILE_ROWS), 1)
        below = tl.load(logit + row, mask=live, other=0.0) - at.to(tl.float64)
        tl.store(top1 + row, (below > largest).to(tl.float64), mask=live)  # the maxima leave the target out
        log_p, scale, H = outcome(S, exp_log, below, inverse_temperature)
        tl.store(logprob + row, log_p, mask=live)
        tl.store(row_scale + row, scale, mask=live)
        tl.store(target_mass + row, S * tl.load(slope + row, mask=live, other=0.0), mask=live)
        if entropy is not None:
            tl.store(entropy + row, H, mask=live)


@triton.jit
def logit_block(
    logits, stride, bias, row, column, y, V, softcap, inverse_temperature,
    SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """A row's logits, activated; -inf at the target and past the vocabulary."""
    inside = column < V
    z = tl.load(logits + row * stride + column, mask=inside, other=0.0)
    if bias is not None:
        z += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    z, slope = activate(z, softcap, inverse_temperature, SOFTCAP, TEMPERATURE)
    return tl.where(inside & (column != y), z, float("-inf")), slope


@triton.jit
def largest_logit(
    logits, stride, bias, row, y, V, softcap, inverse_temperature,
    SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Of a row, the target's left out."""
    largest = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    for v in range(0, V, BLOCK_V):
        column = v + tl.arange(0, BLOCK_V)
        z, _ = logit_block(logits, stride, bias, row, column, y, V, softcap, inverse_temperature, SOFTCAP, TEMPERATURE)
        largest = tl.maximum(largest, z)
    return tl.max(largest, 0)


@triton.jit(do_not_specialize_on_alignment=["target"])
def softmax_rows(
    logits,  # (R, V) float32, x W^T
    e,  # (R, V) out, or None; in the same bytes: a row's E, in its own dtype, in the front part of the row's logits
    stride,  # of logits, from row to row
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
    """The plain variant of exp_product's epilogue: one program a row reads the logits of another library's product."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target + row)
    of_target = tl.load(logit + row)
    top = largest_logit(logits, stride, bias, row, y, V, softcap, inverse_temperature, SOFTCAP, TEMPERATURE, BLOCK_V)
    # float16 has the maximum for an anchor always, but for targets so far above it that e_y would be infinite
    highest = tl.maximum(top, (of_target - 300).to(tl.float32))
    anchor = tl.where(top - of_target > max_exponent, highest, of_target.to(tl.float32))
    below = of_target - anchor.to(tl.float64)
    hit = of_target > top
    S, exp_log = below * 0, below * 0  # float64
    for v in range(0, V, BLOCK_V):
        column = v + tl.arange(0, BLOCK_V)
        z, of_z = logit_block(
            logits, stride, bias, row, column, y, V, softcap, inverse_temperature, SOFTCAP, TEMPERATURE
        )
        exp = tl.exp(z - anchor)
        if e is not None:
            tl.debug_barrier()  # E overwrites logits that other threads of this program may still have to read
            tl.store(e + row * e_stride + column, (exp * of_z).to(e.dtype.element_ty), mask=column < V)
        S += tl.sum(exp, 0).to(tl.float64)
        if entropy is not None:
            exp_log += tl.sum(tl.where(exp > 0, exp * (z - anchor), 0.0), 0).to(tl.float64)
    tl.store(top1 + row, hit.to(tl.float64))
    log_p, scale, H = outcome(S, exp_log, below, inverse_temperature)
    tl.store(logprob + row, log_p)
    tl.store(row_scale + row, scale)
    tl.store(target_mass + row, S * tl.load(slope + row))
    if entropy is not None:
        tl.store(entropy + row, H)
