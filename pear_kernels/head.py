"""What the engine asks of an LM head, whoever computes it, and the bytes a row of a chunk takes in each of them.

The byte formulas are plain functions of shapes because two ask for them: a head, to cut its chunks, and `plan`, to say
beforehand what a shape will cost.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

VOCABULARY_TILE = 256  # columns of the logits that leave one partial sum a row, if the tile table says nothing else
ROW_PARTIALS = 3  # float32 of each row and tile, at most: the sum of E, the maximum and, for the entropy, sum E log E


class Softmax(NamedTuple):
    """What one pass over a chunk's logits gives. `exp` is the workspace: the next chunk overwrites it."""

    exp: Tensor  # (R, V): E, the gradient of the raw logits but for c * row_scale
    row_scale: Tensor  # (R,) float64: 1 / ((e_y + S) temperature), so that dL/d(raw logits) = c * row_scale * E
    logprobs: Tensor  # (R,) float64: log p of the target
    entropy: Tensor | None  # (R,) float64
    # (R,) float64: None where E_y = -S is in `exp` already. Else E_y = 0 there, and dL/d(raw logit of the target) is
    # -c * row_scale * target_mass, which write_grad_hidden_ puts into dX and subtract_targets_ into dW and db
    target_mass: Tensor | None = None


class Head(Protocol):
    """An LM head and its workspace: logits, softmax and the two gradient products of a chunk of R rows."""

    weight: Tensor  # (V, D)
    dtype: torch.dtype  # of every product and sum: float32 (float64 for float64)

    def row_bytes(self, gradient: bool, dense: bool = False) -> int:
        """Bytes of workspace that one row of a chunk takes; `dense`: of a chunk for `entropy_gradient`."""

    def reserve(self, rows: int, gradient: bool, dense: bool = False) -> None:
        """One workspace for every chunk to come, of at most that many rows."""

    def widen(self, x: Tensor) -> Tensor:
        """Rows (R, D) as operand of the products below: rounded to the compute dtype."""

    def softmax(self, x: Tensor, target: Tensor, *, gradient: bool, entropy: bool = False) -> Softmax:
        """Product 1 for rows `x` (R, D) and their `target` (R,); E is left in the workspace if `gradient`."""

    def entropy_gradient(
        self, x: Tensor, target: Tensor, coefficient: Tensor, entropy_gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Product 1, and in its place the whole (R, V) dL/d(raw logits) for (R,) dL/d(-log p) and dL/d(entropy).

        Returned as (factor (R, V), row_scale (R,)), whose product it is.
        """

    def write_grad_hidden_(
        self,
        into: Tensor,  # (N, D), in its own dtype
        index: Tensor,  # (R,) int64, distinct rows of `into`
        factor: Tensor,  # (R, V): E, or dL/d(raw logits)
        row_scale: Tensor,  # (R,)
        target: Tensor,  # (R,)
        target_mass: Tensor | None,  # (R,)
    ) -> None:
        """Product 2: into[index] = diag(row_scale) (factor W - diag(target_mass) W[target])."""

    def add_grad_weight_(self, grad: Tensor, factor: Tensor, x: Tensor, row_scale: Tensor, first: bool) -> None:
        """Product 3: grad (V, D) += factor^T diag(row_scale) x; the `first` chunk writes: `grad` starts as garbage."""

    def add_grad_bias_(self, grad: Tensor, factor: Tensor, row_scale: Tensor) -> None:
        """grad (V,) += factor^T row_scale."""

    def subtract_targets_(
        self,
        grad_weight: Tensor | None,  # (V, D)
        grad_bias: Tensor | None,  # (V,)
        hidden: Tensor,  # (N, D)
        index: Tensor,  # (n,) int64, rows of `hidden`
        target: Tensor,  # (n,)
        scale: Tensor,  # (n,)
    ) -> None:
        """dW[target_i] -= scale_i hidden[index_i] and db[target_i] -= scale_i, in an order that repeats.

        A row of scale 0 adds nothing, whatever its hidden state holds. Asked only of heads that give a `target_mass`.
        """


def torch_row_bytes(vocabulary: int, itemsize: int) -> int:
    """Workspace of a row in `cpu.Head`: its logits in the accumulators' dtype, of `itemsize` bytes."""
    return vocabulary * itemsize


def padded_vocabulary(vocabulary: int) -> int:
    """Columns of a row of E: a multiple of 16, so that rows begin where descriptors and vector accesses may."""
    return vocabulary + -vocabulary % 16


def triton_row_bytes(
    vocabulary: int,
    hidden_size: int,
    itemsize: int,
    *,
    gradient: bool,
    plain: bool = False,
    tile: int = VOCABULARY_TILE,
) -> int:
    """Workspace of a row in `triton.Head`, its temporaries included; `itemsize` is that of the compute dtype.

    The row's partial sums, and its x, gathered. For a gradient also E (padded; float32 logits first in the `plain`
    variant), a float32 row of dX and the scaled row of x.
    """
    scored = ROW_PARTIALS * 4 * -(-vocabulary // tile) + hidden_size * itemsize
    if not gradient:
        return scored
    return scored + padded_vocabulary(vocabulary) * (4 if plain else itemsize) + hidden_size * (4 + itemsize)
