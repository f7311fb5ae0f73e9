"""The only place that launches kernels: on the device of their tensors, or into a list.

No launch depends on results of another kernel, so a whole pass can be *recorded*: if `recorder` is a list, `launch`
appends to it and runs nothing. `python -m bench.kernels` records on tensors of device "meta", without a GPU, and
compiles every recorded launch.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from pear_kernels.engine.packing import capturing

RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class Launch(NamedTuple):
    """A recorded launch."""

    kernel: Any  # a `triton.JITFunction`, which has no type stubs
    grid: tuple[int, ...]
    args: tuple[Any, ...]  # tensors, descriptors, numbers, None
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


recorder: list[Launch] | None = None

# A multiply and an add may become one instruction. Set here because Triton's default is about to change.
OPTIONS = {"enable_fp_fusion": True}


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 1, **constexprs: Any
) -> None:
    """kernel[grid](*args, **constexprs), unless the grid is empty."""
    if recorder is not None:
        recorder.append(Launch(kernel, grid, args, constexprs, num_warps, num_stages))
        return
    if 0 in grid:
        return
    # Triton launches on the current device
    with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, torch.Tensor))), loading_allowed():
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **OPTIONS, **constexprs)


@contextlib.contextmanager
def loading_allowed() -> Iterator[None]:
    """Lets a thread that captures a CUDA graph load kernels, as each kernel's first launch does."""
    if not capturing():
        yield
        return
    mode = ctypes.c_int(RELAXED)
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))  # swaps: `mode` is now the old mode
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
