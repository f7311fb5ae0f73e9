"""What the engine asks of an LM head, and the bytes of workspace that a row of a chunk takes on each backend.

The byte formulas are plain functions of shapes because a head needs them to cut its chunks, and `plan` needs them to
say what a shape will cost before any head exists.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from torch import Tensor

from pear_kernels.options import DivergenceOptions

VOCABULARY_TILE = 256  # logits per row that are summed into one partial sum, unless the tile table has another number
ROW_PARTIALS = 3  # float32 partial sums per row and tile, at most: sum E, the maximum and, for the entropy, sum E log E


class Softmax(NamedTuple):
    """Result of one pass over a chunk's logits. `exp` is the workspace, which the next chunk overwrites."""

    exp: Tensor  # (R, V): E, the gradient of the raw logits but for c * row_scale
    row_scale: Tensor  # (R,) float64: 1 / ((e_y + S) temperature), so that dL/d(raw logits) = c * row_scale * E
    logprobs: Tensor  # (R,) float64: log p of the target
    entropy: Tensor | None  # (R,) float64, in nats
    # (R,) float64. None: `exp` holds E_y = -S. Otherwise E_y is 0 there, and dL/d(raw logit of the target) is
    # -c * row_scale * target_mass: write_grad_hidden_ puts it into dX, subtract_targets_ into dW and db.
    target_mass: Tensor | None = None
    # (R,) bool, or float64 0 and 1: whether no other token is more likely than the target. Of equal logits the first
    # one wins, as in argmax, where the backend knows their positions; elsewhere a target that shares the maximum does
    # not count.
    top1: Tensor | None = None
    exp_sum: Tensor | None = None  # (R,) float64: sum of `exp` without the target; None where it is not known


class Kept(NamedTuple):
    """The part of a chunk's E (R, V) of which products 2 and 3 are taken: k rows, K columns (`engine.sparsify`)."""

    rows: Tensor | None  # (k,) int64, ascending; None: all R
    columns: Tensor  # (K,) int64, ascending
    exp: Tensor  # (k, K), in the workspace
    rest: Tensor  # (R,) the sum of each row's entries that are left out
    mean: Tensor  # (D,), or (0,) without a dX: the mean of W's rows over the columns left out, weighted by their mass


class VocabularyRows(NamedTuple):
    """A teacher's distribution over the whole vocabulary at R tokens."""

    options: DivergenceOptions
    log_q: Tensor  # (R, V), the teacher's workspace


class TopKRows(NamedTuple):
    """A teacher's distribution over K + 1 outcomes at R tokens: its K most likely tokens, and any other token."""

    options: DivergenceOptions
    ids: Tensor  # (R, K) int64
    top: Tensor  # (R, K) float64, log-probs of the ids
    rest: Tensor  # (R,) float64, probability of any other token, above 0


TeacherRows: TypeAlias = VocabularyRows | TopKRows


class Scores(NamedTuple):
    """Result of one pass over a chunk's logits that leaves the logits in the workspace, until the next chunk's.

    `LogitsHead.gradient` reads `logprobs`, `entropy` and `log_z` again. A sharded head overwrites them, in place, by
    those of the whole vocabulary.
    """

    logprobs: Tensor  # (R,) float64: log p of the target
    entropy: Tensor | None  # (R,) float64, in nats
    divergence: Tensor | None  # (R,) float64, of the head's distribution from the teacher's
    rows: Any  # the backend's own, which `LogitsHead.gradient` needs again
    top1: Tensor  # (R,) bool, as in `Softmax`
    top: Tensor  # (R,) the largest logit
    log_z: Tensor  # (R,) float64: log of sum_v exp(z_v - top)


class Head(Protocol):
    """An LM head and its workspace: logits, softmax and the two gradient products of a chunk of R rows."""

    weight: Tensor  # (V, D)
    planned: torch.Size  # (V, D) by which chunks are cut: with a sharded vocabulary, the shape of the largest shard
    dtype: torch.dtype  # of every product and sum: float32 (float64 for float64)
    separate_target: bool  # whether E must be 0 at the target, with a `Softmax.target_mass`; a head may do so always

    def row_bytes(self, gradient: bool) -> int:
        """Bytes of workspace that one row of a chunk takes, with or without a gradient."""

    def reserve(self, rows: int, gradient: bool) -> None:
        """Allocate one workspace for all chunks, each of at most `rows` rows."""

    def as_operand(self, x: Tensor) -> Tensor:
        """Rows (R, D) as operand of the products below: rounded to the compute dtype."""

    def softmax(self, x: Tensor, target: Tensor, *, gradient: bool, entropy: bool = False) -> Softmax:
        """Product 1 for rows `x` (R, D) and their `target` (R,). With `gradient`, E stays in the workspace."""

    def write_grad_hidden_(
        self,
        into: Tensor,  # (N, D), in its own dtype
        index: Tensor,  # (R,) int64, distinct rows of `into`
        factor: Tensor,  # (R, V): E, or dL/d(raw logits)
        row_scale: Tensor,  # (R,)
        target: Tensor,  # (R,)
        target_mass: Tensor | None,  # (R,)
        kept: Kept | None = None,
    ) -> None:
        """Product 2: into[index] = diag(row_scale) (factor W - diag(target_mass) W[target]).

        Where only a part of `factor` is `kept`, kept.exp W[kept.columns] + kept.rest kept.mean^T takes the place of
        factor W.
        """

    def add_grad_weight_(
        self, grad: Tensor, factor: Tensor, x: Tensor, row_scale: Tensor, first: bool, kept: Kept | None = None
    ) -> None:
        """Product 3: grad (V, D) += factor^T diag(row_scale) x. The `first` chunk overwrites `grad`, uninitialised.

        Where only a part of `factor` is `kept`, only its rows and columns are read and written.
        """

    def add_grad_bias_(self, grad: Tensor, factor: Tensor, row_scale: Tensor) -> None:
        """grad (V,) += factor^T row_scale."""

    def scaled(self, row_scale: Tensor) -> Tensor:
        """(R,) what multiplies E in the workspace where `row_scale` (R,) multiplies the whole head's."""

    def compact_(self, factor: Tensor, rows: Tensor | None, columns: Tensor) -> Tensor:
        """(k, K) factor[rows, columns] in the workspace, which overwrites `factor` (R, V)."""

    def mean_row(self, mass: Tensor) -> Tensor:
        """(D,) sum_v mass_v W_v / sum_v mass_v, zeros if there is no `mass` (V,)."""

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

        A row of scale 0 adds nothing, whatever its hidden state holds. Called only if the head gives a `target_mass`.
        """


class LogitsHead(Head, Protocol):
    """A head for losses whose gradient in the logits is not a per-row scalar times E. Its workspace holds logits."""

    def scores(self, x: Tensor, target: Tensor, *, entropy: bool = False, teacher: TeacherRows | None = None) -> Scores:
        """Product 1 for rows `x` (R, D), and log-probs, entropies and divergences of their logits."""

    def gradient(
        self, scores: Scores, nll: Tensor | None, entropy: Tensor | None = None, divergence: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """dL/d(raw logits) from (R,) float64 dL/d(-log p), dL/d(entropy) and dL/d(divergence); None for 0.

        Overwrites the logits. Returns (factor (R, V), row_scale (R,)), whose product is the gradient.
        """


# ---- what a backend's own head can do beyond what the engine asks


class BackendHead(Head, Protocol):
    """A head that a backend makes. It may hold a rank's rows of a vocabulary that several ranks share."""

    def target_logits(self, x: Tensor, target: Tensor) -> Tensor:
        """(R,) float64: the logits of `target` (R,), softcap and temperature applied, one dot product per row."""

    def softmax(
        self, x: Tensor, target: Tensor, *, gradient: bool, entropy: bool = False, logit: Tensor | None = None
    ) -> Softmax:
        """As in `Head`. For a shard, `logit` (R,) are the `target_logits`, which another rank may have computed.

        A target that another rank holds is -1. The softmax is then that of this head's columns and the target, and
        E_y is 0 in `exp`.
        """


@runtime_checkable
class BackendLogitsHead(BackendHead, LogitsHead, Protocol):
    """A `LogitsHead` that a backend makes."""

    def scores(
        self,
        x: Tensor,
        target: Tensor,
        *,
        entropy: bool = False,
        teacher: TeacherRows | None = None,
        logit: Tensor | None = None,
    ) -> Scores:
        """As in `LogitsHead`, with the `logit` of `BackendHead.softmax`. A shard has no teacher."""

    def log_softmax(self, x: Tensor, temperature: float) -> Tensor:
        """(R, V) in the workspace: log-probs of all tokens (>= `MIN_LOG`), `temperature` on top of the head's own."""


AnyHead = TypeVar("AnyHead", bound=BackendHead)
# weight (V, D), bias (V,), temperature, softcap, and the compute dtype, to which operands are rounded as by autocast
HeadFactory: TypeAlias = Callable[[Tensor, Tensor | None, float, float | None, torch.dtype], AnyHead]


# ---- bytes of workspace per row


def torch_row_bytes(vocabulary: int, itemsize: int) -> int:
    """For `backends.torch`: the row's logits in the accumulators' dtype, of `itemsize` bytes."""
    return vocabulary * itemsize


def padded_vocabulary(vocabulary: int) -> int:
    """Columns of a row of E: a multiple of 16, so that every row is aligned for descriptors and vector loads."""
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
    """For `backends.triton`, temporaries included; `itemsize` is that of the compute dtype.

    Always the row's partial sums and its gathered x; in the `plain` variant its float32 logits. A gradient adds E
    (padded; in place of the logits, where there are any), a float32 row of dX and the scaled row of x.
    """
    scored = ROW_PARTIALS * 4 * -(-vocabulary // tile) + hidden_size * itemsize
    if plain:
        scored += 4 * padded_vocabulary(vocabulary)
    elif gradient:
        scored += itemsize * padded_vocabulary(vocabulary)
    return scored + hidden_size * (4 + itemsize) if gradient else scored
