"""A teacher known by its K most likely tokens: K + 1 outcomes per row, the last being any other token.

Everything here is (R, K + 1) float64 and shared by the backends. They sum over the vocabulary with the logits of the K
ids at -inf, so that the sums are those of the last outcome alone; the ids' logits come separately.
"""

import torch
from torch import Tensor

from pear_kernels.engine.head import TopKRows
from pear_kernels.formulas.divergence import compared_with, divergence, slope
from pear_kernels.formulas.softmax import MIN_LOG


class Buckets:
    """Outcomes of student and teacher at R tokens, from a backend's sums over the vocabulary.

    All logits are relative to `top`, the largest of the last outcome.
    """

    def __init__(
        self,
        teacher: TopKRows,
        target: Tensor,  # (R,)
        ids_logits: Tensor,  # (R, K)
        target_logit: Tensor,  # (R,) float64
        top: Tensor,  # (R,) the largest of the other logits
        others: Tensor,  # (R,) float64: sum of their exp(logit - top), without the target's
        others_soft: Tensor,  # (R,) float64: the same of (logit - top) / temperature
    ):
        self.teacher, options = teacher, teacher.options
        temperature = options.distill_temperature
        self.hit = hit = torch.eq(teacher.ids, target[:, None])  # (R, K) bool, where the target is one of the ids
        self.below = below = target_logit - top.double()  # (R,), the target's logit less top
        # (R, K), less top; the target's own logit is exact, wherever it counts
        self.ids_logits = torch.where(hit, below[:, None], ids_logits.double() - top.double()[:, None])
        in_rest = ~hit.any(1)

        def log_rest(others: Tensor, temperature: float) -> Tensor:
            return (others + torch.where(in_rest, (below / temperature).clamp(max=1.0).exp(), 0.0)).log()

        def outcomes(log_rest: Tensor, temperature: float) -> Tensor:
            return torch.cat([self.ids_logits / temperature, log_rest[:, None]], dim=1)

        self.log_z = outcomes(log_rest(others, 1.0), 1.0).logsumexp(1)  # (R,), of all exp(logit - top)
        # (R,), of those of the last outcome, with logits divided by the temperature
        self.log_rest = log_rest(others_soft, temperature)
        self.log_p = outcomes(self.log_rest, temperature).log_softmax(1).clamp(min=MIN_LOG)  # (R, K + 1)
        self.log_q = torch.cat([teacher.top, teacher.rest.log()[:, None]], dim=1).clamp(min=MIN_LOG)  # (R, K + 1)
        self.log_m = compared_with(self.log_p, self.log_q, options)  # (R, K + 1)
        self.logprobs = below - self.log_z  # (R,) log p of the target
        found = divergence(self.log_p, self.log_q, self.log_m, options, normalised=False)
        self.divergence, self.kl_of_p = found  # (R,) each

    def gradient(self, nll: Tensor | None, divergence: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dL/dz for coefficients (R,) of the NLL and of the divergence, as (a, b, t, k); k is (R, K), the others (R,).

        For a logit u (less top) of the last outcome it is a exp(u) + b exp(u / temperature), but t for the target's;
        for the ids' logits it is k.
        """
        zero = torch.zeros_like(self.logprobs)
        c, g = zero if nll is None else nll, zero if divergence is None else divergence
        options = self.teacher.options
        temperature = options.distill_temperature
        missed = -torch.expm1(self.logprobs)  # 1 - p
        total = self.log_q.exp().sum(1, keepdim=True)
        grad_outcomes = slope(self.log_p, self.log_m, self.kl_of_p, options, total) * (g / temperature)[:, None]
        grad_rest = grad_outcomes[:, -1]
        a, b = c * (-self.log_z).exp(), grad_rest * (-self.log_rest).exp()
        at_target = grad_rest * (self.below / temperature - self.log_rest).exp() - c * missed
        p_ids = torch.where(self.hit, -missed[:, None], (self.ids_logits - self.log_z[:, None]).exp())
        return a, b, at_target, grad_outcomes[:, :-1] + c[:, None] * p_ids


def is_first_of_both(ids: Tensor, ids_logits: Tensor, top: Tensor, place: Tensor, target: Tensor) -> Tensor:
    """(R,) bool: whether the target is the first token with the largest of all logits.

    Those are the logits of the ids (R, K), and of all other tokens the largest `top` (R,), at token `place` (R,).
    """
    largest = torch.maximum(ids_logits.amax(1), top.to(ids_logits.dtype))
    no_token = torch.iinfo(torch.int64).max
    first = torch.where(ids_logits == largest[:, None], ids, no_token).amin(1)
    first = torch.minimum(first, torch.where(top == largest, place.long(), no_token))
    return first == target
