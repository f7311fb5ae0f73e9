"""Which chunks, in which order, how often: the engine's schedule, made on the host before anything runs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pear_kernels.engine.packing import chunk_rows, cut, cut_at_sequences

MIN_WORKSPACE, MAX_WORKSPACE = 128 << 20, 1 << 30  # bytes

Chunk = tuple[int, int]  # [begin, end) in the pack's compact order


class Wanted(NamedTuple):
    """Which gradients the caller needs. Each one that is not needed saves a product."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def head(self) -> bool:
        return self.weight or self.bias


class Coupling(NamedTuple):
    """Of a coupled loss: what the schedule knows of its sequences and its coefficients (see `engine.Objective`)."""

    separable: bool
    scalable: bool
    lengths: Sequence[int] | None  # tokens of each sequence; None where the host does not know them
    coupled_sequences: Sequence[bool] | None = None  # one flag per sequence; None: all are coupled


class Step(NamedTuple):
    """Chunks that the engine visits together, from right to left, and how."""

    how: str  # "visit", "deferred" or "twice": the methods of `engine.walk.Walk`
    chunks: list[Chunk]


class Schedule(NamedTuple):
    """A whole walk."""

    steps: list[Step]
    gradient: bool  # whether any is wanted

    @property
    def rows(self) -> int:
        """Rows of the longest chunk, which the workspace must hold."""
        return max((end - begin for step in self.steps for begin, end in step.chunks), default=0)

    @property
    def visits(self) -> list[Chunk]:
        """The chunks in the order in which their logits are made. A chunk that is visited twice is listed twice."""
        return [chunk for how, chunks in self.steps for chunk in chunks + (chunks[:-1] if how == "twice" else [])]

    @property
    def scored(self) -> int:
        """Rows that go through product 1, the logits."""
        return sum(end - begin for begin, end in self.visits)


def default_workspace(weight: Tensor | torch.Size, itemsize: int) -> int:
    """For a head (V, D), as many bytes as the float32 gradient of the head takes anyway, within 128 MiB and 1 GiB.

    That is at least D rows of logits. With that many rows, adding a chunk to dW costs little next to making it.
    """
    return min(max(weight.numel() * itemsize, MIN_WORKSPACE), MAX_WORKSPACE)


def schedule(
    tokens: int, wanted: Wanted, *, row_bytes: int, workspace_bytes: int, coupling: Coupling | None = None
) -> Schedule:
    """Cuts `tokens` into chunks that fit the workspace, and says how each is visited.

    Args:
        tokens: rows of the pack.
        wanted: the gradients to make.
        row_bytes: bytes of workspace per row of a chunk.
        workspace_bytes: bytes of the workspace.
        coupling: None for a loss whose coefficients are known as soon as a chunk's log-probs are.
    """
    gradient, rows = any(wanted), chunk_rows(workspace_bytes, row_bytes)
    alone, further = cut(0, tokens, rows), "twice"
    steps: list[Step] = []
    if coupling is not None and gradient:
        separable, scalable, lengths, coupled_sequences = coupling
        if not wanted.head and scalable:  # dX can be rescaled row by row; dW is a sum over sequences and cannot
            further = "deferred"
        if lengths is not None:
            alone, long = cut_at_sequences(lengths, rows, coupled_sequences)
            # while the first long sequence is walked, dW holds nothing else and can be rescaled
            first = "deferred" if wanted.head and separable else further
            steps = [Step(further if i else first, chunks[::-1]) for i, chunks in enumerate(long)]
        elif len(alone) > 1:
            alone, steps = [], [Step(further, alone[::-1])]
    return Schedule(steps + [Step("visit", [chunk]) for chunk in reversed(alone)], gradient)
