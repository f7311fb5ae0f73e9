"""What all losses share: how the custom op makes one (`Loss`, `Problem`), its divisor, and statistics over tokens."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pear_kernels.engine.objective import Coefficients, Objective, present
from pear_kernels.engine.packing import Pack, with_chunk
from pear_kernels.formulas.pear_weights import PEARWeights
from pear_kernels.options import CallOptions, Options, Reduction

T = TypeVar("T")

OF_ALL = (  # statistics that every loss adds: means over the tokens that count (with labels, over the right ones)
    "token_accuracy",  # share of tokens that no other token is likelier than
    "entropy",  # of the distribution over the vocabulary, in nats; only where it was asked for
)
OF_GRADIENT = (  # with a `gradient_tolerance`
    "gradient_kept",  # share of the work of products 2 and 3 that was done
    "gradient_left_out",  # share of the gradient's mass that was left out, never above the tolerance
)


class Problem(NamedTuple):
    """One call of a loss: all that its objective depends on."""

    pack: Pack
    options: dict[type[Options], Any]  # by their classes
    columns: dict[str, Tensor]  # the caller's tensors by name, flat: (N,), (S,), (S+1,) or (); only those given
    weights: Callable[..., PEARWeights]  # the class of the call's backend
    dtype: torch.dtype  # of results: float32, or float64 for float64 inputs

    def take(self, name: str) -> Tensor | None:
        """(n,) the column of that name in compact order; None where it was not given."""
        return self.pack.take(self.columns[name]) if name in self.columns else None

    @property
    def denominator(self) -> Tensor | float | None:
        """() or a number: what replaces the divisor; None for nothing."""
        call: CallOptions = self.options[CallOptions]
        return self.columns.get("denominator", call.denominator)

    def scale(self) -> Tensor:
        """(n,) float64: what multiplies each token's weighted loss."""
        reduction = self.options[Reduction].reduction
        return token_scale(self.pack, reduction, self.denominator, self.columns.get("sequence_scale"))


class Loss(NamedTuple):
    """How the custom op makes a loss. `objectives.LOSSES` has one for each public function."""

    objective: Callable[[Problem], Objective]  # of one call
    stats: Callable[[Sequence[str]], tuple[str, ...]]  # names of the statistics that it makes, from its columns'

    def all_stats(self, columns: Sequence[str], return_entropy: bool, leaves_out: bool) -> tuple[str, ...]:
        """Names of all statistics of a call, in order: those that every loss adds are behind its own."""
        of_all = OF_ALL if return_entropy else OF_ALL[:1]
        return (*self.stats(columns), *of_all, *(OF_GRADIENT if leaves_out else ()))


class FixedCoefficients(Objective):
    """Coefficients given beforehand: the backward pass of `linear_logprobs`; or none, if nothing has a gradient."""

    def __init__(self, *coefficients: Tensor | None):  # (n,) each: one, or the fields of `Coefficients`
        self.known = coefficients

    def observe(self, begin: int, end: int, logprobs: Tensor, entropy: Tensor | None = None) -> None:
        """Nothing depends on them."""

    def coefficients(self, begin: int, end: int) -> Tensor | Coefficients:
        parts = [None if part is None else part[begin:end] for part in self.known]
        if len(parts) > 1:
            return Coefficients(*parts)
        return present(parts[0])


class TokenObjective(Objective):
    """L = sum_t (L_t + entropy_coef * H_t + divergence_coef * D_t) * scale_t, the last two only with `on_logits`.

    `terms` makes L_t and c_t = dL_t / d(-log p_t), once for each token.
    """

    entropy_coef: float | None = None
    divergence_coef: float | None = None
    sequence_sums: PEARWeights | None = None  # of a coupled loss: its log-ratios, summed over sequences

    def __init__(self, problem: Problem, token_scale: Tensor):
        self.pack = problem.pack
        self.token_scale = token_scale  # (n,)
        # (n,) each: log-probs, L and c. No zeros: every row is written before it is read
        self.logprobs, self.losses, self.weights = (torch.empty_like(token_scale) for _ in range(3))
        self.made = 0  # tokens whose L and c are made

    def terms(self, begin: int, end: int, entropy: Tensor | None) -> tuple[Tensor, Tensor]:
        """(end - begin,) L and c of these tokens; of a coupled loss, once their sequences are observed."""
        raise NotImplementedError

    def observe(self, begin: int, end: int, logprobs: Tensor, entropy: Tensor | None = None) -> None:
        self.logprobs = with_chunk(self.logprobs, begin, end, logprobs)
        if self.sequence_sums is not None:
            self.sequence_sums.observe(begin, end, logprobs)
        else:
            self.make(begin, end, entropy)

    def coefficients(self, begin: int, end: int) -> Tensor | Coefficients:
        if self.sequence_sums is not None:
            self.make(begin, end)
        scale = self.token_scale[begin:end]
        nll = self.weights[begin:end] * scale
        if not self.on_logits:
            return nll
        others = (None if c is None else c * scale for c in (self.entropy_coef, self.divergence_coef))
        return Coefficients(nll, *others)

    def mean_log_ratio(self, begin: int, end: int) -> Tensor:
        """(end - begin,) of a coupled loss: the mean log-ratio of each token's sequence."""
        lengths = self.pack.stop[begin:end] - self.pack.start[begin:end]
        return present(self.sequence_sums).log_weights(begin, end) / lengths

    def make(self, begin: int, end: int, entropy: Tensor | None = None) -> None:
        """Fills `losses` and `weights` of these tokens."""
        losses, weights = (self.pack.zero_ghosts(part, begin, end) for part in self.terms(begin, end, entropy))
        self.losses = with_chunk(self.losses, begin, end, losses)
        self.weights = with_chunk(self.weights, begin, end, weights)
        self.made += end - begin

    def make_rest(self) -> None:
        """Before `finish`: without gradients, nothing has asked a coupled loss for its coefficients."""
        if self.made < self.pack.tokens:
            self.make(0, self.pack.tokens)


def token_scale(
    pack: Pack, reduction: str | None, denominator: Tensor | float | None, sequence_scale: Tensor | None
) -> Tensor:
    """(n,) float64: what multiplies each token's weighted loss.

    The divisor is the number of tokens ("mean"), 1 ("sum"), or, on top of each token's own 1 / T_s, the number of
    sequences with a token that counts ("sequence_mean"). `denominator` replaces it.
    """
    divisor: Tensor | float = 1
    if denominator is not None:
        divisor = denominator.reshape(()) if isinstance(denominator, Tensor) else denominator
    elif reduction == "mean":
        divisor = at_least_one(pack.counted)
    elif reduction == "sequence_mean":
        divisor = (pack.lengths > 0).sum().clamp(min=1)
    per_sequence = reduction == "sequence_mean" or sequence_scale is not None
    if not per_sequence and not isinstance(divisor, Tensor):  # one launch where the host knows the scale of all tokens
        return pack.zero_ghosts(pack.index.new_full((pack.tokens,), 1 / divisor, dtype=torch.float64))
    scale = torch.ones(pack.tokens, dtype=torch.float64, device=pack.index.device)
    if reduction == "sequence_mean":
        scale = scale / (pack.stop - pack.start)
    if sequence_scale is not None:
        scale = scale * sequence_scale[pack.sequence]
    return pack.zero_ghosts(scale / divisor)


def effective_sample_size(total: Tensor, squares: Tensor, tokens: int | Tensor) -> Tensor:
    """(): (sum w)^2 / (n sum w^2), the share of n tokens that carry the gradient; 0 if all weights are 0."""
    return total.square() / (tokens * squares).clamp(min=torch.finfo(torch.float64).tiny)


def largest(values: Tensor) -> Tensor:
    """(): the largest of `values` (n,) and 0."""
    return values.amax().clamp(min=0) if len(values) else values.new_zeros(())


def as_statistic(count: int | Tensor, like: Tensor) -> Tensor:
    """() in the dtype of `like`: a number of tokens, which may be known on the host."""
    return count.to(like.dtype) if isinstance(count, Tensor) else like.new_full((), count)


def at_least_one(count: int | Tensor) -> int | Tensor:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


@contextlib.contextmanager
def set_to(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Within it, a call finds a function of the caller, which no op can take as an argument."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
