"""Which rows and columns of a chunk's gradient products count, when a share of the gradient may be left out.

The gradient of a chunk's logits is diag(r) F, F (R, V) >= 0 being E without its target column. Its mass is
sum_tv |r_t| F_tv, which is sum_t |c_t| (1 - p_t) for a head without softcap. Within `tolerance` times the mass,

1. the lightest rows are left out, up to a tenth of the budget;
2. then the lightest columns, by their mass over the rows kept, w_v = sum_t |r_t| F_tv;
3. products 2 and 3 are taken of what is kept, compacted and dense;
4. in dX, what a row t leaves out, of sum l_t, is replaced by l_t times the mean of the columns left out,
   sum_v w_v W_v / sum_v w_v.

Targets are not part of it: their terms are exact. Neither loss nor log-probs depend on what is left out.

With m the mass left out, the error of the logits' gradient G is known: ||G - G'||_1 = m <= tolerance ||G||_1 (half of
that without softcap, since each row's target then has as much mass as its other columns). So dW, whose rows are sums of
rows of G times hidden states, is off by at most m max_t |x_t|, summed over the norms of its rows; dX by at most
m max_v |W_v - mean|, summed over its rows.
"""

import functools
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from pear_kernels.engine.head import Head, Kept, Softmax

ROWS_SHARE = 0.1  # of the budget may be spent on rows
MOST_KEPT = 0.6  # of the work; with more the dense products are taken, which need no compaction
MARGIN = 1 - 2**-10  # of the budget that is used: float32 sums of F are known to less than this
UNITS = 2.0**52  # masses are added up as integers, in which a sum has no rounding and no order


class Choice(NamedTuple):
    """Which rows and columns of a chunk are kept."""

    rows: Tensor | None  # (k,) int64, ascending; None: all
    columns: Tensor  # (K,) int64, ascending
    column_mass: Tensor  # (V,) of the rows kept


class Sparsifier:
    """Makes the choice for each chunk of a walk, and keeps count of what was left out."""

    def __init__(self, tolerance: float):
        self.tolerance = tolerance  # share of the mass of each chunk that may be left out
        self.left: list[Tensor] = []  # () float64, mass left out of each chunk
        self.mass: list[Tensor] = []  # (R,) float64, mass of each of its rows
        self.kept_work = self.work = 0  # rows times columns of the gradient products

    def choose(self, head: Head, softmax: Softmax, row_scale: Tensor, may_choose: bool) -> Choice | None:
        """What to keep of a chunk; None for all of it. Takes one host sync; without `may_choose` there is none.

        Counts what that leaves out, and what it keeps.
        """
        exp = softmax.exp
        scale = head.scaled(row_scale).double().abs()
        largest = scale.amax()  # masses are relative to it, so float32 sums neither overflow nor underflow
        largest = torch.where(largest == 0, 1.0, largest)
        mass = scale / largest * (exp.sum(1, dtype=head.dtype) if softmax.exp_sum is None else softmax.exp_sum)
        self.mass.append(mass * largest)
        self.left.append(self.mass[-1].sum() * 0)  # NaN where a coefficient is not finite
        self.work += exp.numel()
        self.kept_work += exp.numel()
        if not may_choose:
            return None
        total = mass.sum()
        row_order, rows_left, left = lightest(mass, total, self.tolerance * ROWS_SHARE)
        light = torch.zeros_like(mass, dtype=torch.bool)
        light[row_order] = torch.arange(len(mass), device=mass.device) < rows_left
        column_mass = torch.zeros(exp.shape[1], dtype=head.dtype, device=exp.device)
        relative = (row_scale.double().abs() / largest).masked_fill(light, 0.0)
        head.add_grad_bias_(column_mass, exp, relative.to(row_scale.dtype))
        column_order, columns_left, more = lightest(column_mass, total, self.tolerance - left / total)
        usable = (total > 0) & total.isfinite()
        first_row, first_column, known = torch.stack([rows_left, columns_left, usable.long()]).tolist()
        (R, V), k, K = exp.shape, len(row_order) - first_row, len(column_order) - first_column
        if not known or not 0 < k * K <= MOST_KEPT * R * V:
            return None
        self.left[-1] = (left + more) * largest
        self.kept_work += k * K - R * V
        rows = None if k == R else row_order[first_row:].sort().values
        return Choice(rows, column_order[first_column:].sort().values, column_mass)

    def rescale(self, chunk: int, factor: Tensor) -> None:
        """Multiplies what was counted of a chunk by its rows' `factor` (R,), one value if anything was left out."""
        self.left[chunk] = self.left[chunk] * factor[0].abs()
        self.mass[chunk] = self.mass[chunk] * factor.abs()

    def counts(self, device: torch.device) -> Tensor:
        """(4,) float64, sums over the chunks: rows times columns kept, and of all; mass left out, and of all."""
        work = torch.tensor([self.kept_work, self.work], dtype=torch.float64, device=device)
        if not self.mass:
            return torch.cat([work, torch.zeros_like(work)])
        return torch.cat([work, torch.stack([torch.stack(self.left).sum(), torch.cat(self.mass).sum()])])

    def skip(self, rows: int, columns: int) -> None:
        """Counts a chunk without coefficients, of which no product is taken."""
        self.work += rows * columns


def compact_(head: Head, exp: Tensor, choice: Choice, grad_hidden: bool) -> Kept:
    """Overwrites E (R, V) by what is kept of it. The mean of the columns left out is made for a `grad_hidden`."""
    rows, columns, column_mass = choice
    row_sum = exp.sum(1, dtype=head.dtype)  # of E as it is rounded, like the sum of what is kept
    kept = head.compact_(exp, rows, columns)
    kept_sum = kept.sum(1, dtype=head.dtype)
    rest = row_sum - kept_sum if rows is None else row_sum.index_add(0, rows, kept_sum, alpha=-1)
    column_mass[columns] = 0.0
    mean = head.mean_row(column_mass) if grad_hidden else column_mass[:0]
    return Kept(rows, columns, kept, rest.clamp_(min=0.0), mean)


@functools.cache
def say_once_that_all_is_kept() -> None:
    warnings.warn(
        "pear_kernels: gradient_tolerance leaves nothing out while a CUDA graph is captured, as the host may not ask "
        "the device how much to keep: all three products are taken",
        stacklevel=2,
    )


def lightest(mass: Tensor, total: Tensor, share: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """`mass` (n,) >= 0 from lightest to heaviest: the order (n,) int64, how many () int64 come to at most `share` of
    `total`, and their sum () float64.
    """
    ordered, order = mass.double().sort(stable=True)
    units = (ordered * (UNITS / total)).ceil_().long().cumsum_(0)
    count = (units <= (share * MARGIN * UNITS)).sum()
    return order, count, torch.where(torch.arange(len(mass), device=mass.device) < count, ordered, 0.0).sum()
