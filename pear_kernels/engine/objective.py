"""What the engine asks of a loss, and of a teacher that a loss compares the head with."""

from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from pear_kernels.engine.head import TeacherRows
from pear_kernels.engine.packing import Pack

T = TypeVar("T")
Finished: TypeAlias = tuple[Tensor, Tensor, Tensor]  # of `Objective.finish`: loss (), weights (n,), statistics (k,)


class Coefficients(NamedTuple):
    """What an objective with `on_logits` returns for R tokens: (R,) each, dL/d of what the name says; None for 0."""

    nll: Tensor | None  # dL/d(-log p_t)
    entropy: Tensor | None = None  # dL/dH_t
    divergence: Tensor | None = None  # dL/dD_t, D_t being the divergence from a teacher

    def require(self, entropy: Tensor | None, divergence: Tensor | None) -> None:
        """ValueError where a coefficient belongs to a quantity that the walk does not make."""
        for name, missing in (("entropy", entropy is None), ("divergence", divergence is None)):
            if missing and getattr(self, name) is not None:
                remedy = "set needs_entropy = True" if name == "entropy" else "there is no teacher in this call"
                raise ValueError(f"an objective returned a coefficient of the {name}, which is not made: {remedy}")


class Objective:
    """A loss as the engine sees it: it gets log-probs and returns coefficients c_t = dL/d(-log p_t).

    The engine calls `observe` for each chunk of tokens, from the last token to the first, asks for the chunk's
    `coefficients` while its logits are in memory, and calls `finish` at the end. Bounds [begin, end) are places in the
    compact order of `pack`. All tensors are float64 and without gradients.

    A subclass overrides `coefficients`. If the loss is a sum of detached weights times -log p, it needs nothing else.

    Attributes:
        coupled: a coefficient depends on all tokens of its sequence. `coefficients` is then called once the whole
            sequence has been observed, and the logits of a sequence longer than a chunk are made twice, unless:
        separable: all tokens of a sequence share one coefficient, or each coefficient is `known_coefficients` times a
            `pending_factor` that the sequence's tokens share. dW of the first such sequence is then rescaled in place.
        scalable: each token's coefficient is `known_coefficients` times its own `pending_factor`. Rows of dX can then
            be rescaled in place even if dW cannot, which is all that a frozen head needs.
        on_logits: `coefficients` returns `Coefficients`: the entropy or a divergence has a gradient, too.
        needs_entropy: the entropy of each token's distribution is made, and given to `observe` and `finish`.
        stats: names of the statistics that `finish` returns.
    """

    coupled: bool = False
    separable: bool = False
    scalable: bool = False
    on_logits: bool = False
    needs_entropy: bool = False
    stats: tuple[str, ...] = ()
    _averaged: Tensor | None = None  # (n,) bool, tokens that token_accuracy and entropy are means over; None for all

    def __init__(self, pack: Pack):
        self.pack = pack
        self.logprobs = torch.zeros(pack.tokens, dtype=torch.float64, device=pack.index.device)  # (n,), those observed

    def observe(self, begin: int, end: int, logprobs: Tensor, entropy: Tensor | None = None) -> None:
        """Takes the log-probs (end - begin,) of these tokens, and their entropies where they are made.

        Called once per token, from right to left within a sequence.
        """
        self.logprobs[begin:end] = logprobs

    def coefficients(self, begin: int, end: int) -> Tensor | Coefficients:
        """(end - begin,) c_t = dL/d(-log p_t) of observed tokens; with `on_logits`, `Coefficients`."""
        raise NotImplementedError

    def known_coefficients(self, begin: int, end: int) -> Tensor | Coefficients | None:
        """Of a coupled loss, the part of the coefficients that is known once the tokens are observed; None for ones."""
        return None

    def pending_factor(self, begin: int, end: int) -> Tensor:
        """(end - begin,) what multiplies `known_coefficients`, known once the whole sequence is observed."""
        found = self.coefficients(begin, end)
        if isinstance(found, Coefficients):
            raise NotImplementedError(f"{type(self).__name__}: separable or scalable, but without known_coefficients")
        return found

    def coupled_sequences(self) -> list[bool] | None:
        """Of a coupled loss, which sequences have coefficients that depend on all their tokens; None: all of them."""
        return None

    def rescale(self) -> Tensor | None:
        """(): what all gradients are multiplied by when the walk is over; None for nothing."""
        return None

    def finish(self, logprobs: Tensor, entropy: Tensor | None = None, divergence: Tensor | None = None) -> Finished:
        """After the walk, from its results for all tokens (n,): loss (), weights (n,) and the `stats` (k,).

        By default the loss is sum_t c_t * -log p_t, and likewise for entropy and divergence: right if coefficients are
        detached weights. Weights are the c_t.
        """
        found = self.coefficients(0, self.pack.tokens)
        found = found if isinstance(found, Coefficients) else Coefficients(found)
        found.require(entropy, divergence)
        pairs = zip(found, (-logprobs, entropy, divergence), strict=True)
        loss = self.pack.sums([c * value for c, value in pairs if c is not None and value is not None]).sum()
        weights, scale = torch.zeros_like(logprobs) if found.nll is None else found.nll, self.rescale()
        if scale is not None:
            loss, weights = loss * scale, weights * scale
        return loss, weights, logprobs.new_zeros(0)


def present(value: T | None) -> T:
    """A value that is None only if it was not asked for."""
    assert value is not None
    return value


class TeacherSource(Protocol):
    """Whose distribution a `LogitsWalk` compares with the head's; `objectives.teachers` has two of them."""

    def row_bytes(self) -> int:
        """Bytes of workspace per row of a chunk."""

    def reserve(self, rows: int) -> None:
        """Allocates one workspace for all chunks to come, of at most that many rows."""

    def rows(self, begin: int, end: int) -> TeacherRows:
        """The teacher's distributions at these tokens."""
