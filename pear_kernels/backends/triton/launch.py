"""The one place where kernels are launched: on their tensors' device, or into a list instead of onto it.

No kernel's launch depends on what another one computed, so a whole pass can be *recorded*: with `recorder` set to a
list, `launch` appends to it and runs nothing. `python -m bench.kernels` compiles what it finds there, on machines
without a GPU and on tensors of device "meta".
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
    """What would have run: the kernel, its positional arguments and constexprs."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


recorder: list[Launch] | None = None

# multiply-adds may be one instruction; said because Triton's own default is about to change
OPTIONS = {"enable_fp_fusion": True}


def launch(kernel, grid: tuple[int, ...], *args, num_warps: int = 4, num_stages: int = 1, **constexprs) -> None:
    """kernel[grid](*args, **constexprs), unless the grid is empty."""
    if recorder is not None:
        recorder.append(Launch(kernel, grid, args, constexprs, num_warps, num_stages))
        return
    if 0 in grid:
        return
    with on_device_of(args), loading_allowed():
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **OPTIONS, **constexprs)


def on_device_of(args: tuple) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    for arg in args:
        tensor = arg.base if isinstance(arg, TensorDescriptor) else arg
        if isinstance(tensor, torch.Tensor):
            return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
    return contextlib.nullcontext()


@contextlib.contextmanager
def loading_allowed() -> Iterator[None]:
    """A kernel's first launch loads it, which a thread that captures a CUDA graph may do only if it says so."""
    if not capturing():
        yield
        return
    mode = ctypes.c_int(RELAXED)
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))  # leaves the mode that was in `mode`
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
