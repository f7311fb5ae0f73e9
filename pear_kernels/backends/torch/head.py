"""The operations the engine needs, in plain PyTorch for any device: one LM head, a chunk of rows at a time.

The softmax is anchored on the target's logit a, not on the row's maximum. With E_v = exp(z_v - a) for v != y,

    S = sum_v E_v      log p = -log1p(S)      1 - p = S / (1 + S)

so nothing cancels when p is near 1, where most tokens of a fine-tuning run are, and E itself is the gradient's
(rows, V) factor: dL/dz = c / (1 + S) * E with E_y := -S. Rows where some z_v - a is so large that E would overflow are
anchored on their maximum instead; the target then enters the sum as e_y = exp(a - anchor) in place of 1.

What is a number a row, a and log p among them, is float64: errors of log p add up along the suffix of a sequence, and
float32 alone rounds a log p of -60 by 2e-6. The anchor is rounded to float32 to meet the logits; e_y makes up for it.

Logits are always float32 (float64 for float64 inputs): a CPU has no product of half-precision inputs that hands out its
float32 accumulators, so half-precision weights are widened a tile of the vocabulary at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pear_kernels.engine.head import Softmax, torch_row_bytes
from pear_kernels.engine.packing import capturing
from pear_kernels.formulas.divergence import MIN_LOG

# exp stays finite and 1 / (1 + S) normal, with room for coefficients, while z_v - anchor is below this
MAX_EXPONENT = {torch.float32: 40.0, torch.float64: 300.0}
ROW_BLOCK_BYTES = 1 << 22  # elementwise work goes through the chunk in row blocks that stay in cache
WEIGHT_TILE_BYTES = 1 << 24  # a widened tile of a half-precision weight


def temporary_bytes(rows: int, vocabulary: int, hidden_size: int, itemsize: int, dtype: torch.dtype) -> int:
    """What a chunk of `rows` takes at most beside its workspace: operands of `itemsize` bytes, sums in `dtype`."""
    wide = rows * hidden_size * dtype.itemsize
    narrow = 0 if itemsize == dtype.itemsize else rows * hidden_size * itemsize
    tile_rows = min(max(128, WEIGHT_TILE_BYTES // (hidden_size * dtype.itemsize)), vocabulary)
    tiles = 2 * tile_rows * hidden_size * dtype.itemsize if narrow else 0  # the next is widened beside the last
    logits = rows * vocabulary * dtype.itemsize
    blocks = 3 * min(max(ROW_BLOCK_BYTES, logits // max(rows, 1)), logits)  # of softcap's tanh
    dots = 4 * min(ROW_BLOCK_BYTES, rows * hidden_size * 8)  # of the target's logit, in float64
    softmax, of_hidden, of_weight = max(tiles, blocks, dots), wide + narrow + tiles, wide
    return rows * hidden_size * itemsize + (wide if narrow else 0) + max(softmax, of_hidden, of_weight)


class Head:
    """An LM head: logits = softcap * tanh((x W^T + b) / softcap) / temperature, each part where it is given."""

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
        self.temperature = temperature
        self.softcap = softcap
        self.compute_dtype = compute_dtype
        self.planned = weight.shape
        self.workspace: Tensor | None = None

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    def row_bytes(self, gradient: bool) -> int:
        """Bytes of workspace a row takes: its logits, with or without a gradient."""
        return torch_row_bytes(self.planned[0], self.dtype.itemsize)

    def reserve(self, rows: int, gradient: bool) -> None:
        """One (rows, V) workspace for every chunk to come."""
        self.workspace = torch.empty(rows, self.vocabulary, dtype=self.dtype, device=self.weight.device)

    def as_operand(self, x: Tensor) -> Tensor:
        """Operand of a product: rounded to the compute dtype, then widened to that of the accumulators."""
        return x.to(self.compute_dtype).to(self.dtype)

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight as tiles of the vocabulary in the accumulators' dtype; a single one where no cast is needed."""
        if self.weight.dtype == self.compute_dtype == self.dtype:
            yield slice(0, self.vocabulary), self.weight
            return
        rows = max(128, WEIGHT_TILE_BYTES // (self.weight.shape[1] * self.dtype.itemsize))
        for begin in range(0, self.vocabulary, rows):
            tile = slice(begin, min(begin + rows, self.vocabulary))
            yield tile, self.as_operand(self.weight[tile])

    # ---- first product: logits, and the softmax in place

    def softmax(
        self, x: Tensor, target: Tensor, *, gradient: bool, entropy: bool = False, logit: Tensor | None = None
    ) -> Softmax:
        """Product 1 for rows `x` (R, D) and their `target` (R,); E is left in the workspace if `gradient`."""
        logits, anchor, below, top1 = self._logits(x, target, logit)
        S = torch.empty_like(below)
        mean_log = torch.empty_like(below) if entropy else None  # sum_v E_v log E_v
        for rows in self._row_blocks(len(x)):
            z, y = logits[rows], target[rows, None]
            tanh = self._activate_(z)
            z.sub_(anchor[rows, None])
            log = z.clamp(min=MIN_LOG) if entropy else None
            exp = put_(z.exp_(), y, 0.0)
            of_rows = exp.sum(1)
            S[rows] = of_rows.double()
            if entropy:
                mean_log[rows] = log.mul_(exp).sum(1).double()
            if gradient and logit is None:
                exp.scatter_(1, y, -of_rows[:, None])
            if gradient:
                self._chain_(exp, tanh)
        logprobs = -self._nll(S, below)
        normaliser = below.exp() + S
        row_scale = (normaliser * self.temperature).reciprocal()
        if not entropy:
            return Softmax(logits, row_scale, logprobs, None, top1=top1)
        # H = log Z - sum_v p_v log(p_v Z), with Z = e_y + S and p_v Z = E_v; log Z = below - log p where Z is near 1
        log_z = torch.where(below < -1, normaliser.log(), below - logprobs)
        mean_log = (mean_log + torch.xlogy(below.exp(), below.exp())) / normaliser
        return Softmax(logits, row_scale, logprobs, log_z - mean_log, top1=top1)

    def _logits(self, x: Tensor, target: Tensor, target_logit: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Raw logits (R, V) in the workspace; of the activated ones the anchor (R,), and the target's less the anchor.

        The latter is float64: next to 0 where the target is the anchor, else how far it lies under the row's maximum.
        Last `Softmax.top1`.
        """
        shard = target_logit is not None
        target_logit = target_logit if shard else self.target_logits(x, target)
        logits = self._product(x)
        largest = logits.amax(1)
        top1 = is_first_maximum(logits, largest, target)
        self._activate_(largest)  # increasing, so the largest stays the largest
        if shard:  # a target elsewhere has no logit among these
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
        """(R,) float64: the target's activated logit, which is a dot product a row."""
        logit = torch.empty(len(x), dtype=torch.float64, device=x.device)
        step = max(1, ROW_BLOCK_BYTES // (x.shape[1] * logit.itemsize))
        for begin in range(0, len(x), step):
            rows = slice(begin, begin + step)
            logit[rows] = (x[rows].double() * self.as_operand(self.weight[target[rows]]).double()).sum(1)
        if self.bias is not None:
            logit += self.bias[target].double()
        self._activate_(logit)
        return logit

    @staticmethod
    def _nll(S: Tensor, below: Tensor) -> Tensor:
        """-log p = log(1 + S / e_y), right to the last digits for S near 0 and for e_y near 0 alike."""
        return torch.logaddexp(torch.zeros_like(S), S.log() - below)

    def _activate_(self, raw: Tensor) -> Tensor | None:
        """Softcap and temperature in place; returns tanh(raw / softcap) for the chain rule."""
        if self.softcap is None:
            if self.temperature != 1.0:
                raw.div_(self.temperature)
            return None
        tanh = torch.tanh(raw / self.softcap)
        torch.mul(tanh, self.softcap / self.temperature, out=raw)
        return tanh

    def _chain_(self, gradient: Tensor, tanh: Tensor | None) -> None:
        """dL/dz -> dL/draw but for the factor 1 / temperature, which belongs to the row scale."""
        if tanh is not None:
            gradient.mul_(tanh.square_().neg_().add_(1.0))

    def _row_blocks(self, rows: int) -> Iterator[slice]:
        size = max(1, ROW_BLOCK_BYTES // (self.vocabulary * self.dtype.itemsize))
        for begin in range(0, rows, size):
            yield slice(begin, min(begin + size, rows))

    # ---- second and third product

    def write_grad_hidden_(
        self,
        into: Tensor,  # (N, D)
        index: Tensor,  # (R,)
        factor: Tensor,  # (R, V)
        row_scale: Tensor,  # (R,)
        target: Tensor,  # (R,)
        target_mass: Tensor | None,  # (R,): None, since E_y = -S stands in `factor`
    ) -> None:
        """Product 2: into[index] = diag(row_scale) E W."""
        out = factor.new_zeros(len(factor), self.weight.shape[1])
        for tile, weight in self.tiles():
            out.addmm_(factor[:, tile], weight)
        into.index_copy_(0, index, out.mul_(row_scale[:, None]).to(into.dtype))

    def add_grad_weight_(self, grad: Tensor, exp: Tensor, x: Tensor, row_scale: Tensor, first: bool) -> None:
        """Product 3: grad (V, D) += E^T diag(row_scale) x; the `first` chunk writes, so `grad` may start as garbage."""
        torch.addmm(grad, exp.t(), x * row_scale[:, None], beta=0 if first else 1, out=grad)

    def add_grad_bias_(self, grad: Tensor, exp: Tensor, row_scale: Tensor) -> None:
        """grad (V,) += E^T row_scale."""
        grad.addmv_(exp.t(), row_scale)

    def subtract_targets_(
        self,
        grad_weight: Tensor | None,  # (V, D)
        grad_bias: Tensor | None,  # (V,)
        hidden: Tensor,  # (N, D)
        index: Tensor,  # (n,)
        target: Tensor,  # (n,)
        scale: Tensor,  # (n,)
    ) -> None:
        """dW[target_i] -= scale_i hidden[index_i] and db[target_i] -= scale_i, which a shard keeps apart from E."""
        step = max(1, ROW_BLOCK_BYTES // (hidden.shape[1] * self.dtype.itemsize))
        for begin in range(0, len(target) if grad_weight is not None else 0, step):
            rows = slice(begin, begin + step)
            by = scale[rows, None]
            x = self.as_operand(hidden[index[rows]]).masked_fill(by == 0, 0.0)  # an ignored token's row may hold NaN
            add_rows_(grad_weight, target[rows], x.mul_(by).neg_())
        if grad_bias is not None:
            add_rows_(grad_bias, target, -scale)


def may_wait(tensor: Tensor) -> bool:
    """Whether Python may branch on what the tensor holds: free on a CPU, a host sync on a device."""
    return tensor.device.type == "cpu" and not capturing()


def is_first_maximum(logits: Tensor, largest: Tensor, target: Tensor) -> Tensor:
    """(R,) bool: whether `target` (R,) is the argmax of each row, whose maxima (R,) are known; False where it is -1.

    On a CPU an argmax takes ten times as long as a maximum, so it is taken of rows with a tie alone.
    """
    if not may_wait(logits):
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
    """matrix[i, column_i] = value_i, for `column` and `value` (r, 1); where the column is -1, nothing."""
    place = column.clamp(min=0)
    return matrix.scatter_(1, place, torch.where(column < 0, matrix.gather(1, place), value))


def add_rows_(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """total[index_i] += rows_i, in an order that repeats: each device has one way of it."""
    if total.device.type == "cpu":
        total.index_add_(0, index, rows)
    else:
        total.index_put_((index,), rows, accumulate=True)
