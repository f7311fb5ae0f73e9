"""The operations of a `LogitsWalk` in plain PyTorch: an LM head whose logits stay until the gradient takes their place.

Rows are anchored on their largest logit. It is left out of the sum together with the target (Z = 1 + e_y + the rest),
so that log p has its last digits whichever of the two has nearly all the mass. Per-row scalars are float64.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from pear_kernels.backends.torch import head
from pear_kernels.engine.head import Scores, TeacherRows, TopKRows, VocabularyRows
from pear_kernels.formulas import softmax
from pear_kernels.formulas.divergence import compared_with, divergence, slope
from pear_kernels.formulas.softmax import MIN_LOG
from pear_kernels.formulas.topk import Buckets, is_first_of_both


class _Teacher(NamedTuple):
    """How a chunk's rows compare with a teacher's. Log-probs and log Z are at the divergence's temperature."""

    rows: VocabularyRows  # at temperature 1 its workspace holds the log-probs of `compared_with`
    log_z: Tensor  # (R,) float64
    logprobs: Tensor  # (R,) float64, of the target
    kl_of_p: Tensor  # (R,) float64, from `divergence`

    @property
    def temperature(self) -> float:
        return self.rows.options.distill_temperature


class _Rows(NamedTuple):
    """`Scores.rows` of a chunk whose activated logits (log-probs, if `has_log_p`) are in the workspace."""

    target: Tensor  # (R,)
    largest: Tensor  # (R,), the column of the largest logit
    teacher: _Teacher | None = None
    buckets: Buckets | None = None  # the teacher is known by its K most likely tokens, whose logits are -inf here

    @property
    def has_log_p(self) -> bool:
        """Whether log-probs have taken the logits' place in the workspace."""
        return self.teacher is not None and self.teacher.temperature == 1.0


class LogitsHead(head.Head):
    """`head.Head` for gradients that are not a per-row scalar times E."""

    # ---- log-probs, entropies and divergences

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
        if isinstance(teacher, TopKRows):
            return self._bucket_scores(logits, target, target_logit, teacher)
        temperature = 1.0 if teacher is None else teacher.options.distill_temperature
        top, largest = self._largest(target)
        log_z, logprobs, log_z_soft, logprobs_soft, H, found, kl_of_p = torch.empty(
            7, len(x), dtype=torch.float64, device=x.device
        )
        for rows in self._row_blocks(len(x)):
            z, y = logits[rows], target[rows, None]
            self.activation.apply_(z)
            top[rows], largest[rows] = z.max(1)
            row = z, target[rows], top[rows], largest[rows]
            below = target_logit[rows] - top[rows].double()
            others, exp_log = self._others(*row, entropy=entropy)
            log_z[rows], logprobs[rows] = normaliser(others, below)
            if exp_log is not None:
                e_y = below.exp()
                H[rows] = softmax.entropy(log_z[rows], exp_log + e_y * below, others + e_y)
            if teacher is not None:
                others_soft = others
                if temperature != 1.0:
                    others_soft, _ = self._others(*row, temperature=temperature)
                log_z_soft[rows], logprobs_soft[rows] = normaliser(others_soft, below / temperature)
                # at temperature 1 log-probs take the logits' place, and those of m the teacher's, for `gradient`
                log_p = z if temperature == 1.0 else z.clone()
                self._log_p_(log_p, y, top[rows], log_z_soft[rows], logprobs_soft[rows], temperature)
                log_q = teacher.log_q[rows]
                log_m = compared_with(log_p, log_q, teacher.options)
                found[rows], kl_of_p[rows] = divergence(log_p, log_q, log_m, teacher.options)
                if log_m is not log_q:
                    log_q.copy_(log_m)
        top1 = largest == target
        if logit is not None:  # a target that another rank holds has no logit among these
            top1 = torch.where(target < 0, target_logit > top, top1)
        state = _Rows(target, largest, teacher and _Teacher(teacher, log_z_soft, logprobs_soft, kl_of_p))
        return Scores(logprobs, H if entropy else None, found if teacher else None, state, top1, top, log_z)

    def _bucket_scores(self, logits: Tensor, target: Tensor, target_logit: Tensor, teacher: TopKRows) -> Scores:
        """`scores` with a teacher that is known by its K most likely tokens."""
        temperature = teacher.options.distill_temperature
        top, largest = self._largest(target)
        others, others_soft = torch.empty(2, len(target), dtype=torch.float64, device=target.device)
        ids_logits = torch.empty(teacher.ids.shape, dtype=torch.float64, device=target.device)
        for rows in self._row_blocks(len(target)):
            z, ids = logits[rows], teacher.ids[rows]
            self.activation.apply_(z)
            ids_logits[rows] = z.gather(1, ids).double()
            z.scatter_(1, ids, -torch.inf)
            top[rows], largest[rows] = z.max(1)
            row = z, target[rows], top[rows], largest[rows]
            others[rows], _ = self._others(*row)
            others_soft[rows] = others[rows] if temperature == 1.0 else self._others(*row, temperature=temperature)[0]
        buckets = Buckets(teacher, target, ids_logits, target_logit, top, others, others_soft)
        top1 = is_first_of_both(teacher.ids, ids_logits, top, largest, target)
        state = _Rows(target, largest, buckets=buckets)
        return Scores(buckets.logprobs, None, buckets.divergence, state, top1, top, buckets.log_z)

    def _largest(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Empty (R,) for the largest logits and for their columns."""
        return torch.empty(len(target), dtype=self.dtype, device=target.device), torch.empty_like(target)

    def _others(
        self, z: Tensor, target: Tensor, top: Tensor, largest: Tensor, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(r,) float64 sums over v != y of E = exp((z - top) / temperature) and, for the entropy, of E log E."""
        u = z - top[:, None]
        if temperature != 1.0:
            u.div_(temperature)
        log = u.clamp(min=MIN_LOG) if entropy else None
        both = torch.stack([largest, target.where(target >= 0, largest)], dim=1)  # another rank holds target -1
        exp = u.exp_().scatter_(1, both, 0.0)
        others = exp.sum(1).double() + (largest != target)  # the largest's E is 1, and its logarithm 0
        return others, None if log is None else log.mul_(exp).sum(1).double()

    # ---- gradients

    def gradient(
        self, scores: Scores, nll: Tensor | None, entropy: Tensor | None = None, divergence: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        state: _Rows = scores.rows
        R = len(state.target)
        logits = self.workspace[:R]
        if state.buckets is not None:
            self._bucket_gradient_(logits, scores, state.buckets, nll, divergence)
        else:
            narrow = [None if factor is None else factor.to(self.dtype) for factor in (nll, entropy, divergence)]
            for rows in self._row_blocks(R):
                z = logits[rows]
                shift = (scores.top + scores.log_z)[rows, None].to(z) if state.has_log_p else 0.0
                chain = self.activation.slope(z, shift)
                dz = self._full_gradient(z, scores, rows, *(None if c is None else c[rows, None] for c in narrow))
                z.copy_(dz if chain is None else dz.mul_(chain))
        row_scale = 1 / self.activation.temperature
        return logits, torch.full((R,), row_scale, dtype=torch.float64, device=logits.device)

    def _full_gradient(
        self, z: Tensor, scores: Scores, rows: slice, c: Tensor | None, h: Tensor | None, g: Tensor | None
    ) -> Tensor:
        """(r, V) dL/dz of what `scores` left in the workspace (r, V), from coefficients (r, 1); None for 0."""
        state: _Rows = scores.rows
        y, teacher = state.target[rows, None], state.teacher
        parts = []
        if c is not None or h is not None:
            log_p = z
            if not state.has_log_p:
                log_p = self._log_p_(z.clone(), y, scores.top[rows], scores.log_z[rows], scores.logprobs[rows])
            p = log_p.exp()
            if h is not None:
                assert scores.entropy is not None
                parts.append((log_p + scores.entropy[rows, None].to(z)).mul_(p).mul_(-h))
            if c is not None:
                parts.append(head.put_(p, y, torch.expm1(scores.logprobs[rows, None]).to(z)).mul_(c))
        if g is not None:
            assert teacher is not None
            log_p, options = z, teacher.rows.options
            if not state.has_log_p:
                soft = teacher.log_z[rows], teacher.logprobs[rows], teacher.temperature
                log_p = self._log_p_(z.clone(), y, scores.top[rows], *soft)
            grad_z = slope(log_p, teacher.rows.log_q[rows], teacher.kl_of_p[rows].to(z), options)
            if options.divergence != "forward":
                # A row sums to 0, so the largest outcome's entry is minus the sum of the others: of itself it would be
                # a difference of two numbers that are nearly equal when its p is near 1.
                largest = state.largest[rows, None]
                grad_z.scatter_(1, largest, -grad_z.scatter_(1, largest, 0.0).sum(1, keepdim=True))
            parts.append(grad_z.mul_(g / teacher.temperature))
        return functools.reduce(torch.add, parts) if parts else torch.zeros_like(z)

    def _bucket_gradient_(
        self, logits: Tensor, scores: Scores, buckets: Buckets, nll: Tensor | None, divergence: Tensor | None
    ) -> None:
        """dL/d(raw logits) / temperature in place of the logits (R, V), which are -inf at the K ids."""
        state: _Rows = scores.rows
        temperature, ids = buckets.teacher.options.distill_temperature, buckets.teacher.ids
        a, b, at_target, grad_ids = (number.to(self.dtype) for number in buckets.gradient(nll, divergence))
        for rows in self._row_blocks(len(logits)):
            z, top = logits[rows], scores.top[rows, None]
            chain = self.activation.slope(z)
            u = z - top
            if temperature == 1.0:
                dz = u.exp_().mul_((a + b)[rows, None])
            else:
                dz = (u / temperature).exp_().mul_(b[rows, None])
                dz += u.exp_().mul_(a[rows, None])
            dz.scatter_(1, state.target[rows, None], at_target[rows, None])
            z.copy_(dz if chain is None else dz.mul_(chain))
            grad_z, chain = grad_ids[rows], self.activation.slope(buckets.ids_logits[rows] + top)
            z.scatter_(1, ids[rows], grad_z if chain is None else grad_z * chain.to(grad_z))

    # ---- log-probs of the whole vocabulary

    def log_softmax(self, x: Tensor, temperature: float) -> Tensor:
        logits = self._product(x)
        for rows in self._row_blocks(len(x)):
            z = logits[rows]
            self.activation.apply_(z)
            top, largest = z.max(1, keepdim=True)
            z.sub_(top)
            if temperature != 1.0:
                z.div_(temperature)
            rest = z.exp().scatter_(1, largest, 0.0).sum(1, keepdim=True)
            z.sub_(torch.log1p(rest)).clamp_(min=MIN_LOG)
        return logits

    def _log_p_(
        self, z: Tensor, y: Tensor, top: Tensor, log_z: Tensor, log_p_y: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Activated logits (r, V) to log-probs, in place: exact at the target, and at least `MIN_LOG`."""
        z.sub_(top[:, None])
        if temperature != 1.0:
            z.div_(temperature)
        return head.put_(z.sub_(log_z[:, None].to(z)).clamp_(min=MIN_LOG), y, log_p_y[:, None].to(z))


def normaliser(others: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """(log Z, log p of the target), with Z = exp(below) + others."""
    log_p = -softmax.nll(others, below)
    return below - log_p, log_p
