"""Divergences of a student p from a teacher q, and their gradients in the student's logits.

| kind | D | dD/dz_v, for p = softmax(z) |
| --- | --- | --- |
| "forward" | KL(q, p) = sum q log(q / p) | p_v - q_v |
| "reverse" | KL(p, q) = sum p log(p / q) | p_v (log(p_v / q_v) - KL(p, q)) |
| "js" | b KL(q, m) + (1 - b) KL(p, m), m = b q + (1 - b) p | (1 - b) p_v (log(p_v / m_v) - KL(p, m)) |

The last is the generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, equation 1), with b = `js_beta`. All
functions take log-probs of at least `softmax.MIN_LOG` over the last dimension: of the whole vocabulary, or of K tokens
and one outcome for the rest.
"""

import math

import torch
from torch import Tensor

from pear_kernels.options import DivergenceOptions


def kl(log_a: Tensor, log_b: Tensor, normalised: bool) -> Tensor:
    """KL(a, b) over the last dimension.

    If both distributions sum to 1 up to rounding (`normalised`), it is the sum of a log(a / b) - a + b. All of these
    terms are positive and of second order in log(a / b): nothing cancels, and errors of log-probs enter in that order
    only.
    """
    x, a = log_a - log_b, log_a.exp()
    if not normalised:
        return a.mul_(x).sum(-1)
    near, is_far = torch.expm1(-x).add_(x).mul_(a), x < -1
    return torch.where(is_far, x.sub_(1).mul_(a).add_(log_b.exp()), near).sum(-1)


def compared_with(log_p: Tensor, log_q: Tensor, options: DivergenceOptions) -> Tensor:
    """(R, outcomes) log-probs of what p is compared with: m for "js", otherwise q (the same tensor)."""
    if options.divergence != "js":
        return log_q
    return torch.logaddexp(log_p + math.log1p(-options.js_beta), log_q + math.log(options.js_beta))


def divergence(
    log_p: Tensor, log_q: Tensor, log_m: Tensor, options: DivergenceOptions, normalised: bool = True
) -> tuple[Tensor, Tensor]:
    """(D, KL of p) (R,) each, from three (R, outcomes), with `log_m` from `compared_with`. `slope` needs the second."""
    kind, js_beta = options.divergence, options.js_beta
    if kind != "js":
        found = kl(log_q, log_p, normalised) if kind == "forward" else kl(log_p, log_q, normalised)
        return found, found
    kl_of_p = kl(log_p, log_m, normalised)
    return js_beta * kl(log_q, log_m, normalised) + (1 - js_beta) * kl_of_p, kl_of_p


def slope(
    log_p: Tensor, log_m: Tensor, kl_of_p: Tensor, options: DivergenceOptions, total: Tensor | float = 1.0
) -> Tensor:
    """(R, outcomes) dD/dz, with `log_m` from `compared_with`. `total` (R, 1) is the sum of q where it is not 1."""
    kind, js_beta = options.divergence, options.js_beta
    if kind == "forward":
        # p - q from log-probs, which keep the digits where p and q are nearly equal
        x = log_p - log_m
        difference = torch.expm1(x.abs().neg_()).neg_().mul_(torch.maximum(log_p, log_m).exp_()).copysign_(x)
        return difference if isinstance(total, float) else difference + log_p.exp() * (total - 1)
    share = 1.0 if kind == "reverse" else 1 - js_beta
    return (log_p - log_m).sub_(kl_of_p[..., None]).mul_(log_p.exp()).mul_(share)
