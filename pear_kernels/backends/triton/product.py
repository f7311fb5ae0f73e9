"""Product 1 with its epilogue: logits stay in the accumulators, and what leaves the chip is exp of them.

    z = x W^T (+ b, softcap, temperature)      E_v = exp(z_v - anchor), E_y = 0      S = sum_v E_v

A program makes one tile of (rows, vocabulary). It writes E (where a gradient is wanted) and, for each of its rows, the
tile's share of S, of max_v (z_v - anchor) and, for the entropy, of sum_v E_v log E_v. `rows.finish` adds up the shares,
tile by tile in order, so that results are bitwise repeatable. Without E, nothing of the vocabulary's size is written.

Everything here is float32, out of the accumulators; E alone is rounded, to the dtype of the next products.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(u):
    """To the last digits of u's dtype: near 0 the usual form would cancel, which a large softcap multiplies."""
    t = 1 - 2 / (1 + tl.exp(2 * u))
    if u.dtype == tl.float32:
        s = u * u
        series = u * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
        t = tl.where(s < 0.0625, series, t)
    return t


@triton.jit
def exp_of(z, INTERPRETED: tl.constexpr):
    """exp, with 0 for what is no normal float32: tl.exp takes three more instructions to be right below 1e-38."""
    if INTERPRETED:
        exp = tl.exp(z)
    else:
        z = z * 1.4426950408889634  # log2 e
        exp = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [z], tl.float32, is_pure=True, pack=1)
    return exp


@triton.jit
def activate(z, softcap, inverse_temperature, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr):
    """The head's softcap and temperature, on raw logits: (logits, d logits / d raw but for the 1 / temperature)."""
    slope = tl.full(z.shape, 1.0, z.dtype)
    if SOFTCAP:
        t = tanh(z / softcap)
        slope = 1 - t * t
        z = t * softcap
    if TEMPERATURE:
        z = z * inverse_temperature
    return z, slope


@triton.jit
def load_block(
    source,  # (rows, columns) row-major, contiguous: a descriptor, or a pointer
    first_row,
    first_column,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """A block of a matrix, 0 past its edges."""
    if DESCRIPTORS:
        block = source.load([first_row, first_column])
    else:
        row = first_row + tl.arange(0, ROWS)
        column = first_column + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        block = tl.load(source + row.to(tl.int64)[:, None] * columns + column[None, :], mask=inside, other=0.0)
    return block


@triton.jit
def finish_tile(
    acc,  # (BLOCK_R, COLUMNS) float32, x W^T
    e,  # E (R, V), a descriptor or a pointer; or None
    e_stride,  # from row to row
    bias,  # (V,) or None
    row,  # (BLOCK_R,)
    y,  # (BLOCK_R,) the targets
    anchor,  # (BLOCK_R,) float32
    first_row,
    first_column,
    R,
    V,
    softcap,
    inverse_temperature,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """exp of a tile of logits: E is stored; returns the rows' sums of E and of E log E, and maxima of log E."""
    column = first_column + tl.arange(0, COLUMNS)
    inside = column < V
    z = acc
    if bias is not None:
        z += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    z, slope = activate(z, softcap, inverse_temperature, SOFTCAP, TEMPERATURE)
    # neither the target nor the columns past the vocabulary, which the last tile has, count
    counts = inside[None, :] & (column[None, :] != y[:, None])
    z = tl.where(counts, z - anchor[:, None], float("-inf"))
    exp = exp_of(z, INTERPRETED)
    if e is not None:
        factor = exp
        if SOFTCAP:
            factor = exp * slope
        if DESCRIPTORS:
            e.store([first_row, first_column], factor.to(e.dtype))
        else:
            at = e + row.to(tl.int64)[:, None] * e_stride + column[None, :]
            tl.store(at, factor.to(e.dtype.element_ty), mask=(row < R)[:, None] & inside[None, :])
    if ENTROPY:
        exp_log = tl.sum(tl.where(exp > 0, exp * z, 0.0), 1)
    else:
        exp_log = z.max(1) * 0
    return tl.sum(exp, 1), tl.max(z, 1), exp_log


# a chunk may begin anywhere and have any number of rows: neither is worth a compilation of its own
@triton.jit(do_not_specialize=["R", "group"], do_not_specialize_on_alignment=["target"])
def exp_product(
    x,  # (R, D): a descriptor of blocks (BLOCK_R, BLOCK_D), or a pointer
    weight,  # (V, D): a descriptor of blocks (BLOCK_V, BLOCK_D), or a pointer
    e,  # (R, V): a descriptor of blocks (BLOCK_R, BLOCK_V / PARTS), or a pointer; None where only sums are wanted
    e_stride,  # of E, from row to row
    bias,  # (V,) or None
    target,  # (R,) int64
    anchor,  # (R,) float32
    redo,  # (row tiles + 1,) int32: which to make again, and last whether any; None for all of them
    sums,  # (vocabulary tiles, R) float32 out, each tile's sum of E
    maxima,  # (vocabulary tiles, R) float32 out, of log E
    exp_logs,  # (vocabulary tiles, R) float32 out, of E log E; None without the entropy
    R,
    V,
    D,
    group,  # row tiles that are worked on together, so that their x stays in the cache while W passes by
    softcap,
    inverse_temperature,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,  # the tile is finished in 1 or 2 parts: two need half the shared memory to store E
    PERSISTENT: tl.constexpr,  # programs go on to further tiles, and load the next while they finish one
    DESCRIPTORS: tl.constexpr,  # from sm_90 on, where they are copied by the tensor memory accelerator
    PRECISION: tl.constexpr,  # of float32 operands
    INTERPRETED: tl.constexpr,  # the interpreter has no product of bfloat16 and no machine code
):
    row_tiles = tl.cdiv(R, BLOCK_R)
    tiles = row_tiles * tl.cdiv(V, BLOCK_V)
    if redo is not None:
        tiles *= tl.load(redo + row_tiles)
    step = tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), tiles, step, flatten=PERSISTENT):
        # tiles go down the rows of a group first, then on to the next columns, then to the next group
        group_tiles = group * tl.cdiv(V, BLOCK_V)
        first_row_tile = tile // group_tiles * group
        in_group = min(row_tiles - first_row_tile, group)
        row_tile = first_row_tile + tile % group_tiles % in_group
        column_tile = tile % group_tiles // in_group
        wanted = True
        if redo is not None:
            wanted = tl.load(redo + row_tile) != 0
        if wanted:
            first_row, first_column = row_tile * BLOCK_R, column_tile * BLOCK_V
            acc = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
            for k in range(0, D, BLOCK_D):
                a = load_block(x, first_row, k, R, D, BLOCK_R, BLOCK_D, DESCRIPTORS)
                b = load_block(weight, first_column, k, V, D, BLOCK_V, BLOCK_D, DESCRIPTORS)
                if INTERPRETED:
                    a, b = a.to(tl.float32), b.to(tl.float32)
                acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
            row = first_row + tl.arange(0, BLOCK_R)
            y = tl.load(target + row, mask=row < R, other=-1).to(tl.int32)
            at = tl.load(anchor + row, mask=row < R, other=0.0)
            if PARTS == 2:
                halves = tl.permute(tl.reshape(acc, (BLOCK_R, 2, BLOCK_V // 2)), (0, 2, 1))
                left, right = tl.split(halves)
                sum_e, max_z, exp_log = finish_tile(
                    left, e, e_stride, bias, row, y, at, first_row, first_column, R, V, softcap, inverse_temperature,
                    SOFTCAP, TEMPERATURE, exp_logs is not None, BLOCK_V // 2, DESCRIPTORS, INTERPRETED,
                )  # fmt: skip
                sum_right, max_right, exp_log_right = finish_tile(
                    right, e, e_stride, bias, row, y, at, first_row, first_column + BLOCK_V // 2, R, V, softcap,
                    inverse_temperature, SOFTCAP, TEMPERATURE, exp_logs is not None, BLOCK_V // 2, DESCRIPTORS,
                    INTERPRETED,
                )  # fmt: skip
                sum_e, max_z, exp_log = sum_e + sum_right, tl.maximum(max_z, max_right), exp_log + exp_log_right
            else:
                sum_e, max_z, exp_log = finish_tile(
                    acc, e, e_stride, bias, row, y, at, first_row, first_column, R, V, softcap, inverse_temperature,
                    SOFTCAP, TEMPERATURE, exp_logs is not None, BLOCK_V, DESCRIPTORS, INTERPRETED,
                )  # fmt: skip
            share = column_tile.to(tl.int64) * R + row
            tl.store(sums + share, sum_e, mask=row < R)
            tl.store(maxima + share, max_z, mask=row < R)
            if exp_logs is not None:
                tl.store(exp_logs + share, exp_log, mask=row < R)
