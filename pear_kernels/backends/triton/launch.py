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
from triton.tools.tensor_descriptor import TensorDescriptor

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
    with on_device_of(args), loading_allowed():
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **OPTIONS, **constexprs)


def on_device_of(args: tuple[Any, ...]) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensors' device the current one, on which Triton launches."""
    for arg in args:
        tensor = arg.base if isinstance(arg, TensorDescriptor) else arg
        if isinstance(tensor, torch.Tensor):
            return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
    return contextlib.nullcontext()


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
