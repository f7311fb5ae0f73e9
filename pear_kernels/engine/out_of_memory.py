"""Out of memory: the same error, with the sizes of the allocations and how to lower each."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pear_kernels.engine.head import Head
from pear_kernels.engine.schedule import Wanted, default_workspace

# parts of the messages of failed allocations: of CUDA, of PyTorch on a CPU under Linux, and under Windows
SIGNS = ("out of memory", "can't allocate memory", "not enough memory")


@contextmanager
def explain_out_of_memory(
    name: str, hidden: Tensor, head: Head, wanted: Wanted, workspace_bytes: int | None
) -> Iterator[None]:
    """Wraps the allocations of a call: its gradients first, then its workspace."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error).lower() for sign in SIGNS):
            raise
        weight, itemsize, dtype = head.weight, head.dtype.itemsize, str(head.dtype).removeprefix("torch.")
        workspace = workspace_bytes or default_workspace(head.planned, itemsize)
        needs = [f"a workspace of up to {mebibytes(workspace)} (lower it: workspace_bytes, now {workspace})"]
        if wanted.weight:
            needs.append(
                f"{mebibytes(weight.numel() * itemsize)} for the {dtype} gradient of weight (V, D) = "
                f"{tuple(weight.shape)} (none where weight needs no gradient)"
            )
        if wanted.hidden:
            needs.append(f"{mebibytes(hidden.numel() * hidden.itemsize)} for the gradient of hidden")
        kind = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else RuntimeError
        raise kind(f"{name} ran out of memory. It asks for {', and '.join(needs)}. {error}") from error


def mebibytes(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"
