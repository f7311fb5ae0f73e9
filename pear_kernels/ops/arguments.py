"""How a call reaches a custom op: its options as a string and numbers, and what `torch` may be doing around it.

`torch.compile` guards on the value of each number in an op's schema, and would compile anew for each value of a
schedule until it gives up; and filling the defaults of a long schema takes time in every call. So an op takes all its
numbers as one tensor, which is data, and the rest of its options as one string.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pear_kernels.options import Options, decode, encode

DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


class Spec(NamedTuple):
    """What an op's string says."""

    name: str  # of the public function
    columns: tuple[str, ...]  # names of the tensors in the op's list
    compute_dtype: torch.dtype  # operands of products are rounded to it, as autocast does
    return_entropy: bool
    options: str  # of `options.encode`

    @property
    def backend(self) -> str | None:
        """`HeadOptions.backend`, which needs no numbers."""
        found = re.search(r"\bbackend='(\w+)'", self.options)
        return None if found is None else found.group(1)

    @property
    def dtype(self) -> torch.dtype:
        """Of losses, log-probs, weights and dW: float32, or float64 for float64 inputs."""
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32

    def decode(self, numbers: Tensor) -> dict[type[Options], Any]:
        return decode(self.options, tuple(numbers.tolist()))


def spec_and_numbers(
    name: str,
    columns: Iterable[str],
    compute_dtype: torch.dtype,
    options: Sequence[Options],
    return_entropy: bool = False,
) -> tuple[str, Tensor]:
    """The string that `parse` reads, and the options' numbers (k,) float64 on the CPU."""
    if torch.compiler.is_compiling():
        encoded, values = encode(options)
        numbers = torch.stack([as_tensor(float(value)) for value in values])
    else:
        encoded, values = _encoded(tuple(options))
        # never kept for the next call, which may run under another mode: fake tensors, inference mode
        numbers = torch.tensor(values, dtype=torch.float64, device="cpu")
    return f"{name}|{','.join(columns)}|{compute_dtype}|{int(bool(return_entropy))}|{encoded}", numbers


_encoded = functools.lru_cache(maxsize=256)(encode)


@functools.lru_cache(maxsize=256)
def parse(spec: str) -> Spec:
    name, columns, compute_dtype, entropy, options = spec.split("|")
    return Spec(name, tuple(columns.split(",")) if columns else (), DTYPES[compute_dtype], entropy == "1", options)


def as_tensor(number: float, device: torch.device | str = "cpu") -> Tensor:
    """() float64. Of a number that `torch.compile` traces as a symbol it is a product, which stays data; `torch.full`
    would make a constant of it."""
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=torch.float64, device=device) * number
    return torch.full((), number, dtype=torch.float64, device=device)
