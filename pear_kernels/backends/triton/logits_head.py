"""The operations of a `LogitsWalk` on an NVIDIA GPU: products by cuBLAS, and row kernels between them.

`pear_kernels.backends.torch.logits_head` explains the arithmetic; `divergence.py` has the kernels.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pear_kernels.backends.triton import head
from pear_kernels.backends.triton.divergence import gradient_rows, log_softmax_rows, score_rows
from pear_kernels.backends.triton.head import ROW_BLOCK
from pear_kernels.backends.triton.launch import launch
from pear_kernels.engine.head import Scores, TeacherRows, TopKRows, VocabularyRows, triton_row_bytes
from pear_kernels.formulas.activation import Activation
from pear_kernels.formulas.topk import Buckets, is_first_of_both
from pear_kernels.options import DIVERGENCES, DivergenceOptions

# A row's dz is stored divided by its unit, the sum of its coefficients' sizes times HEADROOM. For float16: entries are
# 16 times larger then, since numbers below 6e-5 lose digits, and the largest p (log(p / q) - KL), a quarter of MIN_LOG,
# still fits.
HEADROOM = 1 / 16
SMALLEST = math.ulp(0.0)  # float64's smallest number: a row without a gradient has 0 divided by it


class _Rows(NamedTuple):
    """State of a chunk whose raw logits are in the workspace."""

    target: Tensor  # (R,)
    sums: Tensor  # (10, R) float64, `out` of score_rows
    entropy: Tensor | None  # (R,) float64
    teacher: TeacherRows | None
    buckets: Buckets | None


class LogitsHead(head.Head):
    """`Head` for gradients that are not a per-row scale times E."""

    def _is_plain(self, gradient: bool) -> bool:
        return True

    def row_bytes(self, gradient: bool) -> int:
        """Bytes with a gradient, always: chunks with and without one have the same size."""
        itemsize = self.compute_dtype.itemsize
        return triton_row_bytes(self.planned[0], self.hidden_size, itemsize, gradient=True, plain=True)

    def scores(
        self,
        x: Tensor,
        target: Tensor,
        *,
        entropy: bool = False,
        teacher: TeacherRows | None = None,
        logit: Tensor | None = None,
    ) -> Scores:
        R = len(x)
        target_logit = self.target_logits(x, target) if logit is None else logit
        logits, _ = self._logits(x)
        if isinstance(teacher, TopKRows):
            ids_logits = self._activate(logits.gather(1, teacher.ids), teacher.ids)
            logits.scatter_(1, teacher.ids, -torch.inf)
        sums = torch.empty(10, R, dtype=torch.float64, device=x.device)
        entropies = torch.empty_like(target_logit) if entropy else None
        log_q = teacher.log_q if isinstance(teacher, VocabularyRows) else None
        launch(
            score_rows, (R,),
            logits, logits.stride(0), self.bias, target, target_logit, log_q, 0 if log_q is None else log_q.stride(0),
            sums, entropies, R, self.vocabulary, *self._numbers(teacher), **self._constants(teacher),
            BLOCK_V=ROW_BLOCK, num_warps=8,
        )  # fmt: skip
        if not isinstance(teacher, TopKRows):
            divergence = None if teacher is None else sums[7]
            # float64, which the walk keeps without a copy
            top1 = torch.eq(sums[9], target, out=torch.empty_like(target_logit))
            if logit is not None:  # a shard: a target on another shard has no logit among these
                top1 = torch.where(target < 0, target_logit > sums[1], top1)
            rows = _Rows(target, sums, entropies, teacher, None)
            return Scores(sums[0], entropies, divergence, rows, top1, sums[1], sums[4])
        buckets = Buckets(teacher, target, ids_logits, target_logit, *sums[1:4])
        top1 = is_first_of_both(teacher.ids, ids_logits, sums[1], sums[9], target)
        rows = _Rows(target, sums, None, teacher, buckets)
        return Scores(buckets.logprobs, None, buckets.divergence, rows, top1, sums[1], buckets.log_z)

    def gradient(
        self, scores: Scores, nll: Tensor | None, entropy: Tensor | None = None, divergence: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        rows: _Rows = scores.rows
        target, sums, entropies, teacher, buckets = rows
        R = len(target)
        logits, dz = self._views(R)
        zero = torch.zeros_like(scores.logprobs)
        given = [zero if factor is None else factor.double() for factor in (nll, entropy, divergence)]
        size = functools.reduce(torch.add, [x.abs() for x in given if x is not zero] or [zero]) * HEADROOM
        unit = size.clamp(min=SMALLEST)
        if buckets is not None:
            *given, at_ids = buckets.gradient(given[0], given[2])
        factors = torch.stack(given) / unit
        log_q = teacher.log_q if isinstance(teacher, VocabularyRows) else None
        launch(
            gradient_rows, (R,),
            logits, dz, logits.stride(0), dz.stride(0), self.bias, target, log_q,
            0 if log_q is None else log_q.stride(0), sums, entropies if buckets is None else None, factors,
            R, self.vocabulary, *self._numbers(teacher), **self._constants(teacher), BUCKETS=buckets is not None,
            BLOCK_V=ROW_BLOCK, num_warps=8,
        )  # fmt: skip
        if buckets is not None:
            at_ids = at_ids / unit[:, None]
            activation = Activation(1 / self.inverse_temperature, self.softcap if self.activation["SOFTCAP"] else None)
            slope = activation.slope(buckets.ids_logits, sums[1][:, None])
            at_ids = at_ids if slope is None else at_ids * slope
            dz.scatter_(1, buckets.teacher.ids, at_ids.to(dz.dtype))
        return dz, torch.mul(size, self.inverse_temperature, out=torch.empty_like(size, dtype=self.dtype))

    def log_softmax(self, x: Tensor, temperature: float) -> Tensor:
        logits, _ = self._logits(x)
        launch(
            log_softmax_rows, (len(x),),
            logits, logits.stride(0), self.bias, self.vocabulary, self.softcap, self.inverse_temperature,
            1.0 / temperature, **self.activation, BLOCK_V=ROW_BLOCK, num_warps=8,
        )  # fmt: skip
        return logits

    def _activate(self, raw: Tensor, ids: Tensor) -> Tensor:
        """Raw logits (R, K) of some tokens to logits, in the kernels' order of operations."""
        if self.bias is not None:
            raw = raw + self.bias[ids].float()
        if self.activation["SOFTCAP"]:
            raw = self.softcap * torch.tanh(raw / self.softcap)
        return raw * self.inverse_temperature

    def _numbers(self, teacher: TeacherRows | None) -> tuple[float, ...]:
        """The arguments of score_rows and gradient_rows after V."""
        options = DivergenceOptions() if teacher is None else teacher.options
        p_share = 1.0 - options.js_beta
        shares = p_share, math.log(p_share), math.log(options.js_beta)
        return self.softcap, self.inverse_temperature, 1.0 / options.distill_temperature, *shares

    def _constants(self, teacher: TeacherRows | None) -> dict[str, Any]:
        options = DivergenceOptions() if teacher is None else teacher.options
        # one compilation for all kinds where the kernels do not compute the divergence
        kind = DIVERGENCES.index(options.divergence) if isinstance(teacher, VocabularyRows) else 0
        return {**self.activation, "SOFT": options.distill_temperature != 1.0, "KIND": kind}
