"""Divergences of a student p from a teacher q, and their gradients in the student's logits: each formula once.

| kind | D | dD/dz_v, for p = softmax(z) |
| --- | --- | --- |
| "forward" | KL(q, p) = sum q log(q / p) | p_v - q_v |
| "reverse" | KL(p, q) = sum p log(p / q) | p_v (log(p_v / q_v) - KL(p, q)) |
| "js" | b KL(q, m) + (1 - b) KL(p, m), m = b q + (1 - b) p | (1 - b) p_v (log(p_v / m_v) - KL(p, m)) |

The last is the generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, equation 1), b being `js_beta`. All
functions take log-probs over the last dimension: of the whole vocabulary, or of K tokens and a bucket for the rest.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

DIVERGENCES = ("forward", "reverse", "js")
# a log-prob never lies below: exp is 0 there in every dtype, and times this it still is, as it would not be times -inf
MIN_LOG = -1e4


class DivergenceOptions(NamedTuple):
    """Which divergence; `linear_distill_loss` says what each is."""

    kind: str = "forward"
    js_beta: float = 0.5
    temperature: float = 1.0  # of both distributions, on top of each head's own


def kl(log_a: Tensor, log_b: Tensor, normalised: bool) -> Tensor:
    """KL(a, b) over the last dimension, of log-probs of at least `MIN_LOG`.

    Of distributions that sum to 1 (to rounding: `normalised`), it is the sum of a log(a / b) - a + b, whose terms are
    all positive and of second order in log(a / b): nothing cancels, and errors of log-probs count only in that order.
    """
    x = log_a - log_b
    a = log_a.exp()
    if not normalised:
        return (a * x).sum(-1)
    near = a * (x + torch.expm1(-x))
    return torch.where(x < -1, a * x - a + log_b.exp(), near).sum(-1)


def mixture(log_p: Tensor, log_q: Tensor, js_beta: float) -> Tensor:
    """log m of the Jensen-Shannon divergence."""
    return torch.logaddexp(log_p + math.log1p(-js_beta), log_q + math.log(js_beta))


def divergence(
    log_p: Tensor, log_q: Tensor, options: DivergenceOptions, normalised: bool = True
) -> tuple[Tensor, Tensor]:
    """(D, KL of p): two (R,) from two (R, outcomes); the second is what `slope` takes of them."""
    kind, js_beta, _ = options
    if kind == "forward":
        found = kl(log_q, log_p, normalised)
        return found, found
    if kind == "reverse":
        found = kl(log_p, log_q, normalised)
        return found, found
    log_m = mixture(log_p, log_q, js_beta)
    of_p = kl(log_p, log_m, normalised)
    return js_beta * kl(log_q, log_m, normalised) + (1 - js_beta) * of_p, of_p


def slope(
    log_p: Tensor, log_q: Tensor, kl_of_p: Tensor, options: DivergenceOptions, total: Tensor | float = 1.0
) -> Tensor:
    """(R, outcomes) dD/dz; `total` (R, 1) is the sum of q where rounding has left it off 1."""
    kind, js_beta, _ = options
    if kind == "forward":
        # p - q, whose digits are in the log-probs where p and q are nearly alike
        x = log_p - log_q
        difference = torch.expm1(x.abs().neg_()).neg_().mul_(torch.maximum(log_p, log_q).exp_()).copysign_(x)
        return difference if isinstance(total, float) else difference + log_p.exp() * (total - 1)
    p = log_p.exp()
    if kind == "reverse":
        return p * (log_p - log_q - kl_of_p[..., None])
    return (1 - js_beta) * p * (log_p - mixture(log_p, log_q, js_beta) - kl_of_p[..., None])
