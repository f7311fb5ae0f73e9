"""Which of the two backends a call runs on: "torch" (any device) or "triton" (kernels for NVIDIA GPUs).

The caller's choice, by argument or by the environment variable PEAR_KERNELS_BACKEND, comes first; otherwise the
tensors' device decides. The custom ops call this when they run, so `torch.compile` never traces it.
"""

import functools
import os
import warnings

import torch

from pear_kernels.options import BACKEND, check

VARIABLE = "PEAR_KERNELS_BACKEND"
MIN_CAPABILITY = (8, 0)  # the oldest NVIDIA architecture the kernels are compiled for: Ampere

_warned = False


def resolve(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """ "triton" or "torch", for tensors on `device` whose products run in `dtype`.

    float64 always runs on "torch". An explicit "triton" that cannot run is an error. Without a choice, a GPU on which
    the kernels cannot run gets "torch", with one warning per process.

    Raises:
        ValueError: for an unknown backend, or for "triton" where it cannot run.
    """
    name = "backend" if backend is not None else VARIABLE
    chosen = backend if backend is not None else os.environ.get(VARIABLE) or None
    check(name, chosen, BACKEND)
    if chosen == "torch" or dtype == torch.float64 or (chosen is None and device.type != "cuda"):
        return "torch"
    obstacle = triton_obstacle(device)
    if obstacle is None:
        return "triton"
    if chosen == "triton":
        raise ValueError(f"{name} is 'triton', but {obstacle}; or leave {name} unset")
    fall_back(obstacle)
    return "torch"


@functools.cache
def triton_obstacle(device: torch.device) -> str | None:
    """Why the kernels cannot run on tensors of this device, and what to do about it; None if they can."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error}): install the triton that belongs to torch {torch.__version__}"
    if interpreting():
        return None
    if device.type != "cuda":
        return (
            f"the tensors are on {device}: move them to a CUDA device, or, to try the kernels on a CPU, set "
            "TRITON_INTERPRET=1 before Python starts"
        )
    if torch.version.hip is not None:
        return f"the kernels are for NVIDIA GPUs, and torch {torch.__version__} is built for ROCm: use {VARIABLE}=torch"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {'.'.join(map(str, capability))}, and the "
            f"kernels need {'.'.join(map(str, MIN_CAPABILITY))} or newer: use such a GPU"
        )
    return None


@functools.cache
def interpreting() -> bool:
    """Whether TRITON_INTERPRET=1 lets the kernels run on CPU tensors. Triton reads it at import of the first kernel."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


def fall_back(obstacle: str) -> None:
    """Warn about it, once per process."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"pear_kernels falls back to its PyTorch path, as {obstacle}. {VARIABLE}=torch silences this",
            RuntimeWarning,
            stacklevel=2,
        )
