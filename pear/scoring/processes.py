"""The processes that share one `pear score`, started by `accelerate launch` or any other that sets WORLD_SIZE.

They say little to each other: at a few points all wait until all are there, and hear whether one of them has failed.
Log-probs go through the side files, so the folder of `out` must be one that all processes see.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch

from pear.appending import is_main as is_main
from pear.io import DataError

WAIT = timedelta(days=7)  # a process may score for days longer than another


class OtherProcessFailed(DataError):
    """Another process of this run failed; what it says is in the message."""


class Processes:
    """Which of how many processes this one is (`rank` of `count`), and where it is to run (`device`)."""

    def __init__(self, device: str | None = None):
        self.rank, self.count = 0, 1
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            from accelerate import PartialState

            on_cpu = not torch.accelerator.is_available() or device == "cpu"
            state = PartialState(cpu=on_cpu, timeout=WAIT)
            self.rank, self.count = state.process_index, state.num_processes
            # Of its own, since NCCL's would need every process's GPU for a word.
            self._group = torch.distributed.new_group(backend="gloo", timeout=WAIT)
            own = state.device
        else:
            own = device_named(None)
        self.device = own
        if device is not None and (own.type != device or self.count == 1):  # "cuda" is each process's own GPU
            self.device = device_named(device)

    @property
    def warning(self) -> str | None:
        """Where a launcher has started fewer processes than it was asked for."""
        if self.count == 1 and {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys():
            return (
                "accelerate launch has started one process, as it does without a GPU whatever --num_processes says: "
                "add --multi_gpu, which works on a CPU too, or start with torchrun."
            )
        return None

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def which(self) -> str:
        """For progress and messages; empty for a process alone."""
        return f", process {self.rank + 1} of {self.count}" if self.count > 1 else ""

    def gather(self, value: Any) -> list[Any]:
        """One value of each process, in order; small ones. Waits for all.

        Raises:
            DataError: a process has ended.
        """
        if self.count == 1:
            return [value]
        values = [None] * self.count
        try:
            torch.distributed.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise DataError(
                "another process of this run ended before it was done (killed, or by an error that it told). What was "
                f"scored is kept; the same command goes on from there. ({str(error).splitlines()[0][:200]})"
            ) from error
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All processes run the block and leave it when all are through, with an error if one had any.

        Raises:
            the block's own error in the process where it happened first, OtherProcessFailed in the others.
        """
        own = None
        try:
            yield
        except Exception as error:
            own = error
            if self.count == 1:
                raise
        try:
            told = self.gather(None if own is None else str(own) or type(own).__name__)
        except DataError:
            if own is None:
                raise
            raise own from None
        failed = [rank for rank, message in enumerate(told) if message is not None]
        if own is not None and failed[0] == self.rank:
            raise own
        if failed:
            raise OtherProcessFailed(f"process {failed[0] + 1} of {self.count} failed: {told[failed[0]]}")


def leave_group() -> None:
    """At the end of a program: the processes part, and nobody warns about it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def device_named(name: str | None) -> torch.device:
    """The device, which is there; None: the accelerator, or else the CPU.

    Raises:
        DataError: no such device, or none here.
    """
    if name is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).sum().item()  # "meta" has no values
    except (RuntimeError, AssertionError) as error:  # of a build without CUDA it is an AssertionError
        said = " ".join(str(error).split())
        raise DataError(
            f"device = {name!r} cannot be used here: {said:.200}. Give cpu, or leave it out for the accelerator, if any"
        ) from None
    return device
