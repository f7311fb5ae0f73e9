"""The operations that the engine asks of a head, in plain PyTorch for any device, on a chunk of rows at a time.

The softmax is anchored on the target's logit a, not on the row's maximum. With E_v = exp(z_v - a) for v != y,

    S = sum_v E_v      log p = -log1p(S)      1 - p = S / (1 + S)

so nothing cancels when p is near 1, where most tokens of a fine-tuning run are, and E itself is the gradient's
(rows, V) factor: dL/dz = c / (1 + S) * E with E_y := -S. Rows in which some z_v - a is so large that E would overflow
are anchored on their maximum instead; the target then enters the sum as e_y = exp(a - anchor) in place of 1.
`formulas.softmax` has the formulas for any anchor.

Per-row scalars (including a and log p) are float64: errors of log p add up along the suffix of a sequence, and float32
alone rounds a log p of -60 by 2e-6. The anchor is rounded to float32 because it is subtracted from float32 logits; e_y
makes up for the rounding.

Logits are always float32 (float64 for float64 inputs). A CPU has no product of half-precision inputs that returns its
float32 accumulators, so half-precision weights are cast to float32 one tile of the vocabulary at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pear_kernels.engine.head import Kept, Softmax, torch_row_bytes
from pear_kernels.engine.packing import capturing
from pear_kernels.formulas import softmax
from pear_kernels.formulas.activation import Activation, slope_of_tanh_
from pear_kernels.formulas.softmax import MAX_EXPONENT, MIN_LOG

ROW_BLOCK_BYTES = 1 << 22  # elementwise work goes through the chunk in row blocks that stay in cache
WEIGHT_TILE_BYTES = 1 << 24  # a tile of a half-precision weight, cast to float32
KEPT_TILE_BYTES = 1 << 21  # a tile of the rows of the weight, or of its gradient, that are kept
MEAN_ROWS = 1024  # of the weight that one thread adds up, whatever the number of threads


def temporary_bytes(
    rows: int, vocabulary: int, hidden_size: int, itemsize: int, dtype: torch.dtype, leaves_out: bool = False
) -> int:
    """Most bytes a chunk of `rows` takes beside its workspace; operands have `itemsize` bytes, sums are in `dtype`."""
    wide = rows * hidden_size * dtype.itemsize
    narrow = 0 if itemsize == dtype.itemsize else rows * hidden_size * itemsize
    tiles = 0
    if narrow:  # the next tile is cast while the last one still exists
        tiles = 2 * min(tile_rows(hidden_size, dtype), vocabulary) * hidden_size * dtype.itemsize
    logits = rows * vocabulary * dtype.itemsize
    blocks = 3 * min(max(ROW_BLOCK_BYTES, logits // max(rows, 1)), logits)  # of softcap's tanh
    dots = 4 * min(ROW_BLOCK_BYTES, rows * hidden_size * 8)  # of the target's logit, in float64
    scoring, grad_hidden, grad_weight = max(tiles, blocks, dots), wide + narrow + tiles, wide
    if leaves_out:  # copies of W's rows, a part of dW, rows and numbers per column
        tile = min(tile_rows(hidden_size, dtype, KEPT_TILE_BYTES), vocabulary) * hidden_size * dtype.itemsize
        numbers = vocabulary * (3 * dtype.itemsize + 7 * 8)
        grad_hidden, grad_weight = grad_hidden + wide + tile, grad_weight + wide + 2 * tile
        scoring = max(scoring, numbers + 2 * blocks // 3)
    return rows * hidden_size * itemsize + (wide if narrow else 0) + max(scoring, grad_hidden, grad_weight)


def tile_rows(hidden_size: int, dtype: torch.dtype, tile_bytes: int = WEIGHT_TILE_BYTES) -> int:
    """Rows of the weight that are cast to `dtype`, or gathered, at a time."""
    return max(128, tile_bytes // (hidden_size * dtype.itemsize))


class Head:
    """An LM head: logits = softcap * tanh((x W^T + b) / softcap) / temperature, where each of these is given."""

    workspace: Tensor  # (rows, V), made by `reserve`
    separate_target = False  # whether a gradient's E is 0 at the target, whose term is `Softmax.target_mass`

    def __init__(
        self,
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        temperature: float,
        softcap: float | None,
        compute_dtype: torch.dtype,  # operands are rounded to it, as autocast does
    ):
        self.dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32  # of every product and sum
        self.weight = weight
        self.bias = None if bias is None else bias.to(compute_dtype).to(self.dtype)
        self.activation = Activation(temperature, softcap)
        self.compute_dtype = compute_dtype
        self.planned = weight.shape

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    def row_bytes(self, gradient: bool) -> int:
        return torch_row_bytes(self.planned[0], self.dtype.itemsize)

    def reserve(self, rows: int, gradient: bool) -> None:
        self.workspace = torch.empty(rows, self.vocabulary, dtype=self.dtype, device=self.weight.device)

    def as_operand(self, x: Tensor) -> Tensor:
        """Operand of a product: rounded to the compute dtype, then cast to that of the accumulators."""
        return x.to(self.compute_dtype).to(self.dtype)

    def tiles(self, columns: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """The weight, or its rows `columns`, as tiles in the accumulators' dtype; one tile if no copy is needed."""
        if columns is None and self.weight.dtype == self.compute_dtype == self.dtype:
            yield slice(0, self.vocabulary), self.weight
            return
        size, rows = self.vocabulary, tile_rows(self.weight.shape[1], self.dtype)
        if columns is not None:
            size, rows = len(columns), tile_rows(self.weight.shape[1], self.dtype, KEPT_TILE_BYTES)
        for begin in range(0, size, rows):
            tile = slice(begin, min(begin + rows, size))
            yield tile, self.as_operand(self.weight[tile if columns is None else columns[tile]])

    # ---- product 1: logits, and the softmax in place

    def softmax(
        self, x: Tensor, target: Tensor, *, gradient: bool, entropy: bool = False, logit: Tensor | None = None
    ) -> Softmax:
        separate = self.separate_target or logit is not None
        logits, anchor, below, top1 = self._anchored_logits(x, target, logit)
        S, exp_log = torch.empty_like(below), torch.empty_like(below)  # of E and, for the entropy, of E log E
        for rows in self._row_blocks(len(x)):
            z, y = logits[rows], target[rows, None]
            tanh = self.activation.apply_(z)
            z.sub_(anchor[rows, None])
            log = z.clamp(min=MIN_LOG) if entropy else None
            exp = put_(z.exp_(), y, 0.0)
            sums = exp.sum(1)
            S[rows] = sums.double()
            if log is not None:
                exp_log[rows] = log.mul_(exp).sum(1).double()
            if gradient and not separate:
                exp.scatter_(1, y, -sums[:, None])
            if gradient and tanh is not None:
                exp.mul_(slope_of_tanh_(tanh))
        nll, e_y = softmax.nll(S, below), below.exp()
        Z = e_y + S
        row_scale = (Z * self.activation.temperature).reciprocal()
        target_mass = exp_sum = None
        if self.separate_target and logit is None:
            slope = self.activation.slope(below + anchor)
            target_mass, exp_sum = (S, S) if slope is None else (S * slope, None)
        if not entropy:
            return Softmax(logits, row_scale, -nll, None, target_mass, top1, exp_sum)
        log_z = torch.where(below < -1, Z.log(), below + nll)  # where Z is near 1, its log would lose digits
        H = softmax.entropy(log_z, exp_log + torch.xlogy(e_y, e_y), Z)
        return Softmax(logits, row_scale, -nll, H, target_mass, top1, exp_sum)

    def _anchored_logits(
        self, x: Tensor, target: Tensor, target_logit: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Raw logits (R, V) in the workspace, the anchor (R,) of activated ones, `below` (R,), and `Softmax.top1`.

        `below` is the target's logit less the anchor in float64: next to 0 where the target is the anchor, otherwise
        its distance from the row's maximum.
        """
        sharded = target_logit is not None
        target_logit = self.target_logits(x, target) if target_logit is None else target_logit
        logits = self._product(x)
        largest = logits.amax(1)
        top1 = is_first_maximum(logits, largest, target)
        self.activation.apply_(largest)  # increasing, so the largest stays the largest
        if sharded:  # a target that another rank holds has no logit among these
            top1 = torch.where(target < 0, target_logit > largest, top1)
        anchor = torch.where(largest - target_logit > MAX_EXPONENT[self.dtype], largest, target_logit).to(self.dtype)
        return logits, anchor, target_logit - anchor, top1

    def _product(self, x: Tensor) -> Tensor:
        """Product 1: raw logits (R, V) in the workspace."""
        logits = self.workspace[: len(x)]
        for tile, weight in self.tiles():
            if self.bias is None:
                torch.mm(x, weight.t(), out=logits[:, tile])
            else:
                torch.addmm(self.bias[tile], x, weight.t(), out=logits[:, tile])
        return logits

    def target_logits(self, x: Tensor, target: Tensor) -> Tensor:
        logit = torch.empty(len(x), dtype=torch.float64, device=x.device)
        step = max(1, ROW_BLOCK_BYTES // (x.shape[1] * logit.itemsize))
        for begin in range(0, len(x), step):
            rows = slice(begin, begin + step)
            logit[rows] = (x[rows].double() * self.as_operand(self.weight[target[rows]]).double()).sum(1)
        if self.bias is not None:
            logit += self.bias[target].double()
        self.activation.apply_(logit)
        return logit

    def _row_blocks(self, rows: int) -> Iterator[slice]:
        size = max(1, ROW_BLOCK_BYTES // (self.vocabulary * self.dtype.itemsize))
        for begin in range(0, rows, size):
            yield slice(begin, min(begin + size, rows))

    # ---- products 2 and 3

    def write_grad_hidden_(
        self,
        into: Tensor,
        index: Tensor,
        factor: Tensor,
        row_scale: Tensor,
        target: Tensor,
        target_mass: Tensor | None,
        kept: Kept | None = None,
    ) -> None:
        """`target_mass` is None where `factor` holds E_y = -S."""
        factor = factor if kept is None else kept.exp
        out = factor.new_zeros(len(factor), self.weight.shape[1])
        for tile, weight in self.tiles(None if kept is None else kept.columns):
            out.addmm_(factor[:, tile], weight)
        if kept is not None:
            if kept.rows is not None:
                out = out.new_zeros(len(index), out.shape[1]).index_copy_(0, kept.rows, out)
            out.addr_(kept.rest, kept.mean)
        if target_mass is not None:
            out.addcmul_(self.as_operand(self.weight[target]), target_mass.to(self.dtype)[:, None], value=-1)
        into.index_copy_(0, index, out.mul_(row_scale[:, None]).to(into.dtype))

    def add_grad_weight_(
        self, grad: Tensor, factor: Tensor, x: Tensor, row_scale: Tensor, first: bool, kept: Kept | None = None
    ) -> None:
        x = x * row_scale[:, None]
        if kept is None:
            torch.addmm(grad, factor.t(), x, beta=0 if first else 1, out=grad)
            return
        x = x if kept.rows is None else x[kept.rows]
        if first:
            grad.zero_()
        step = min(tile_rows(x.shape[1], self.dtype, KEPT_TILE_BYTES), len(kept.columns))
        part = grad.new_empty(step, grad.shape[1])
        for begin in range(0, len(kept.columns), step):
            columns, factor = kept.columns[begin : begin + step], kept.exp[:, begin : begin + step]
            rows = torch.mm(factor.t(), x, out=part[: len(columns)])  # `out` keeps autocast away
            grad.index_add_(0, columns, rows)

    def add_grad_bias_(self, grad: Tensor, factor: Tensor, row_scale: Tensor) -> None:
        grad.addmv_(factor.t(), row_scale)

    def scaled(self, row_scale: Tensor) -> Tensor:
        return row_scale

    def compact_(self, factor: Tensor, rows: Tensor | None, columns: Tensor) -> Tensor:
        """Packs row after row to the front of the workspace, which no row reaches before it was read."""
        kept = torch.arange(len(factor), device=factor.device) if rows is None else rows
        out = self.workspace.view(-1)[: len(kept) * len(columns)].view(len(kept), len(columns))
        edges = torch.searchsorted(kept, torch.tensor([block.stop for block in self._row_blocks(len(factor))])).tolist()
        begin = 0
        for block, end in zip(self._row_blocks(len(factor)), edges, strict=True):
            part = factor[block].index_select(1, columns)
            out[begin:end] = part if rows is None else part[kept[begin:end] - block.start]
            begin = end
        return out

    def mean_row(self, mass: Tensor) -> Tensor:
        mass = mass / mass.sum().clamp(min=torch.finfo(mass.dtype).tiny)
        total = torch.zeros(self.weight.shape[1], dtype=self.dtype, device=mass.device)
        for tile, weight in self.tiles():
            for rows, part in zip(weight.split(MEAN_ROWS), mass[tile].split(MEAN_ROWS), strict=True):
                total.addmv_(rows.t(), part)
        return total

    def subtract_targets_(
        self,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        hidden: Tensor,
        index: Tensor,
        target: Tensor,
        scale: Tensor,
    ) -> None:
        """Needed where E has no entry for the target: in a shard, or with `separate_target`."""
        if grad_weight is not None:
            step = max(1, ROW_BLOCK_BYTES // (hidden.shape[1] * self.dtype.itemsize))
            for begin in range(0, len(target), step):
                rows = slice(begin, begin + step)
                by = scale[rows, None]
                x = self.as_operand(hidden[index[rows]]).masked_fill(by == 0, 0.0)  # an ignored token may hold NaN
                add_rows_(grad_weight, target[rows], x.mul_(by).neg_())
        if grad_bias is not None:
            add_rows_(grad_bias, target, -scale)


def may_read(tensor: Tensor) -> bool:
    """Whether Python may branch on the tensor's values: free on a CPU, a host sync on any other device."""
    return tensor.device.type == "cpu" and not capturing()


def is_first_maximum(logits: Tensor, largest: Tensor, target: Tensor) -> Tensor:
    """(R,) bool: whether `target` (R,) is the argmax of its row, whose maximum is `largest` (R,); False where it is -1.

    On a CPU an argmax takes ten times as long as a maximum, so only rows with a tie take one.
    """
    if not may_read(logits):
        return logits.argmax(1) == target
    place = target.clamp(min=0)[:, None]
    own = logits.gather(1, place)
    first = (own[:, 0] >= largest) & (target >= 0)
    if first.any():
        others = logits.scatter_(1, place, -torch.inf).amax(1)
        logits.scatter_(1, place, own)
        tied = first & (others >= largest)
        if tied.any():
            first[tied] = logits[tied].argmax(1) == target[tied]
    return first


def put_(matrix: Tensor, column: Tensor, value: Tensor | float) -> Tensor:
    """matrix[i, column_i] = value_i, for `column` and `value` (r, 1); rows whose column is -1 stay as they are."""
    place = column.clamp(min=0)
    return matrix.scatter_(1, place, torch.where(column < 0, matrix.gather(1, place), value))


def add_rows_(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """total[index_i] += rows_i, in an order that repeats: which function has one depends on the device."""
    if total.device.type == "cpu":
        total.index_add_(0, index, rows)
    else:
        total.index_put_((index,), rows, accumulate=True)
