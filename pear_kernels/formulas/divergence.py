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

import torch
from torch import Tensor

from pear_kernels.options import DivergenceOptions

# a log-prob never lies below: exp is 0 there in every dtype, and times this it still is, as it would not be times -inf
MIN_LOG = -1e4


def kl(log_a: Tensor, log_b: Tensor, normalised: bool) -> Tensor:
    """KL(a, b) over the last dimension, of log-probs of at least `MIN_LOG`.

    Of distributions that sum to 1 (to rounding: `normalised`), it is the sum of a log(a / b) - a + b, whose terms are
    all positive and of second order in log(a / b): nothing cancels, and errors of log-probs count only in that order.
    """
    x, a = log_a - log_b, log_a.exp()
    if not normalised:
        return a.mul_(x).sum(-1)
    near, is_far = torch.expm1(-x).add_(x).mul_(a), x < -1
    return torch.where(is_far, x.sub_(1).mul_(a).add_(log_b.exp()), near).sum(-1)


def compared_with(log_p: Tensor, log_q: Tensor, options: DivergenceOptions) -> Tensor:
    """(R, outcomes) what p is compared with: log m for "js", else log q itself."""
    if options.divergence != "js":
        return log_q
    return torch.logaddexp(log_p + math.log1p(-options.js_beta), log_q + math.log(options.js_beta))


def divergence(
    log_p: Tensor, log_q: Tensor, log_m: Tensor, options: DivergenceOptions, normalised: bool = True
) -> tuple[Tensor, Tensor]:
    """(D, KL of p), two (R,), from three (R, outcomes) with `log_m` from `compared_with`; `slope` takes the second."""
    kind, js_beta = options.divergence, options.js_beta
    if kind != "js":
        found = kl(log_q, log_p, normalised) if kind == "forward" else kl(log_p, log_q, normalised)
        return found, found
    of_p = kl(log_p, log_m, normalised)
    return js_beta * kl(log_q, log_m, normalised) + (1 - js_beta) * of_p, of_p


def slope(
    log_p: Tensor, log_m: Tensor, kl_of_p: Tensor, options: DivergenceOptions, total: Tensor | float = 1.0
) -> Tensor:
    """(R, outcomes) dD/dz, with `log_m` from `compared_with`; `total` (R, 1): the sum of q, if it is off 1."""
    kind, js_beta = options.divergence, options.js_beta
    if kind == "forward":
        # p - q, whose digits are in the log-probs where p and q are nearly alike
        x = log_p - log_m
        difference = torch.expm1(x.abs().neg_()).neg_().mul_(torch.maximum(log_p, log_m).exp_()).copysign_(x)
        return difference if isinstance(total, float) else difference + log_p.exp() * (total - 1)
    share = 1.0 if kind == "reverse" else 1 - js_beta
    return (log_p - log_m).sub_(kl_of_p[..., None]).mul_(log_p.exp()).mul_(share)
