"""Teachers: the tensors that the caller passes, and the source of distributions that the engine reads, per chunk."""

from typing import NamedTuple

import torch
from torch import Tensor

from pear_kernels.engine.head import BackendLogitsHead, TopKRows, VocabularyRows
from pear_kernels.engine.objective import TeacherSource
from pear_kernels.engine.packing import Pack
from pear_kernels.objectives.base import Problem
from pear_kernels.options import DivergenceOptions, HeadOptions, TeacherOptions


class Teacher(NamedTuple):
    """A teacher in memory: its hidden states before its own LM head. It gets no gradient."""

    hidden: Tensor  # (N, D') or (B, T, D'), of any D' and floating-point dtype
    weight: Tensor  # (V, D'), the student's vocabulary
    bias: Tensor | None = None  # (V,)
    temperature: float = HeadOptions.temperature  # of its own head: divides its logits
    softcap: float | None = HeadOptions.softcap  # of its own head: bounds them


class TopKTeacher(NamedTuple):
    """An offline teacher: its K most likely tokens at each position. The rest of the vocabulary is one outcome."""

    ids: Tensor  # (N, K) or (B, T, K), int64 or int32
    logprobs: Tensor  # like ids, float32 or float64, descending, at the divergence's temperature


class LoadedTeacher:
    """`TeacherSource` of a `Teacher`: its logits are made beside the student's, chunk by chunk."""

    def __init__(self, hidden: Tensor, head: BackendLogitsHead, pack: Pack, options: DivergenceOptions):
        self.hidden, self.head, self.pack, self.options = hidden, head, pack, options

    def row_bytes(self) -> int:
        return self.head.row_bytes(True)

    def reserve(self, rows: int) -> None:
        self.head.reserve(rows, True)

    def rows(self, begin: int, end: int) -> VocabularyRows:
        x = self.head.as_operand(self.pack.take(self.hidden, begin, end))
        return VocabularyRows(self.options, self.head.log_softmax(x, self.options.distill_temperature))


class OfflineTeacher:
    """`TeacherSource` of a `TopKTeacher`."""

    def __init__(self, ids: Tensor, logprobs: Tensor, pack: Pack, options: DivergenceOptions):
        self.ids, self.logprobs, self.pack, self.options = ids, logprobs, pack, options

    def row_bytes(self) -> int:
        return 64 * self.ids.shape[1]  # eight float64 numbers per token and outcome

    def reserve(self, rows: int) -> None:
        """Nothing: a chunk's tensors are allocated with the chunk."""

    def rows(self, begin: int, end: int) -> TopKRows:
        ids = self.pack.take(self.ids, begin, end).long()
        if self.pack.counts is not None:  # a ghost's are 0, and ids must be distinct
            ghost = ~self.pack.counts[begin:end, None]
            ids = torch.where(ghost, torch.arange(ids.shape[1], device=ids.device), ids)
        given = self.pack.take(self.logprobs, begin, end)
        top = given.double()
        # at least the rounding of the log-probs: a reverse KL is infinite at 0, and rounded log-probs may sum to 1
        rest = (1 - top.exp().sum(1)).clamp(min=torch.finfo(given.dtype).eps)
        return TopKRows(self.options, ids, top, rest)


def teacher_of(problem: Problem, student: BackendLogitsHead) -> TeacherSource | None:
    """The teacher that a call compares the student with: in memory, by its most likely tokens, or none.

    A teacher in memory runs on the student's backend, with a head as exact as the student's.
    """
    columns, options = problem.columns, problem.options.get(DivergenceOptions, DivergenceOptions())
    if "teacher_ids" in columns:
        return OfflineTeacher(columns["teacher_ids"], columns["teacher_logprobs"], problem.pack, options)
    if "teacher_hidden" not in columns:
        return None
    hidden, own = columns["teacher_hidden"], problem.options[TeacherOptions]
    dtype = torch.float32 if hidden.dtype == torch.float64 else hidden.dtype
    dtype = torch.float64 if student.dtype == torch.float64 else dtype
    arguments = columns["teacher_weight"], columns.get("teacher_bias"), own.temperature, own.softcap, dtype
    head = type(student)(*arguments)  # type: ignore[call-arg]  # a protocol does not say how a head is made
    return LoadedTeacher(hidden, head, problem.pack, options)
