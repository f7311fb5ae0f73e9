"""Distillation: teachers as the engine sees them, and the loss that a divergence from one makes."""

from typing import NamedTuple

import torch
from torch import Tensor

from pear_kernels.divergence import DivergenceOptions
from pear_kernels.engine import Coefficients, Objective
from pear_kernels.head import DenseHead, TeacherRows
from pear_kernels.packing import Pack


class Teacher(NamedTuple):
    """A teacher in memory: its hidden states before its own LM head. It gets no gradient."""

    hidden: Tensor  # (N, D') or (B, T, D'), of any D' and floating-point dtype
    weight: Tensor  # (V, D'), the student's vocabulary
    bias: Tensor | None = None  # (V,)
    temperature: float = 1.0  # of its own head: divides its logits
    softcap: float | None = None  # of its own head: bounds them


class TopKTeacher(NamedTuple):
    """An offline teacher: its K most likely tokens at each position. The rest of the vocabulary is one outcome."""

    ids: Tensor  # (N, K) or (B, T, K), int64 or int32
    logprobs: Tensor  # like ids, float32 or float64, descending, at the divergence's temperature


class LoadedTeacher:
    """`engine.Teacher` of a `Teacher`: its logits are made beside ours, chunk by chunk."""

    def __init__(self, hidden: Tensor, head: DenseHead, pack: Pack, options: DivergenceOptions):
        self.hidden, self.head, self.pack, self.options = hidden, head, pack, options

    def row_bytes(self) -> int:
        return self.head.row_bytes(True)

    def reserve(self, rows: int) -> None:
        self.head.reserve(rows, True)

    def rows(self, begin: int, end: int) -> TeacherRows:
        x = self.head.widen(self.pack.take(self.hidden, begin, end))
        return TeacherRows(self.options, self.head.log_softmax(x, self.options.temperature))


class OfflineTeacher:
    """`engine.Teacher` of a `TopKTeacher`."""

    def __init__(self, ids: Tensor, logprobs: Tensor, pack: Pack, options: DivergenceOptions):
        self.ids, self.logprobs, self.pack, self.options = ids, logprobs, pack, options

    def row_bytes(self) -> int:
        return 64 * self.ids.shape[1]  # eight numbers a token and outcome

    def reserve(self, rows: int) -> None:
        """What a chunk takes is made with it."""

    def rows(self, begin: int, end: int) -> TeacherRows:
        ids = self.pack.take(self.ids, begin, end).long()
        if self.pack.counts is not None:  # a ghost's are 0, and ids must be distinct
            ghost = ~self.pack.counts[begin:end, None]
            ids = torch.where(ghost, torch.arange(ids.shape[1], device=ids.device), ids)
        given = self.pack.take(self.logprobs, begin, end)
        top = given.double()
        # no less than the log-probs' own rounding: 0 would make a reverse KL infinite where they only sum up to 1
        rest = (1 - top.exp().sum(1)).clamp(min=torch.finfo(given.dtype).eps)
        return TeacherRows(self.options, None, ids, top, rest)


class DistillObjective(Objective):
    """L = sum_t G_t * scale_t * (D_t + nll_coef * -log p_t), with G and scale those of another objective."""

    def __init__(self, weights: Objective, nll_coef: float):
        self.weights = weights
        self.nll_coef = nll_coef
        self.coupled, self.separable = weights.coupled, weights.separable

    def observe(self, begin: int, end: int, logprobs: Tensor, entropy: Tensor | None = None) -> None:
        self.weights.observe(begin, end, logprobs, entropy)

    def coefficients(self, begin: int, end: int) -> Coefficients:
        return self.both(self.weights.coefficients(begin, end))

    def own(self, begin: int, end: int) -> Coefficients:
        own = self.weights.own(begin, end)
        return self.both(self.weights.token_scale.new_ones(end - begin) if own is None else own)

    def factor(self, begin: int, end: int) -> Tensor:
        return self.weights.factor(begin, end)

    def rescale(self) -> Tensor | None:
        return self.weights.rescale()

    def both(self, factor: Tensor) -> Coefficients:
        return Coefficients(factor * self.nll_coef if self.nll_coef else None, None, factor)

    def finish(self, logprobs: Tensor, divergence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From all log-probs and divergences (n,): loss (), weights (n,), and the statistics, that of D first."""
        pack, scale = self.weights.pack, self.weights.token_scale
        _, weights, stats = self.weights.finish(logprobs)
        losses = divergence - self.nll_coef * logprobs if self.nll_coef else divergence
        loss = pack.zero_ghosts(weights * scale * losses).sum()
        tokens = torch.as_tensor(pack.counted, device=scale.device).clamp(min=1)
        return loss, weights, torch.cat([(pack.zero_ghosts(divergence).sum() / tokens)[None], stats])


class AnchoredObjective(Objective):
    """L = sum_t scale_t * (L_t + kl_coef * D_t), a pull to the teacher beside an objective that waits for nothing."""

    def __init__(self, weights: Objective, kl_coef: float):
        self.weights = weights
        self.kl_coef = kl_coef

    def observe(self, begin: int, end: int, logprobs: Tensor, entropy: Tensor | None = None) -> None:
        self.weights.observe(begin, end, logprobs, entropy)

    def coefficients(self, begin: int, end: int) -> Coefficients:
        of_divergence = self.kl_coef * self.weights.token_scale[begin:end]
        return Coefficients(self.weights.coefficients(begin, end), None, of_divergence)

    def finish(self, logprobs: Tensor, divergence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From all log-probs and divergences (n,): loss (), and the other objective's weights (n,) and statistics."""
        loss, weights, stats = self.weights.finish(logprobs)
        pull = self.weights.pack.zero_ghosts(divergence * self.weights.token_scale).sum()
        return loss + self.kl_coef * pull, weights, stats
