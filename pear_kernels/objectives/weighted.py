"""Other weightings of SFT than PEAR's: from log-probs to a loss and a coefficient.

A weighting is a function of (n,) float64 tensors, `(Tokens, options) -> (L, c)` with `c_t = dL_t / d(-log p_t)`. For
most of them L is `w * -log p` with a detached w, and c is w. `WeightedObjective` serves these, weights that are given,
and weights by a function of the caller.
"""

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from pear_kernels import checks
from pear_kernels.engine.objective import Finished, Objective, present
from pear_kernels.formulas.pear_weights import capped_exp, compared
from pear_kernels.objectives.base import (
    Problem,
    TokenObjective,
    as_statistic,
    at_least_one,
    effective_sample_size,
    largest,
    set_to,
)
from pear_kernels.options import UNCLIPPED, WeightingOptions

WEIGHTED_STATS = (
    "nll",  # unweighted mean of -log pi
    "ref_log_ratio_mean",  # mean of log pi - log pi_ref; 0 without ref_logprobs
    "weight_mean",  # mean of w
    "weight_max",
    "weight_zero",  # share of tokens with a weight of 0
    "effective_sample_size",  # (sum w)^2 / (n sum w^2), the share of tokens that carry the gradient
    "tokens",  # n, the tokens that count
)


MIN_MISSED = 1e-30  # least probability of "another token" to divide by, so that the quotient is finite in float32


class Tokens(NamedTuple):
    """The inputs of a weighting, of n tokens: (n,) float64, without gradients."""

    logprobs: Tensor
    entropy: Tensor | None  # in nats, where the weighting asks for it
    log_ratio: Tensor | None  # log pi - log pi_ref: a token's, or the mean of its sequence's
    index: Tensor  # type: ignore[assignment]  # (n,) int64, where the tokens stand in the caller's flat tensors


Formula = Callable[[Tokens, WeightingOptions], tuple[Tensor, Tensor]]
Weights = Callable[[Tokens, WeightingOptions], Tensor]


def detached(weights: Weights) -> Formula:
    """The formula of L = w * -log p with detached weights w."""

    @functools.wraps(weights)
    def formula(tokens: Tokens, options: WeightingOptions) -> tuple[Tensor, Tensor]:
        w = weights(tokens, options)
        return w * -tokens.logprobs, w

    return formula


# ---- one formula each


def none(tokens: Tokens, options: WeightingOptions) -> tuple[Tensor, Tensor]:
    """1: plain SFT."""
    return -tokens.logprobs, torch.ones_like(tokens.logprobs)


@detached
def dft(tokens: Tokens, options: WeightingOptions) -> Tensor:
    """p: DFT (arXiv 2508.05629, equation 9)."""
    return tokens.logprobs.exp()


@detached
def iw_sft(tokens: Tokens, options: WeightingOptions) -> Tensor:
    """clip(exp(tau mean(log pi - log pi_ref)), 0, iw_max), the mean being a sequence's: iw-SFT (arXiv 2507.12856)."""
    return capped_exp(present(tokens.log_ratio) * options.iw_tau).clamp(max=options.iw_max)


@detached
def psft(tokens: Tokens, options: WeightingOptions) -> Tensor:
    """r 1[r <= 1 + psft_clip], r = pi / pi_ref: PSFT (arXiv 2508.17784), PPO's clip with an advantage of 1."""
    r = capped_exp(present(tokens.log_ratio))
    return torch.where(r > 1 + options.psft_clip, 0.0, r)  # NaN stays NaN


def asft(tokens: Tokens, options: WeightingOptions) -> tuple[Tensor, Tensor]:
    """p, and asft_kl times the KL from the initial model: ASFT (arXiv 2509.23753).

    Its authors sum KL(pi_ref, pi) over the vocabulary. One log-prob per token gives that KL exactly for the outcomes
    "this token" and "another token": a lower bound of theirs, whose gradient in the target's logit is the same,
    p - p_ref. (1 - p is at least `MIN_MISSED` in the coefficient, which then stays finite.)
    """
    log_p, log_q = tokens.logprobs, tokens.logprobs - present(tokens.log_ratio)
    p, missed, missed_ref = log_p.exp(), -torch.expm1(log_p), -torch.expm1(log_q.clamp(max=0.0))
    tiny = torch.finfo(torch.float64).tiny
    other = torch.xlogy(missed_ref, missed_ref) - torch.xlogy(missed_ref, missed.clamp(min=tiny))
    kl = log_q.exp() * (log_q - log_p) + other
    slope = 1 - missed_ref / missed.clamp(min=MIN_MISSED)  # (q - p) / (1 - p)
    return p * -log_p + options.asft_kl * kl, p + options.asft_kl * slope


@detached
def idft(tokens: Tokens, options: WeightingOptions) -> Tensor:
    """p^a with a = clip(exp(-(log p + H)), idft_clip), H the entropy: IDFT (arXiv 2602.12222)."""
    a = capped_exp(-(tokens.logprobs + present(tokens.entropy))).clamp(*options.idft_clip)
    return (a * tokens.logprobs).exp()


class Weighting(NamedTuple):
    formula: Formula
    needs_entropy: bool = False
    sequence_ratio: bool = False  # the log-ratio is the mean over the sequence


WEIGHTINGS = {
    "none": Weighting(none),
    "dft": Weighting(dft),
    "iw-sft": Weighting(iw_sft, sequence_ratio=True),
    "psft": Weighting(psft),
    "asft": Weighting(asft),
    "idft": Weighting(idft, needs_entropy=True),
}


# ---- the whole loss


class WeightedObjective(TokenObjective):
    """L = sum_t scale_t * L_t, with L_t and its coefficient from a weighting's formula.

    With `kl_coef` (of a weighting that is not coupled) it is L_t + kl_coef * D_t, D being the KL to the whole
    distribution of a teacher.
    """

    separable = scalable = True

    def __init__(self, problem: Problem, weighting: Weighting, kl_coef: float | None = None):
        super().__init__(problem, problem.scale())
        self.weighting, self.needs_entropy = weighting, weighting.needs_entropy
        self.divergence_coef, self.on_logits = kl_coef, kl_coef is not None
        ref_logprobs = problem.take("ref_logprobs")
        self.ref_logprobs = None if ref_logprobs is None else ref_logprobs.double()
        self.options = problem.options.get(WeightingOptions, WeightingOptions())
        if weighting.sequence_ratio:
            self.coupled = True
            # log-ratios summed over sequences are PEAR's sequence level without its clips
            self.sequence_sums = problem.weights(present(self.ref_logprobs), self.pack, UNCLIPPED)

    def terms(self, begin: int, end: int, entropy: Tensor | None) -> tuple[Tensor, Tensor]:
        logprobs, ratio = self.logprobs[begin:end], None
        if self.sequence_sums is not None:
            ratio = self.mean_log_ratio(begin, end)
        elif self.ref_logprobs is not None:
            ratio = logprobs - self.ref_logprobs[begin:end]
        return self.weighting.formula(Tokens(logprobs, entropy, ratio, self.pack.index[begin:end]), self.options)

    def finish(self, logprobs: Tensor, entropy: Tensor | None = None, divergence: Tensor | None = None) -> Finished:
        """Loss (), coefficients before `token_scale` (n,) and `WEIGHTED_STATS` (7,), float64."""
        self.make_rest()
        weights = self.weights
        ratio = torch.zeros_like(logprobs) if self.ref_logprobs is None else logprobs - self.ref_logprobs
        is_zero = compared(torch.eq, weights, 0)
        sums = self.pack.sums((-logprobs, ratio, weights, is_zero, weights.square(), self.losses * self.token_scale))
        tokens = at_least_one(self.pack.counted)
        nll, ratio, mean, zero = (sums[:4] / tokens).unbind()
        effective = effective_sample_size(sums[2], sums[4], tokens)
        counted = as_statistic(self.pack.counted, sums)
        loss = sums[5]
        if self.divergence_coef is not None:
            loss = loss + self.divergence_coef * self.pack.sums([present(divergence) * self.token_scale])[0]
        return loss, weights, torch.stack([nll, ratio, mean, largest(weights), zero, effective, counted])


def weighted_objective(problem: Problem) -> Objective:
    """The objective of `linear_weighted_loss`: by weights that are given, made by the caller's function, or named."""
    options = problem.options[WeightingOptions]
    if "weights" in problem.columns:
        known = problem.columns["weights"].double()
        return WeightedObjective(problem, Weighting(detached(lambda tokens, _: known[tokens.index])))
    if options.weighting is None:
        return WeightedObjective(problem, Weighting(detached(_weights.get())))
    if "teacher_hidden" in problem.columns:  # "asft", whose KL is to a whole distribution
        return WeightedObjective(problem, WEIGHTINGS["dft"], options.asft_kl)
    return WeightedObjective(problem, WEIGHTINGS[options.weighting])


# ---- weights by a function of the caller

_weights: ContextVar[Weights] = ContextVar("weights")  # of the call that runs


def weights_by(function: Callable[..., Tensor]) -> AbstractContextManager[None]:
    """Within it, a call of the op without weights takes those of `function`, checked."""
    called = as_called(function)

    def weights(tokens: Tokens, options: WeightingOptions) -> Tensor:
        with torch.no_grad():
            # copies: the function may overwrite its arguments, and the pass needs both again
            found = called(tokens.logprobs.clone(), tokens.index.clone())
        if not isinstance(found, Tensor) or found.shape != tokens.logprobs.shape:
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"weights must return a tensor of the log-probs' shape {tuple(tokens.logprobs.shape)}, got {got}"
            )
        if found.is_complex():
            raise TypeError(f"weights must return real numbers, got {found.dtype}: take .real or .abs()")
        checks.check_values({"weights": found}, torch.ones_like(found, dtype=torch.bool))
        return found.double()

    return set_to(_weights, weights)


def as_called(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The caller's function as one of log-probs and index, by its signature.

    It gets the index if it has a parameter of that name, or if log-probs alone are too few arguments.

    Raises:
        TypeError: for a function that can be called with neither.
    """
    try:
        # a module's __call__ takes any arguments: its forward has the signature, of a compiled one that of the module
        own = getattr(function, "_orig_mod", function)
        signature = inspect.signature(own.forward if isinstance(own, torch.nn.Module) else own)
    except (TypeError, ValueError):  # a builtin such as torch.exp, which shows none
        return lambda logprobs, index: function(logprobs)

    def takes(*arguments: None, **named: None) -> bool:
        try:
            signature.bind(*arguments, **named)
        except TypeError:
            return False
        return True

    bound = isinstance(own, functools.partial) and "index" in own.keywords  # to a value of the caller
    if takes(None, index=None) and "index" in signature.parameters and not bound:
        return lambda logprobs, index: function(logprobs, index=index)
    if takes(None):
        return lambda logprobs, index: function(logprobs)
    if takes(None, None):
        return function
    name = getattr(function, "__name__", type(function).__name__)
    raise TypeError(f"weights must be a function f(logprobs) or f(logprobs, index), got {name}{signature}")
