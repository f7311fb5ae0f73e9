"""What each backend is made of. The only place that loads the Triton kernels, when a call first runs on them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pear_kernels.backends.choice import resolve
from pear_kernels.backends.torch.head import Head
from pear_kernels.backends.torch.logits_head import LogitsHead
from pear_kernels.checks import check_values
from pear_kernels.engine.head import BackendHead, BackendLogitsHead, HeadFactory
from pear_kernels.formulas.pear_weights import PEARWeights


class Backend(NamedTuple):
    """The classes of one backend; tensors lie on one device."""

    head: HeadFactory[BackendHead]
    logits_head: HeadFactory[BackendLogitsHead]
    weights: type[PEARWeights]
    check_values: Callable[..., None]  # as `checks.check_values`


def choose(backend: str | None, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of a call whose products run in `dtype` on `device`; see `backends.choice.resolve`."""
    if resolve(backend, device, dtype) == "torch":
        return Backend(Head, LogitsHead, PEARWeights, check_values)
    from pear_kernels.backends.triton import head, logits_head, pear_weights, values

    # interpreted kernels run on CPU tensors, whose values an error can name
    by_kernel = values.check_values if off_cpu(device) else check_values
    return Backend(head.Head, logits_head.LogitsHead, pear_weights.PEARWeights, by_kernel)


def off_cpu(device: torch.device) -> bool:
    return device.type != "cpu"


def scale_and_round(gradient: Tensor, upstream: Tensor, dtype: torch.dtype, backend: str | None) -> Tensor:
    """gradient * upstream on a GPU, in one pass: a gradient of another dtype than the tensor it belongs to."""
    if gradient.is_contiguous() and resolve(backend, gradient.device, gradient.dtype) == "triton":
        from pear_kernels.backends.triton.head import scale_and_round as by_kernel

        return by_kernel(gradient, upstream, dtype)
    return torch.mul(gradient, upstream, out=torch.empty_like(gradient, dtype=dtype))
