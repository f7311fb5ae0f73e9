"""Product 1 with the softmax in its epilogue: logits stay in the accumulators, only their exponentials are stored.

    z = x W^T (+ b, softcap, temperature)      E_v = exp(z_v - anchor), E_y = 0      S = sum_v E_v

A program computes one tile of (rows, vocabulary). It stores E (if a gradient is wanted) and, for each of its rows, the
tile's partial S, partial max_v (z_v - anchor) and, for the entropy, partial sum_v E_v log E_v. `rows.finish` adds the
partial sums tile by tile, in order, so results repeat bit for bit. Without E, nothing of the vocabulary's size is
stored. All arithmetic is float32, on the accumulators. Only E is rounded, to the dtype of the operands of products 2
and 3.
"""

import triton
import triton.language as tl

from pear_kernels.backends.triton.formulas import activate, exp_flushed


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
    """A block of a matrix; 0 past the matrix's edges."""
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
    e_stride,  # elements from row to row
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
    """Stores E of a tile of logits. Returns each row's sum of E, maximum of log E and sum of E log E."""
    column = first_column + tl.arange(0, COLUMNS)
    inside = column < V
    z = acc
    if bias is not None:
        z += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    z, slope = activate(z, softcap, inverse_temperature, SOFTCAP, TEMPERATURE)
    # excluded: the target, and columns past the vocabulary (in the last tile)
    counts = inside[None, :] & (column[None, :] != y[:, None])
    z = tl.where(counts, z - anchor[:, None], float("-inf"))
    exp = exp_flushed(z, INTERPRETED)
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


# chunks have any number of rows and any alignment of their targets; neither may cause a compilation
@triton.jit(do_not_specialize=["R", "group"], do_not_specialize_on_alignment=["target"])
def exp_product(
    x,  # (R, D): a descriptor of blocks (BLOCK_R, BLOCK_D), or a pointer
    weight,  # (V, D): a descriptor of blocks (BLOCK_V, BLOCK_D), or a pointer
    e,  # (R, V): a descriptor of blocks (BLOCK_R, BLOCK_V / PARTS), or a pointer; None where only sums are wanted
    e_stride,  # of E, elements from row to row
    bias,  # (V,) or None
    target,  # (R,) int64
    anchor,  # (R,) float32
    redo,  # (row tiles + 1,) int32: which row tiles to recompute; the last entry: whether any. None: compute all
    sums,  # (vocabulary tiles, R) float32 out, partial sums of E
    maxima,  # (vocabulary tiles, R) float32 out, partial maxima of log E
    exp_logs,  # (vocabulary tiles, R) float32 out, partial sums of E log E; None without the entropy
    R,
    V,
    D,
    group,  # row tiles that are processed together, so that their x stays in the L2 cache while W is read
    softcap,
    inverse_temperature,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,  # 1, or 2: the tile's epilogue runs in halves and needs half the shared memory to store E
    PERSISTENT: tl.constexpr,  # a program processes several tiles and loads the next while it stores one
    DESCRIPTORS: tl.constexpr,  # matrices are descriptors, which the tensor memory accelerator copies (sm_90 and later)
    PRECISION: tl.constexpr,  # of float32 operands
    INTERPRETED: tl.constexpr,  # Triton's interpreter has no bfloat16 product and no inline machine code
):
    row_tiles = tl.cdiv(R, BLOCK_R)
    tiles = row_tiles * tl.cdiv(V, BLOCK_V)
    if redo is not None:
        tiles *= tl.load(redo + row_tiles)
    step = tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), tiles, step, flatten=PERSISTENT):
        # order of tiles: down the rows of a group, then the next columns, then the next group
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
            partial = column_tile.to(tl.int64) * R + row
            tl.store(sums + partial, sum_e, mask=row < R)
            tl.store(maxima + partial, max_z, mask=row < R)
            if exp_logs is not None:
                tl.store(exp_logs + partial, exp_log, mask=row < R)
