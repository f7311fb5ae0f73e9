"""A teacher known by its K most likely tokens: K + 1 outcomes a row, the last being any other token.

Everything here is (R, K + 1) float64 and shared by the backends, which make the sums over the vocabulary: their logits
have -inf at the K ids, so that what they sum is the last outcome alone. Those of the ids come apart.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pear_kernels.engine.head import TeacherRows
from pear_kernels.formulas.divergence import MIN_LOG, compared_with, divergence, slope
from pear_kernels.options import DivergenceOptions


class Buckets(NamedTuple):
    """The student's and the teacher's outcomes at R tokens. Logits are relative to `top`, the rest's largest."""

    options: DivergenceOptions
    hit: Tensor  # (R, K) bool, where the target is one of the ids
    ids_logits: Tensor  # (R, K), less top
    of_target: Tensor  # (R,), the target's logit less top
    log_z: Tensor  # (R,), of all exp(logit - top)
    log_rest: Tensor  # (R,), of those of the last outcome, with logits divided by the temperature
    log_p: Tensor  # (R, K + 1), at the temperature
    log_q: Tensor  # (R, K + 1)
    log_m: Tensor  # (R, K + 1), of `compared_with`
    logprobs: Tensor  # (R,) log p of the target
    divergence: Tensor  # (R,)
    kl_of_p: Tensor  # (R,)

    def gradient(self, nll: Tensor | None, of_divergence: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dL/dz for coefficients (R,) each, as numbers (a, b, t, k) of which the last is (R, K):

        a exp(u) + b exp(u / temperature) in a logit u (less top) of the last outcome, but t if it is the target's; k in
        those of the ids.
        """
        zero = torch.zeros_like(self.logprobs)
        c, g = zero if nll is None else nll, zero if of_divergence is None else of_divergence
        temperature = self.options.distill_temperature
        missed = -torch.expm1(self.logprobs)  # 1 - p
        total = self.log_q.exp().sum(1, keepdim=True)
        of_outcome = slope(self.log_p, self.log_m, self.kl_of_p, self.options, total) * (g / temperature)[:, None]
        of_rest = of_outcome[:, -1]
        a, b = c * (-self.log_z).exp(), of_rest * (-self.log_rest).exp()
        at_target = of_rest * (self.of_target / temperature - self.log_rest).exp() - c * missed
        p_ids = torch.where(self.hit, -missed[:, None], (self.ids_logits - self.log_z[:, None]).exp())
        return a, b, at_target, of_outcome[:, :-1] + c[:, None] * p_ids


def make_buckets(
    teacher: TeacherRows,
    target: Tensor,  # (R,)
    ids_logits: Tensor,  # (R, K)
    target_logit: Tensor,  # (R,) float64
    top: Tensor,  # (R,) the largest of the other logits
    others: Tensor,  # (R,) float64: sum of their exp(logit - top), without the target's
    others_soft: Tensor,  # (R,) float64: the same of (logit - top) / temperature
) -> Buckets:
    """From what a backend has summed over the vocabulary."""
    temperature = teacher.options.distill_temperature
    hit = teacher.ids == target[:, None]
    of_target = target_logit - top.double()
    # the target's own logit is exact, wherever it counts
    ids_logits = torch.where(hit, of_target[:, None], ids_logits.double() - top.double()[:, None])
    in_rest = ~hit.any(1)

    def log_rest(others: Tensor, temperature: float) -> Tensor:
        return (others + torch.where(in_rest, (of_target / temperature).clamp(max=1.0).exp(), 0.0)).log()

    def outcomes(others: Tensor, temperature: float) -> Tensor:
        return torch.cat([ids_logits / temperature, log_rest(others, temperature)[:, None]], dim=1)

    log_z = outcomes(others, 1.0).logsumexp(1)
    log_p = outcomes(others_soft, temperature).log_softmax(1).clamp(min=MIN_LOG)
    log_q = torch.cat([teacher.top, teacher.rest.log()[:, None]], dim=1).clamp(min=MIN_LOG)
    log_m = compared_with(log_p, log_q, teacher.options)
    found, kl_of_p = divergence(log_p, log_q, log_m, teacher.options, normalised=False)
    return Buckets(
        teacher.options, hit, ids_logits, of_target, log_z, log_rest(others_soft, temperature), log_p, log_q, log_m,
        of_target - log_z, found, kl_of_p,
    )  # fmt: skip


def is_first_of_both(ids: Tensor, ids_logits: Tensor, top: Tensor, place: Tensor, target: Tensor) -> Tensor:
    """(R,) bool: whether the target is the first largest of all logits: those of the ids (R, K), and the rest's.

    `top` and `place` (R,) are the rest's largest logit and whose it is.
    """
    largest = torch.maximum(ids_logits.amax(1), top.to(ids_logits.dtype))
    no_token = torch.iinfo(torch.int64).max
    first = torch.where(ids_logits == largest[:, None], ids, no_token).amin(1)
    first = torch.minimum(first, torch.where(top == largest, place.long(), no_token))
    return first == target
