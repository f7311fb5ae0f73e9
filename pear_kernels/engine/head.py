"""What the engine asks of an LM head, whoever computes it, and the bytes a row of a chunk takes in each of them.

The byte formulas are plain functions of shapes because two ask for them: a head, to cut its chunks, and `plan`, to say
beforehand what a shape will cost.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pear_kernels.options import DivergenceOptions

VOCABULARY_TILE = 256  # columns of the logits that leave one partial sum a row, if the tile table says nothing else
ROW_PARTIALS = 3  # float32 of each row and tile, at most: the sum of E, the maximum and, for the entropy, sum E log E


class Softmax(NamedTuple):
    """What one pass over a chunk's logits gives. `exp` is the workspace: the next chunk overwrites it."""

    exp: Tensor  # (R, V): E, the gradient of the raw logits but for c * row_scale; what it is, the head knows
    row_scale: Tensor  # (R,) float64: 1 / ((e_y + S) temperature), so that dL/d(raw logits) = c * row_scale * E
    logprobs: Tensor  # (R,) float64: log p of the target
    entropy: Tensor | None  # (R,) float64
    # (R,) float64: None where E_y = -S is in `exp` already. Else E_y = 0 there, and dL/d(raw logit of the target) is
    # -c * row_scale * target_mass, which write_grad_hidden_ puts into dX and subtract_targets_ into dW and db
    target_mass: Tensor | None = None
    # (R,) bool, or 0 and 1: no other token is likelier than the target. Of equal logits the first one wins, as in
    # argmax, where the backend keeps their places; else a target that shares the maximum does not count
    top1: Tensor | None = None


class TeacherRows(NamedTuple):
    """A teacher's distribution over the vocabulary at R tokens: all of it, or its K most likely tokens.

    With those the outcomes to compare are K + 1, the last one being any other token.
    """

    options: DivergenceOptions
    log_q: Tensor | None  # (R, V), the teacher's workspace
    ids: Tensor | None = None  # (R, K) int64
    top: Tensor | None = None  # (R, K) float64, log-probs of the ids
    rest: Tensor | None = None  # (R,) float64, probability of any other token, above 0


class Scores(NamedTuple):
    """What one pass over a chunk's logits gives where they stay in the workspace, until the next chunk's."""

    logprobs: Tensor  # (R,) float64: log p of the target
    entropy: Tensor | None  # (R,) float64
    divergence: Tensor | None  # (R,) float64, of the head's distribution from the teacher's
    rows: Any  # what `LogitsHead.gradient` needs again
    top1: Tensor  # (R,) bool, as in `Softmax`


class Head(Protocol):
    """An LM head and its workspace: logits, softmax and the two gradient products of a chunk of R rows."""

    weight: Tensor  # (V, D)
    planned: torch.Size  # (V, D) that chunks are cut for: of a shard, that of the largest one
    dtype: torch.dtype  # of every product and sum: float32 (float64 for float64)

    def row_bytes(self, gradient: bool) -> int:
        """Bytes of workspace that one row of a chunk takes."""

    def reserve(self, rows: int, gradient: bool) -> None:
        """One workspace for every chunk to come, of at most that many rows."""

    def as_operand(self, x: Tensor) -> Tensor:
        """Rows (R, D) as operand of the products below: rounded to the compute dtype."""

    def target_logits(self, x: Tensor, target: Tensor) -> Tensor:
        """(R,) float64: the logits of `target` (R,), softcap and temperature applied, a dot product a row."""

    def softmax(
        self, x: Tensor, target: Tensor, *, gradient: bool, entropy: bool = False, logit: Tensor | None = None
    ) -> Softmax:
        """Product 1 for rows `x` (R, D) and their `target` (R,); E is left in the workspace if `gradient`.

        Of a shard, which has not all targets, `logit` are their `target_logits` (R,): -1 is a target elsewhere, the
        softmax is that of the head's own columns and the target, and E_y is 0 in `exp`.
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


class LogitsHead(Head, Protocol):
    """The same for losses whose gradient in the logits is no row scale times E. Its logits lie in the workspace."""

    def scores(
        self,
        x: Tensor,
        target: Tensor,
        *,
        entropy: bool = False,
        teacher: TeacherRows | None = None,
        logit: Tensor | None = None,
    ) -> Scores:
        """Product 1 for rows `x` (R, D), and log-probs, entropies and divergences of their logits.

        `logit` is that of `softmax`; a shard has no teacher.
        """

    def joined(self, scores: Scores, logit: Tensor, logprobs: Tensor, entropy: Tensor, top1: Tensor) -> Scores:
        """Of a shard: the same columns, as part of a distribution with these log-probs, entropies and `top1` (R,)."""

    def gradient(
        self, scores: Scores, nll: Tensor | None, entropy: Tensor | None = None, divergence: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """dL/d(raw logits) for (R,) float64 dL/d(-log p), dL/d(entropy) and dL/d(divergence); None for 0.

        In place of the logits, as (factor (R, V), row_scale (R,)), whose product it is.
        """

    def log_softmax(self, x: Tensor, temperature: float) -> Tensor:
        """(R, V) in the workspace: log-probs of all tokens (>= `MIN_LOG`), `temperature` on top of the head's own."""


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

    The row's partial sums, and its x, gathered; float32 logits in the `plain` variant. For a gradient also E (padded;
    in place of the logits, where there are any), a float32 row of dX and the scaled row of x.
    """
    scored = ROW_PARTIALS * 4 * -(-vocabulary // tile) + hidden_size * itemsize
    if plain:
        scored += 4 * padded_vocabulary(vocabulary)
    elif gradient:
        scored += itemsize * padded_vocabulary(vocabulary)
    return scored + hidden_size * (4 + itemsize) if gradient else scored
