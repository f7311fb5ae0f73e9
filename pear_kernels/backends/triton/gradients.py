"""Kernels around products 2 and 3: row scales, the target's term, the bias.

E is 0 at the target. The target's gradient, -c (1 - p), is applied separately, in float32: if it were rounded to E's
dtype, it would be the gradient's largest error, and writing it into E would take another pass.
"""

import triton
import triton.language as tl


@triton.jit
def scale_rows(
    x,  # (R, D)
    row_scale,  # (R,) float64
    out,  # (R, D)
    D,
    BLOCK_D: tl.constexpr,
):
    """out = diag(row_scale) x, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(row_scale + row).to(tl.float32)
    for k in range(0, D, BLOCK_D):
        column = k + tl.arange(0, BLOCK_D)
        inside = column < D
        value = tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * D + column, (value * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["target", "index"])
def write_grad_hidden(
    product,  # (R, D) float32, E W
    weight,  # (V, D)
    row_scale,  # (R,) float64
    target,  # (R,) int64
    target_mass,  # (R,) float64, or None
    index,  # (R,) int64, rows of out
    out,  # (N, D)
    D,
    BLOCK_D: tl.constexpr,
):
    """out[index] = diag(row_scale) (E W - diag(target_mass) W[y])."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(row_scale + row).to(tl.float32)
    y = tl.load(target + row)
    to = tl.load(index + row)
    for k in range(0, D, BLOCK_D):
        column = k + tl.arange(0, BLOCK_D)
        inside = column < D
        value = tl.load(product + row * D + column, mask=inside, other=0.0)
        if target_mass is not None:
            mass = tl.load(target_mass + row).to(tl.float32)
            value -= mass * tl.load(weight + y * D + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + to * D + column, (value * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["K"])
def compact_columns(
    e,  # (R, V), of which the first K columns are overwritten
    e_stride,  # elements from row to row
    columns,  # (K,) int64, ascending
    K,
    BLOCK_K: tl.constexpr,
):
    """e[:, :K] = e[:, columns]. One program per row, from left to right, so it never reads what it has written."""
    row = e + tl.program_id(0).to(tl.int64) * e_stride
    for k in range(0, K, BLOCK_K):
        place = k + tl.arange(0, BLOCK_K)
        inside = place < K
        value = tl.load(row + tl.load(columns + place, mask=inside, other=0), mask=inside, other=0.0)
        tl.debug_barrier()  # this block's stores may overwrite what another thread of the program has yet to read
        tl.store(row + place, value, mask=inside)
        tl.debug_barrier()


@triton.jit
def scale_and_round(
    gradient,  # (size,) float32
    upstream,  # () of any float dtype
    out,  # (size,)
    size,
    BLOCK: tl.constexpr,
):
    """out = upstream * gradient, rounded once. (PyTorch's product of two dtypes into a third takes twice the time.)"""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(gradient + at, mask=at < size) * tl.load(upstream).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=["R"])
def add_grad_bias(
    e,  # (R, V)
    e_stride,  # elements from row to row
    row_scale,  # (R,) float64
    grad,  # (V,) float32
    R,
    V,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """grad += E^T row_scale."""
    column = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for r in range(0, R, BLOCK_R):
        row = r + tl.arange(0, BLOCK_R)
        inside = (row < R)[:, None] & (column < V)[None, :]
        value = tl.load(e + row.to(tl.int64)[:, None] * e_stride + column[None, :], mask=inside, other=0.0)
        scale = tl.load(row_scale + row, mask=row < R, other=0.0).to(tl.float32)
        total += value.to(tl.float32) * scale[:, None]
    before = tl.load(grad + column, mask=column < V, other=0.0)
    tl.store(grad + column, before + tl.sum(total, 0), mask=column < V)


@triton.jit(do_not_specialize_on_alignment=["hidden"])
def subtract_targets(
    hidden,  # (N, D)
    hidden_stride,  # elements from row to row
    index,  # (n,) int64, rows of hidden
    order,  # (n,) int64, tokens sorted by target
    targets,  # (n,) int64, sorted
    stops,  # (n,) int64, one past the last token with the same target
    scale,  # (n,) float64
    grad_weight,  # (V, D) float32, or None
    grad_bias,  # (V,) float32, or None
    D,
    ROUNDED: tl.constexpr,  # dtype of the operands of products
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad_weight[y_t] -= scale_t hidden_t and grad_bias[y_t] -= scale_t.

    The program of a target's first token adds all of that target's tokens, in order; the other programs return.
    """
    first = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + first)
    if (first == 0) | (y != tl.load(targets + tl.maximum(first - 1, 0))):
        stop = tl.load(stops + first)
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        bias_total = tl.zeros((BLOCK_N,), tl.float64)
        for n in range(first, stop, BLOCK_N):
            place = n + tl.arange(0, BLOCK_N)
            live = place < stop
            token = tl.load(order + place, mask=live, other=0)
            factor = tl.load(scale + token, mask=live, other=0.0)
            bias_total += factor
            if grad_weight is not None:
                row = tl.load(index + token, mask=live, other=0)
                inside = (live & (factor != 0))[:, None] & (column < D)[None, :]  # an ignored token's row may hold NaN
                x = tl.load(hidden + row[:, None] * hidden_stride + column[None, :], mask=inside, other=0.0)
                total += x.to(ROUNDED).to(tl.float32) * factor.to(tl.float32)[:, None]
        if grad_weight is not None:
            at = grad_weight + y * D + column
            tl.store(at, tl.load(at, mask=column < D, other=0.0) - tl.sum(total, 0), mask=column < D)
        if grad_bias is not None:
            if tl.program_id(1) == 0:
                tl.store(grad_bias + y, tl.load(grad_bias + y) - tl.sum(bias_total, 0).to(tl.float32))
