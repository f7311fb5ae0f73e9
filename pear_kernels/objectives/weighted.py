"""Weightings of SFT that are PEAR's neighbours, as the engine sees them: from log-probs to a loss and a coefficient.

A weighting is a function of (n,) float64 tensors, `(Tokens, options) -> (L, c)` with `c_t = dL_t / d(-log p_t)`. For
most of them L is `w * -log p` with a detached w, and c is w. `WeightedObjective` is what all of them share with weights
that are given, or made by a function of the caller's.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pear_kernels import checks
from pear_kernels.engine.head import BackendLogitsHead
from pear_kernels.engine.objective import Coefficients, Objective, TeacherSource
from pear_kernels.engine.schedule import Wanted
from pear_kernels.formulas.weights import MAX_LOG_RATIO
from pear_kernels.objectives.base import Loss, Problem, at_least_one, effective_sample_size
from pear_kernels.objectives.teachers import loaded_teacher
from pear_kernels.options import UNCLIPPED, DivergenceOptions, Options, WeightingOptions

WEIGHTED_STATS = (
    "nll",  # unweighted mean of -log pi
    "ref_log_ratio_mean",  # mean of log pi - log pi_ref; 0 without ref_logprobs
    "weight_mean",  # mean of w
    "weight_max",
    "weight_zero",  # share of tokens with a weight of 0
    "effective_sample_size",  # (sum w)^2 / (n sum w^2), the share of tokens that carry the gradient
    "tokens",  # n, the tokens that count
)


MIN_MISSED = 1e-30  # least probability of "another token" to divide by, so that float32 holds what comes of it


class Tokens(NamedTuple):
    """What a weighting may look at, of n tokens: (n,) float64, without gradients."""

    logprobs: Tensor
    entropy: Tensor | None  # in nats, where the weighting asks for it
    log_ratio: Tensor | None  # log pi - log pi_ref: a token's, or the mean of its sequence's
    index: Tensor  # (n,) int64, where the tokens stand in the caller's flat tensors


# ---- one formula each


def none(tokens: Tokens, options: WeightingOptions) -> tuple[Tensor, Tensor]:
    """1: plain SFT."""
    return -tokens.logprobs, torch.ones_like(tokens.logprobs)


def dft(tokens: Tokens, options: WeightingOptions) -> tuple[Tensor, Tensor]:
    """p: DFT (arXiv 2508.05629, equation 9)."""
    p = tokens.logprobs.exp()
    return p * -tokens.logprobs, p


def iw_sft(tokens: Tokens, options: WeightingOptions) -> tuple[Tensor, Tensor]:
    """clip(exp(tau mean(log pi - log pi_ref)), 0, iw_max), the mean being a sequence's: iw-SFT (arXiv 2507.12856)."""
    w = (options.iw_tau * tokens.log_ratio).clamp(max=MAX_LOG_RATIO).exp().clamp(max=options.iw_max)
    return w * -tokens.logprobs, w


def psft(tokens: Tokens, options: WeightingOptions) -> tuple[Tensor, Tensor]:
    """r 1[r <= 1 + psft_clip], r = pi / pi_ref: PSFT (arXiv 2508.17784), PPO's clip with an advantage of 1."""
    r = tokens.log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    w = torch.where(r > 1 + options.psft_clip, 0.0, r)  # NaN stays NaN
    return w * -tokens.logprobs, w


def asft(tokens: Tokens, options: WeightingOptions) -> tuple[Tensor, Tensor]:
    """p, and asft_kl times the KL from the initial model: ASFT (arXiv 2509.23753).

    Its authors sum KL(pi_ref, pi) over the vocabulary. From one log-prob a token, what can be had exactly is that KL
    for the outcomes "this token" and "another one": a lower bound of it, whose gradient in the target's logit is the
    same, p - p_ref. (1 - p counts for at least `MIN_MISSED` in the coefficient, which then stays finite.)
    """
    log_p, log_q = tokens.logprobs, tokens.logprobs - tokens.log_ratio
    p, missed, missed_ref = log_p.exp(), -torch.expm1(log_p), -torch.expm1(log_q.clamp(max=0.0))
    tiny = torch.finfo(torch.float64).tiny
    other = torch.xlogy(missed_ref, missed_ref) - torch.xlogy(missed_ref, missed.clamp(min=tiny))
    kl = log_q.exp() * (log_q - log_p) + other
    slope = 1 - missed_ref / missed.clamp(min=MIN_MISSED)  # (q - p) / (1 - p)
    return p * -log_p + options.asft_kl * kl, p + options.asft_kl * slope


def idft(tokens: Tokens, options: WeightingOptions) -> tuple[Tensor, Tensor]:
    """p^a with a = clip(exp(-(log p + H)), idft_clip), H the entropy: IDFT (arXiv 2602.12222)."""
    a = (-(tokens.logprobs + tokens.entropy)).clamp(max=MAX_LOG_RATIO).exp().clamp(*options.idft_clip)
    w = (a * tokens.logprobs).exp()
    return w * -tokens.logprobs, w


Formula = Callable[[Tokens, WeightingOptions], tuple[Tensor, Tensor]]


class Weighting(NamedTuple):
    formula: Formula
    needs_entropy: bool = False
    of_sequences: bool = False  # the log-ratio is the mean of a sequence's


WEIGHTINGS = {
    "none": Weighting(none),
    "dft": Weighting(dft),
    "iw-sft": Weighting(iw_sft, of_sequences=True),
    "psft": Weighting(psft),
    "asft": Weighting(asft),
    "idft": Weighting(idft, needs_entropy=True),
}


def by(weights: Callable[[Tokens], Tensor]) -> Weighting:
    """w = weights(tokens), whatever they hold."""

    def formula(tokens: Tokens, options: WeightingOptions) -> tuple[Tensor, Tensor]:
        w = weights(tokens)
        return w * -tokens.logprobs, w

    return Weighting(formula)


# ---- the whole loss


class WeightedObjective(Objective):
    """L = sum_t L_t * scale_t, L_t and its coefficient by a weighting's formula."""

    def __init__(self, problem: Problem, weighting: Weighting):
        self.pack = pack = problem.pack
        self.weighting = weighting
        self.token_scale = problem.scale()  # (n,)
        ref_logprobs = problem.take("ref_logprobs")
        self.ref_logprobs = None if ref_logprobs is None else ref_logprobs.double()
        self.options = problem.options.get(WeightingOptions, WeightingOptions())
        self.coupled = weighting.of_sequences
        self.logprobs, self.losses, self.weights = (
            torch.zeros(pack.tokens, dtype=torch.float64, device=pack.index.device) for _ in range(3)
        )
        # log-ratios summed over sequences are PEAR's sequence level without its clips
        self.sums = problem.weights(self.ref_logprobs, pack, UNCLIPPED) if self.coupled else None

    def observe(self, begin: int, end: int, logprobs: Tensor, entropy: Tensor | None = None) -> None:
        self.logprobs[begin:end] = logprobs
        if self.sums is not None:
            self.sums.observe(begin, end, logprobs)
            return
        ratio = None if self.ref_logprobs is None else logprobs - self.ref_logprobs[begin:end]
        self.weigh(begin, end, entropy, ratio)

    def coefficients(self, begin: int, end: int) -> Tensor:
        if self.sums is not None:
            self.weigh_sequences(begin, end)
        return self.weights[begin:end] * self.token_scale[begin:end]

    def weigh_sequences(self, begin: int, end: int) -> None:
        """`weigh` by the means of the tokens' sequences, which are all observed."""
        mean = self.sums.log_weights(begin, end) / (self.pack.stop - self.pack.start)[begin:end]
        self.weigh(begin, end, None, mean)

    def weigh(self, begin: int, end: int, entropy: Tensor | None, log_ratio: Tensor | None) -> None:
        """Fills `losses` and `weights` of these tokens, before `token_scale`."""
        tokens = Tokens(self.logprobs[begin:end], entropy, log_ratio, self.pack.index[begin:end])
        for whole, part in zip((self.losses, self.weights), self.weighting.formula(tokens, self.options), strict=True):
            whole[begin:end] = self.pack.zero_ghosts(part, begin, end)

    def finish(
        self, logprobs: Tensor, entropy: Tensor | None = None, divergence: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (), coefficients before `token_scale` (n,) and `WEIGHTED_STATS` (7,), float64."""
        if self.sums is not None:
            self.weigh_sequences(0, self.pack.tokens)
        losses, weights = self.losses, self.weights
        nothing = torch.zeros_like(logprobs)
        ratio = nothing if self.ref_logprobs is None else logprobs - self.ref_logprobs
        values = (-logprobs, ratio, weights, weights == 0, weights.square(), losses * self.token_scale)
        *sums, squares, loss = (self.pack.zero_ghosts(value.double()).sum() for value in values)
        tokens = at_least_one(self.pack.counted)
        nll, ratio, mean, zero = (total / tokens for total in sums)
        effective = effective_sample_size(sums[2], squares, tokens)
        # a 0 beside the weights stands for their maximum where there is none
        largest = torch.cat([weights, nothing.new_zeros(1)]).amax()
        counted = torch.full_like(loss, 1) * self.pack.counted
        return loss, weights, torch.stack([nll, ratio, mean, largest, zero, effective, counted])


class AnchoredObjective(Objective):
    """L = sum_t scale_t * (L_t + kl_coef * D_t): the KL to a teacher's whole distribution beside another objective.

    That objective must not be coupled.
    """

    def __init__(self, weights: WeightedObjective, kl_coef: float):
        self.weights = weights
        self.kl_coef = kl_coef

    def observe(self, begin: int, end: int, logprobs: Tensor, entropy: Tensor | None = None) -> None:
        self.weights.observe(begin, end, logprobs, entropy)

    def coefficients(self, begin: int, end: int) -> Coefficients:
        kl = self.kl_coef * self.weights.token_scale[begin:end]
        return Coefficients(self.weights.coefficients(begin, end), None, kl)

    def finish(self, logprobs: Tensor, entropy: Tensor | None, divergence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (), and the other objective's weights (n,) and statistics."""
        loss, weights, stats = self.weights.finish(logprobs)
        pull = self.weights.pack.zero_ghosts(divergence * self.weights.token_scale).sum()
        return loss + self.kl_coef * pull, weights, stats


class WeightedLoss(Loss):
    """`linear_weighted_loss`: weights that are given, made by the caller's function, or named."""

    def stats(self, given: Sequence[str]) -> tuple[str, ...]:
        return WEIGHTED_STATS

    def objective(self, problem: Problem, on_logits: bool) -> Objective:
        options = problem.options[WeightingOptions]
        if "weights" in problem.columns:
            known = problem.columns["weights"].double()
            weighting = by(lambda tokens: known[tokens.index])
        elif options.weighting is None:
            weighting = by(_function.get())
        elif "teacher_hidden" in problem.columns:  # "asft", whose KL is to a whole distribution
            return AnchoredObjective(WeightedObjective(problem, WEIGHTINGS["dft"]), options.asft_kl)
        else:
            weighting = WEIGHTINGS[options.weighting]
        return WeightedObjective(problem, weighting)

    def needs_entropy(self, options: dict[type[Options], Any]) -> bool:
        weighting = options[WeightingOptions].weighting
        return weighting is not None and WEIGHTINGS[weighting].needs_entropy

    def needs_logits(self, problem: Problem, wanted: Wanted) -> bool:
        return "teacher_hidden" in problem.columns

    def teacher(self, problem: Problem, student: BackendLogitsHead) -> TeacherSource | None:
        return loaded_teacher(problem, student, DivergenceOptions())


# ---- weights by a function of the caller's

# the function of the call that runs, which no op can take as an argument
_function: ContextVar[Callable[[Tokens], Tensor]] = ContextVar("weights")


@contextlib.contextmanager
def weights_by(function: Callable[..., Tensor]) -> Iterator[None]:
    """Within it, a call of the op without weights takes those of `function`, checked."""
    called = as_called(function)

    def weights(tokens: Tokens) -> Tensor:
        with torch.no_grad():
            # copies: the function may overwrite what it is given, and the pass needs both again
            found = called(tokens.logprobs.clone(), tokens.index.clone())
        if not isinstance(found, Tensor) or found.shape != tokens.logprobs.shape:
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"weights must return a tensor of the log-probs' shape {tuple(tokens.logprobs.shape)}, got {got}"
            )
        if found.is_complex():
            raise TypeError(f"weights must return real numbers, got {found.dtype}: take .real or .abs()")
        checks.check_weights(found, torch.ones_like(found, dtype=torch.bool))
        return found.double()

    token = _function.set(weights)
    try:
        yield
    finally:
        _function.reset(token)


def as_called(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The caller's function as one of log-probs and index, by what it can be called with.

    It is given the index if it has a parameter of that name, or if log-probs alone are too few arguments.

    Raises:
        TypeError: for a function that can be called with neither.
    """
    try:
        # what a module is called by takes any arguments: its forward says which it needs, torch.compile's by the module
        own = getattr(function, "_orig_mod", function)
        signature = inspect.signature(own.forward if isinstance(own, torch.nn.Module) else own)
    except (TypeError, ValueError):  # a builtin such as torch.exp, which shows none
        return lambda logprobs, index: function(logprobs)

    def takes(*arguments, **named) -> bool:
        try:
            signature.bind(*arguments, **named)
        except TypeError:
            return False
        return True

    of_index = signature.parameters.get("index")
    bound = isinstance(own, functools.partial) and "index" in own.keywords  # to another value than ours
    if takes(None, index=None) and of_index is not None and not bound:
        return lambda logprobs, index: function(logprobs, index=index)
    if takes(None):
        return lambda logprobs, index: function(logprobs)
    if takes(None, None):
        return function
    name = getattr(function, "__name__", type(function).__name__)
    raise TypeError(f"weights must be a function f(logprobs) or f(logprobs, index), got {name}{signature}")
