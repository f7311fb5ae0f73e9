"""How a call reaches a custom op, as a string and numbers (`spec_and_numbers`), and what the op makes of it (`Call`).

`torch.compile` guards on the value of each number in an op's schema, and would compile anew for each value of a
schedule until it gives up; and filling the defaults of a long schema takes time in every call. So an op takes all its
numbers as one tensor, which is data, and the rest of its options as one string.
"""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pear_kernels import checks
from pear_kernels.engine.head import BackendHead
from pear_kernels.engine.objective import TeacherSource
from pear_kernels.engine.out_of_memory import explain_out_of_memory
from pear_kernels.engine.packing import capturing, pack_tokens, unpack
from pear_kernels.engine.schedule import Wanted
from pear_kernels.engine.walk import LogitsWalk, Walk
from pear_kernels.ops import backends
from pear_kernels.options import CallOptions, HeadOptions, Options, decode, encode
from pear_kernels.sharding import meet, sharded

# An op reads its numbers on the host. Inductor must not capture that into a CUDA graph, whose replays would keep the
# numbers of the capture.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
DTYPES = {str(dtype): dtype for dtype in checks.DTYPES}


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
    def leaves_out(self) -> bool:
        """Whether `HeadOptions.gradient_tolerance` is above 0."""
        return "gradient_tolerance=#" in self.options

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
        # a product stays data where torch.full would make a constant of a number that is traced as a symbol
        one = torch.ones((), dtype=torch.float64, device="cpu")
        numbers = torch.stack([one * float(value) for value in values])
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


def known_tokens(options: dict[type[Options], Any], valid: Tensor, what: str) -> int | None:
    """How many tokens count, from a caller who gave the right number."""
    # a captured CUDA graph has a static pack, whose replays may have another number of tokens that count
    tokens = None if capturing() else options[CallOptions].valid_tokens
    checks.check_valid_tokens(tokens, valid, what)
    return tokens


class Call:
    """One call inside an op: its options, backend and head, and the pack of its tokens after all checks of values."""

    def __init__(
        self,
        tensors: tuple[Tensor, Tensor, Tensor | None, Tensor],  # hidden (N, D), weight (V, D), bias (V,), target (N,)
        numbers: Tensor,
        spec: str,
        group: str | None,
        wanted: Sequence[bool] = (False, False, False),
        columns: Sequence[Tensor] = (),
        *,
        counted: Tensor | None = None,  # of a call whose values an earlier pass checked: `tokens_on_host` of that pass
    ):
        self.hidden, self.weight, self.bias, self.target = tensors
        self.given = parse(spec)
        self.options = self.given.decode(numbers)
        self.own: HeadOptions = self.options[HeadOptions]
        self.columns = dict(zip(self.given.columns, columns, strict=True))
        self.wanted = Wanted(*wanted)
        alike = wanted, self.own.workspace_bytes, self.given.leaves_out
        self.shard = meet(group, self.hidden, self.weight, self.target, *alike)
        self.vocabulary = self.weight.shape[0] if self.shard is None else self.shard.vocabulary
        self.backend = backends.choose(self.own.backend, self.hidden.device, self.given.compute_dtype)
        valid = self.target != self.own.ignore_index
        if counted is None:
            values = {"target": self.target, **self.columns}
            self.backend.check_values(values, valid, self.vocabulary, self.own.ignore_index)
            tokens = known_tokens(self.options, valid, "targets that are not ignore_index")
        else:
            tokens = int(counted) if counted >= 0 else None
        self.pack = pack_tokens(valid, self.columns.get("cu_seqlens"), tokens=tokens)

    def head(self, on_logits: bool) -> Any:
        """The head over this rank's rows of the vocabulary: a `BackendLogitsHead`, or else a `BackendHead`."""
        make: Callable[..., Any] = self.backend.logits_head if on_logits else self.backend.head
        return make(self.weight, self.bias, self.own.temperature, self.own.softcap, self.given.compute_dtype)

    def walk(self, head: Any, on_logits: bool, entropy: bool, teacher: TeacherSource | None = None) -> Walk:
        whole: Any = sharded(head, self.shard, self.own.temperature, self.own.softcap)
        arguments = self.hidden, whole, self.target, self.pack, self.wanted, self.own.workspace_bytes
        tolerance = self.own.gradient_tolerance
        if not on_logits:
            return Walk(*arguments, entropy=entropy, gradient_tolerance=tolerance)
        if tolerance and any(self.wanted):
            raise ValueError(
                f"gradient_tolerance must be 0 for {self.given.name} with a gradient in every logit (an entropy's, as "
                f"with entropy_coef, or a teacher's, as in linear_distill_loss), got {tolerance}"
            )
        return LogitsWalk(*arguments, entropy=entropy, teacher=teacher)

    def explain_out_of_memory(self, name: str, head: BackendHead) -> AbstractContextManager[None]:
        return explain_out_of_memory(name, self.hidden, head, self.wanted, self.own.workspace_bytes)

    def tokens_on_host(self) -> Tensor:
        """() int64 on the CPU: how many tokens count, -1 if only the device knows. Saves a later pass the host sync."""
        return torch.tensor(self.pack.tokens if self.pack.counts is None else -1, device="cpu")

    def unpack(self, values: Tensor) -> Tensor:
        """(n,) in compact order to (N,) in the dtype of results, 0 at ignored tokens."""
        return unpack(values, self.pack, self.target.numel(), self.given.dtype)
