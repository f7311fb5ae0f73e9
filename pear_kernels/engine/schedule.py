"""Which chunks, in which order, how often: the engine's schedule, made on the host before anything runs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pear_kernels.engine.packing import chunk_rows, cut, cut_at_sequences

MIN_WORKSPACE, MAX_WORKSPACE = 128 << 20, 1 << 30  # bytes

Chunk = tuple[int, int]  # [begin, end) in the pack's compact order


class Wanted(NamedTuple):
    """Which gradients the caller needs; each is a product not taken where it is not."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def head(self) -> bool:
        return self.weight or self.bias


class Step(NamedTuple):
    """Chunks that the engine visits together, from the right to the left, and how."""

    how: str  # "visit", "deferred", "own buffer" or "twice": the methods of `engine.Walk`
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
        """The chunks in the order in which their logits are made, some of them twice."""
        return [chunk for how, chunks in self.steps for chunk in chunks + (chunks[:-1] if how == "twice" else [])]

    @property
    def scored(self) -> int:
        """Rows that go through product 1, the logits."""
        return sum(end - begin for begin, end in self.visits)


def default_workspace(weight: Tensor | torch.Size, itemsize: int) -> int:
    """For a head (V, D), as many bytes as the float32 gradient of the head takes anyway, within 128 MiB and 1 GiB.

    That is D rows or more of logits, and at that many rows adding a chunk to dW costs little beside making it.
    """
    return min(max(weight.numel() * itemsize, MIN_WORKSPACE), MAX_WORKSPACE)


def schedule(
    tokens: int,
    wanted: Wanted,
    *,
    row_bytes: int,
    workspace_bytes: int,
    coupled: bool = False,
    separable: bool = True,
    scalable: bool = True,
    lengths: Sequence[int] | None = None,
    coupled_sequences: Sequence[bool] | None = None,
    head_bytes: int = 0,
) -> Schedule:
    """Cuts `tokens` into chunks that fit the workspace, and says how each is visited.

    Args:
        tokens: rows of the pack.
        wanted: the gradients to make.
        row_bytes: what one row of a chunk takes of the workspace.
        workspace_bytes: what there is.
        coupled: whether coefficients are known only after all tokens of their sequence.
        separable: whether what is then known is one number a sequence, so that dW may be made before.
        scalable: whether it is at least one number a token, so that dX may.
        lengths: for a coupled loss, the tokens of each sequence; None where the host does not know them.
        coupled_sequences: which of the sequences are coupled; None: all. The others may be cut anywhere.
        head_bytes: what gradients of the head take, should a sequence need its own.
    """
    gradient = any(wanted)
    rows = chunk_rows(workspace_bytes, row_bytes)
    if not (coupled and gradient):
        return Schedule([Step("visit", [chunk]) for chunk in reversed(cut(0, tokens, rows))], gradient)
    if lengths is None:
        chunks = cut(0, tokens, rows)[::-1]
        if len(chunks) > 1:  # dX may be scaled later; what is in dW may not, being a sum over sequences
            return Schedule([Step("twice" if wanted.head or not scalable else "deferred", chunks)], gradient)
        return Schedule([Step("visit", [chunk]) for chunk in chunks], gradient)
    whole, long = cut_at_sequences(lengths, rows, coupled_sequences)
    if not wanted.head:
        first = further = "deferred" if scalable else "twice"
    elif not separable:
        first = further = "twice"
    else:
        # the first long sequence has dW for itself, so it may be scaled there
        first, further = "deferred", "twice"
        if len(long) > 1 and 2 * head_bytes <= workspace_bytes:
            further = "own buffer"
            whole, long = cut_at_sequences(
                lengths, chunk_rows(workspace_bytes - head_bytes, row_bytes), coupled_sequences
            )
    steps = [Step(further if i else first, chunks[::-1]) for i, chunks in enumerate(long)]
    return Schedule(steps + [Step("visit", [chunk]) for chunk in reversed(whole)], gradient)
