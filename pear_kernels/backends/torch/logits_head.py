"""The operations of a `LogitsWalk` in plain PyTorch: an LM head whose logits stay until the gradient takes their place.

Rows are anchored on their largest logit, which is left out of the sum with the target (Z = 1 + e_y + the rest), so that
log p has its last digits whichever of the two has nearly all the mass. What is one number a row is float64.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from pear_kernels.backends.torch import head
from pear_kernels.engine.head import Scores, TeacherRows
from pear_kernels.formulas.buckets import Buckets, is_first_of_both, make_buckets
from pear_kernels.formulas.divergence import MIN_LOG, compared_with, divergence, slope


class _Rows(NamedTuple):
    """Of a chunk whose activated logits are in the workspace (log-probs in their place, if `has_log_p`)."""

    target: Tensor  # (R,)
    top: Tensor  # (R,), the largest logit
    largest: Tensor  # (R,), whose it is
    log_z: Tensor  # (R,) float64, of the sum of exp(z - top)
    logprobs: Tensor  # (R,) float64
    entropy: Tensor | None  # (R,) float64
    soft: tuple[Tensor, Tensor] | None  # log_z and log p of the target at the divergence's temperature, (R,) float64
    teacher: TeacherRows | None
    kl_of_p: Tensor | None  # (R,) float64
    buckets: Buckets | None

    @property
    def has_log_p(self) -> bool:
        """Whether the workspace holds log-probs already, and the teacher's those of `compared_with`."""
        return self.kl_of_p is not None and self.teacher.options.distill_temperature == 1.0


class LogitsHead(head.Head):
    """`head.Head` for gradients that are no row scale times E."""

    def scores(
        self,
        x: Tensor,
        target: Tensor,
        *,
        entropy: bool = False,
        teacher: TeacherRows | None = None,
        logit: Tensor | None = None,
    ) -> Scores:
        logits = self._product(x)
        target_logit = self.target_logits(x, target) if logit is None else logit
        known = teacher is not None and teacher.ids is not None
        temperature = 1.0 if teacher is None else teacher.options.distill_temperature
        R = len(x)
        top, place = torch.empty(R, dtype=self.dtype, device=x.device), torch.empty_like(target)
        log_z, logprobs, log_z_soft, logprobs_soft, others, others_soft, H, found, kl_of_p = torch.empty(
            9, R, dtype=torch.float64, device=x.device
        )
        ids_logits = torch.empty(R, teacher.ids.shape[1], dtype=torch.float64, device=x.device) if known else None
        for rows in self._row_blocks(R):
            z, y = logits[rows], target[rows, None]
            self._activate_(z)
            if known:
                ids_logits[rows] = z.gather(1, teacher.ids[rows]).double()
                z.scatter_(1, teacher.ids[rows], -torch.inf)
            top[rows], place[rows] = z.max(1)
            row = z, target[rows], top[rows], place[rows]
            of_target = target_logit[rows] - top[rows].double()
            others[rows], exp_log = self._others(*row, entropy=entropy)
            others_soft[rows] = others[rows]
            if temperature != 1.0:
                others_soft[rows], _ = self._others(*row, temperature=temperature)
            if known:
                continue
            log_z[rows], logprobs[rows] = normaliser(others[rows], of_target)
            log_z_soft[rows], logprobs_soft[rows] = normaliser(others_soft[rows], of_target / temperature)
            if entropy:
                # H = log Z - sum_v (E_v / Z) log E_v, where E is 1 for the largest
                e_y = of_target.exp()
                H[rows] = log_z[rows] - (exp_log + e_y * of_target) / (others[rows] + e_y)
            if teacher is not None:
                # at temperature 1 log-probs take the logits' place, and those of m the teacher's, for `gradient`
                log_p = z if temperature == 1.0 else z.clone()
                self._log_p_(log_p, y, top[rows], log_z_soft[rows], logprobs_soft[rows], temperature)
                log_q = teacher.log_q[rows]
                log_m = compared_with(log_p, log_q, teacher.options)
                found[rows], kl_of_p[rows] = divergence(log_p, log_q, log_m, teacher.options)
                if log_m is not log_q:
                    log_q.copy_(log_m)
        if known:
            buckets = make_buckets(teacher, target, ids_logits, target_logit, top, others, others_soft)
            state = _Rows(target, top, place, buckets.log_z, buckets.logprobs, None, None, teacher, None, buckets)
            top1 = is_first_of_both(teacher.ids, ids_logits, top, place, target)
            return Scores(buckets.logprobs, None, buckets.divergence, state, top1)
        if not entropy:
            H = None
        if teacher is None:
            kl_of_p = None
        state = _Rows(target, top, place, log_z, logprobs, H, (log_z_soft, logprobs_soft), teacher, kl_of_p, None)
        top1 = place == target
        if logit is not None:  # of a shard: a target elsewhere has no logit among these
            top1 = torch.where(target < 0, target_logit > top, top1)
        return Scores(logprobs, H, None if teacher is None else found, state, top1)

    def _others(
        self,
        z: Tensor,
        target: Tensor,
        top: Tensor,
        largest: Tensor,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(r,) float64 sums over v != y of E = exp((z - top) / temperature) and, for the entropy, of E log E."""
        u = z - top[:, None]
        if temperature != 1.0:
            u.div_(temperature)
        log = u.clamp(min=MIN_LOG) if entropy else None
        both = torch.stack([largest, target.where(target >= 0, largest)], dim=1)  # -1 is another shard's
        exp = u.exp_().scatter_(1, both, 0.0)
        others = exp.sum(1).double() + (largest != target)  # the largest's E is 1, and its logarithm 0
        return others, log.mul_(exp).sum(1).double() if entropy else None

    def joined(self, scores: Scores, logit: Tensor, logprobs: Tensor, entropy: Tensor, top1: Tensor) -> Scores:
        rows: _Rows = scores.rows
        log_z = logit - rows.top.double() - logprobs
        joint = rows._replace(log_z=log_z, logprobs=logprobs, entropy=entropy)
        return Scores(logprobs, entropy, None, joint, top1)

    def gradient(
        self, scores: Scores, nll: Tensor | None, entropy: Tensor | None = None, divergence: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        state: _Rows = scores.rows
        R = len(state.target)
        logits = self.workspace[:R]
        narrow = [None if factor is None else factor.to(self.dtype) for factor in (nll, entropy, divergence)]
        if state.buckets is not None:
            *of_rest, of_ids = (number.to(self.dtype) for number in state.buckets.gradient(nll, divergence))
        for rows in self._row_blocks(R):
            z = logits[rows]
            shift = (state.top + state.log_z)[rows, None].to(z) if state.has_log_p else 0.0
            chain = self._chain(z, shift)
            if state.buckets is not None:
                dz = self._bucket_gradient(z, state, rows, *(number[rows] for number in of_rest))
            else:
                dz = self._full_gradient(z, state, rows, *(None if c is None else c[rows, None] for c in narrow))
            z.copy_(dz if chain is None else dz.mul_(chain))
            if state.buckets is not None:
                of_z, ids_logits = of_ids[rows], state.buckets.ids_logits[rows] + state.top[rows, None]
                chain = self._chain(ids_logits)
                z.scatter_(1, state.teacher.ids[rows], of_z if chain is None else of_z * chain.to(of_z))
        return logits, torch.full((R,), 1 / self.temperature, dtype=torch.float64, device=logits.device)

    def _full_gradient(self, z: Tensor, state: _Rows, rows: slice, c, h, g) -> Tensor:
        """(r, V) dL/dz of what `scores` has left (r, V); c, h and g are (r, 1), or None."""
        y, teacher = state.target[rows, None], state.teacher
        parts = []
        if c is not None or h is not None:
            log_p = z
            if not state.has_log_p:
                log_p = self._log_p_(z.clone(), y, state.top[rows], state.log_z[rows], state.logprobs[rows])
            p = log_p.exp()
            if h is not None:
                parts.append((log_p + state.entropy[rows, None].to(z)).mul_(p).mul_(-h))
            if c is not None:
                parts.append(head.put_(p, y, torch.expm1(state.logprobs[rows, None]).to(z)).mul_(c))
        if g is not None:
            log_p, temperature = z, teacher.options.distill_temperature
            if not state.has_log_p:
                log_z, log_p_y = (number[rows] for number in state.soft)
                log_p = self._log_p_(z.clone(), y, state.top[rows], log_z, log_p_y, temperature)
            of_z = slope(log_p, teacher.log_q[rows], state.kl_of_p[rows].to(z), teacher.options)
            if teacher.options.divergence != "forward":
                # all of a row's sum to 0; the largest outcome's is a difference of numbers that p near 1 makes alike
                largest = state.largest[rows, None]
                of_z.scatter_(1, largest, -of_z.scatter_(1, largest, 0.0).sum(1, keepdim=True))
            parts.append(of_z.mul_(g / temperature))
        return functools.reduce(torch.add, parts) if parts else torch.zeros_like(z)

    def _bucket_gradient(self, z: Tensor, state: _Rows, rows: slice, a, b, at_target) -> Tensor:
        """(r, V) dL/dz but for the ids, where z is -inf."""
        u = z - state.top[rows, None]
        if state.teacher.options.distill_temperature == 1.0:
            dz = u.exp_().mul_((a + b)[:, None])
        else:
            dz = (u / state.teacher.options.distill_temperature).exp_().mul_(b[:, None])
            dz += u.exp_().mul_(a[:, None])
        return dz.scatter_(1, state.target[rows, None], at_target[:, None])

    def log_softmax(self, x: Tensor, temperature: float) -> Tensor:
        logits = self._product(x)
        for rows in self._row_blocks(len(x)):
            z = logits[rows]
            self._activate_(z)
            top, largest = z.max(1, keepdim=True)
            z.sub_(top)
            if temperature != 1.0:
                z.div_(temperature)
            rest = z.exp().scatter_(1, largest, 0.0).sum(1, keepdim=True)
            z.sub_(torch.log1p(rest)).clamp_(min=MIN_LOG)
        return logits

    def _log_p_(self, z: Tensor, y: Tensor, top, log_z, log_p_y, temperature: float = 1.0) -> Tensor:
        """Activated logits (r, V) to log-probs, in place: exact at the target, no less than `MIN_LOG`."""
        z.sub_(top[:, None])
        if temperature != 1.0:
            z.div_(temperature)
        return head.put_(z.sub_(log_z[:, None].to(z)).clamp_(min=MIN_LOG), y, log_p_y[:, None].to(z))

    def _chain(self, z: Tensor, shift: Tensor | float = 0.0) -> Tensor | None:
        """d logit / d raw logit but for the 1 / temperature, of activated logits less `shift`; None for ones."""
        if self.softcap is None:
            return None
        return (z + shift).mul_(self.temperature / self.softcap).square_().neg_().add_(1.0)


def normaliser(others: Tensor, of_target: Tensor) -> tuple[Tensor, Tensor]:
    """(log Z, log p of the target), Z = e_y + others, the target's logit and all others being relative to one anchor.

    log p = -log(1 + others / e_y), to the last digits for both summands near 0.
    """
    log_p = -torch.logaddexp(torch.zeros_like(others), others.log() - of_target)
    return of_target - log_p, log_p
