"""What the engine asks of a loss, and of a teacher that a loss compares the head with."""

from typing import NamedTuple, Protocol

from torch import Tensor

from pear_kernels.engine.head import TeacherRows


class Coefficients(NamedTuple):
    """What a `LogitsWalk` asks of an objective: (R,) each, dL/d of what the name says; None for 0."""

    nll: Tensor | None
    entropy: Tensor | None = None
    divergence: Tensor | None = None


class Objective:
    """A loss, to the engine. Bounds are [begin, end) in the pack's compact order."""

    coupled = False  # a coefficient depends on all tokens of its sequence
    separable = True  # of a coupled loss: c = known_coefficients * pending_factor, one factor per sequence
    scalable = True  # of a coupled loss: each token's coefficient is a part known now times one scalar known later

    def observe(self, begin: int, end: int, logprobs: Tensor, entropy: Tensor | None = None) -> None:
        """The log-probs (end - begin,) of these tokens, and entropies if the walk makes them.

        Called once for each token, right to left in a sequence.
        """
        raise NotImplementedError

    def coefficients(self, begin: int, end: int) -> Tensor | Coefficients:
        """(end - begin,) c_t = dL/d(-log p_t), of tokens that were observed; of a `LogitsWalk`, `Coefficients`."""
        raise NotImplementedError

    def known_coefficients(self, begin: int, end: int) -> Tensor | Coefficients | None:
        """Of a coupled loss, what is known of the coefficients as soon as the tokens are observed; None for ones."""
        return None

    def pending_factor(self, begin: int, end: int) -> Tensor:
        """(end - begin,) what `known_coefficients` are to be multiplied by once the whole sequence was observed."""
        return self.coefficients(begin, end)

    def coupled_sequences(self) -> list[bool] | None:
        """Of a coupled loss, which sequences have coefficients that depend on all their tokens; None: all of them."""
        return None

    def rescale(self) -> Tensor | None:
        """(): what all gradients are multiplied by when the walk is over; None for nothing."""
        return None

    def finish(
        self, logprobs: Tensor, entropy: Tensor | None, divergence: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """After the walk, from what it made of all tokens (n,): loss (), weights (n,) and statistics, all float64."""
        raise NotImplementedError


class TeacherSource(Protocol):
    """Whose distribution a `LogitsWalk` compares with the head's; `objectives.distill` has two of them."""

    def row_bytes(self) -> int:
        """Bytes of workspace that a row takes."""

    def reserve(self, rows: int) -> None:
        """One workspace for every chunk to come."""

    def rows(self, begin: int, end: int) -> TeacherRows:
        """Of these tokens."""
