"""The right-to-left walk: an LM head, its loss's gradients and the log-probs, chunk by chunk, without the full logits.

The engine knows chunks and coefficients; it knows no loss and no device. What it asks of a loss is an `Objective`:
take the log-probs of a chunk, later say the coefficient c_t = dL/d(-log p_t) of each of its tokens. A coefficient may
depend on all tokens to the right of its own in its sequence, because the walk goes from the last chunk to the first;
so a chunk's logits are made once, and its two gradient products follow while they are still there:

    E, log p = softmax(x W^T)        dX = diag(r) E W        dW += E^T diag(r) x        r = c * row_scale

A loss that is `coupled` gives one coefficient to a sequence, and only when it has seen all of it (PEAR's sequence
level). Its chunks end where sequences end, and a sequence longer than a chunk is deferred: dW is gathered with c = 1
and scaled once c is known. The first such sequence does that in dW itself, before anything else is there; a further one
needs a (V, D) buffer of its own or, where the workspace has no room for that, a pass for its log-probs first (a fourth
product).
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pear_kernels.cpu import Head, Softmax
from pear_kernels.packing import Pack, chunk_rows, cut, cut_at_sequences

MIN_WORKSPACE, MAX_WORKSPACE = 128 << 20, 1 << 30  # bytes


class Objective(Protocol):
    """A loss, to the engine. Bounds are [begin, end) in the pack's compact order."""

    coupled: bool  # one coefficient a sequence, which depends on all of its tokens

    def observe(self, begin: int, end: int, logprobs: Tensor) -> None:
        """The log-probs (end - begin,) of these tokens; called once for each token, right to left in a sequence."""

    def coefficients(self, begin: int, end: int) -> Tensor:
        """(end - begin,) c_t = dL/d(-log p_t), of tokens that were observed."""


class Wanted(NamedTuple):
    """Which gradients the caller needs; each is a product not taken where it is not."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def head(self) -> bool:
        return self.weight or self.bias


@dataclass
class Gradients:
    """Where gradients are gathered. Empty (0,) tensors stand for those nobody asked for."""

    hidden: Tensor  # (N, D): hidden's dtype, but float32 for float16, whose range a coefficient of 1/N would leave
    weight: Tensor  # (V, D): float32 (float64); rounded to the weight's dtype once, in the backward pass
    bias: Tensor  # (V,): like weight
    written: bool = False  # whether a chunk is in: the first one writes `weight`, which starts as garbage; others add

    def own_head(self) -> "Gradients":
        """The same dX, and a dW and db apart."""
        return Gradients(self.hidden, torch.empty_like(self.weight), torch.zeros_like(self.bias))

    def add_head_(self, other: "Gradients") -> None:
        self.weight.add_(other.weight)
        self.bias.add_(other.bias)


def default_workspace(weight: Tensor, itemsize: int) -> int:
    """As many bytes as the float32 gradient of the head takes anyway, within 128 MiB and 1 GiB.

    That is D rows or more of logits, and at that many rows adding a chunk to dW costs little beside making it.
    """
    return min(max(weight.numel() * itemsize, MIN_WORKSPACE), MAX_WORKSPACE)


class Walk:
    """One call: which tokens, which head, which gradients, and the buffers they are gathered in."""

    def __init__(
        self, hidden: Tensor, head: Head, target: Tensor, pack: Pack, wanted: Wanted, workspace_bytes: int | None
    ):
        self.hidden = hidden  # (N, D), the caller's
        self.head = head
        self.target = target[pack.index]  # (n,)
        self.pack = pack
        self.wanted = wanted
        self.workspace_bytes = workspace_bytes or default_workspace(head.weight, head.dtype.itemsize)
        self.logprobs = torch.zeros(pack.tokens, dtype=torch.float64, device=hidden.device)
        grad_dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype

        def buffer(shape: tuple[int, ...], dtype: torch.dtype, is_wanted: bool) -> Tensor:
            return torch.empty(shape if is_wanted else (0,), dtype=dtype, device=hidden.device)

        self.grads = Gradients(
            buffer(tuple(hidden.shape), grad_dtype, wanted.hidden),
            buffer(tuple(head.weight.shape), head.dtype, wanted.weight),
            buffer((head.vocabulary,), head.dtype, wanted.bias).zero_(),
        )
        if pack.tokens < len(hidden):
            self.grads.hidden.zero_()  # ignored tokens have no gradient, and no chunk ever visits them

    # ---- the walk

    def run(self, objective: Objective) -> None:
        """Fills `logprobs`, and the gradients for a loss whose coefficients come from `objective`."""
        rows = chunk_rows(self.workspace_bytes, self.row_bytes)
        if objective.coupled:
            self.run_coupled(objective, rows)
        else:
            chunks = cut(0, self.pack.tokens, rows)
            self.reserve(chunks)
            for begin, end in reversed(chunks):
                self.visit(objective, begin, end)
        if not self.grads.written:
            self.grads.weight.zero_()

    def run_coupled(self, objective: Objective, rows: int) -> None:
        lengths = self.pack.lengths.tolist()
        whole, long = cut_at_sequences(lengths, rows)
        own_buffer = False
        if self.wanted.head and len(long) > 1:
            buffer_bytes = self.head.dtype.itemsize * (self.grads.weight.numel() + self.grads.bias.numel())
            own_buffer = 2 * buffer_bytes <= self.workspace_bytes
            if own_buffer:
                rows = chunk_rows(self.workspace_bytes - buffer_bytes, self.row_bytes)
                whole, long = cut_at_sequences(lengths, rows)
        self.reserve(whole + [chunk for chunks in long for chunk in chunks])
        for chunks in long:
            if not (self.wanted.head and self.grads.written):
                self.visit_deferred(objective, chunks, self.grads)
            elif own_buffer:
                own = self.grads.own_head()
                self.visit_deferred(objective, chunks, own)
                self.grads.add_head_(own)
            else:
                self.visit_twice(objective, chunks)
        for begin, end in reversed(whole):
            self.visit(objective, begin, end)

    def visit(self, objective: Objective, begin: int, end: int) -> None:
        """One chunk whose coefficients are known as soon as its log-probs are."""
        x, softmax = self.score(objective, begin, end)
        if any(self.wanted):
            self.accumulate(begin, end, x, softmax, objective.coefficients(begin, end), self.grads)

    def visit_deferred(self, objective: Objective, chunks: list[tuple[int, int]], into: Gradients) -> None:
        """One sequence of several chunks: gradients with c = 1, scaled when its one coefficient is known."""
        for begin, end in reversed(chunks):
            x, softmax = self.score(objective, begin, end)
            if any(self.wanted):
                self.accumulate(begin, end, x, softmax, torch.ones_like(softmax.row_scale), into)
        first = chunks[0][0]
        coefficient = objective.coefficients(first, first + 1).to(self.head.dtype)
        into.weight.mul_(coefficient)
        into.bias.mul_(coefficient)
        if self.wanted.hidden:
            for begin, end in chunks:
                index = self.pack.index[begin:end]
                into.hidden.index_copy_(0, index, into.hidden[index].mul_(coefficient))

    def visit_twice(self, objective: Objective, chunks: list[tuple[int, int]]) -> None:
        """One sequence of several chunks: first its log-probs, then its gradients."""
        for begin, end in reversed(chunks):
            self.score(objective, begin, end)
        for begin, end in reversed(chunks):
            x, softmax = self.softmax(begin, end)
            self.accumulate(begin, end, x, softmax, objective.coefficients(begin, end), self.grads)

    # ---- walks without an objective

    def score_all(self, entropy: bool) -> Tensor:
        """Fills `logprobs`; returns the entropies (n,), or an empty tensor. No gradient, any order."""
        chunks = cut(0, self.pack.tokens, chunk_rows(self.workspace_bytes, self.row_bytes))
        self.reserve(chunks)
        entropies = self.logprobs.new_zeros(self.pack.tokens if entropy else 0)
        for begin, end in chunks:
            x, target = self.head.widen(self.rows(self.hidden, begin, end)), self.target[begin:end]
            softmax = self.head.softmax(x, target, gradient=False, entropy=entropy)
            self.logprobs[begin:end] = softmax.logprobs
            if entropy:
                entropies[begin:end] = softmax.entropy
        return entropies

    def run_dense(self, of_nll: Tensor, of_entropy: Tensor) -> None:
        """Gradients for known coefficients (n,) on -log p and on the entropy, which rewrite the whole chunk."""
        chunks = cut(0, self.pack.tokens, chunk_rows(self.workspace_bytes, self.row_bytes))
        self.reserve(chunks)
        for begin, end in chunks:
            x, target = self.head.widen(self.rows(self.hidden, begin, end)), self.target[begin:end]
            dz = self.head.entropy_gradient(x, target, of_nll[begin:end], of_entropy[begin:end])
            self.products(begin, end, x, dz, torch.ones_like(of_nll[begin:end]), self.grads)
        if not self.grads.written:
            self.grads.weight.zero_()

    # ---- one chunk

    def score(self, objective: Objective, begin: int, end: int) -> tuple[Tensor, Softmax]:
        """Product 1 of a chunk, its log-probs kept and shown to the objective."""
        x, softmax = self.softmax(begin, end)
        self.logprobs[begin:end] = softmax.logprobs
        objective.observe(begin, end, softmax.logprobs)
        return x, softmax

    def softmax(self, begin: int, end: int) -> tuple[Tensor, Softmax]:
        """Product 1 of a chunk: its rows x (R, D) and their softmax, E in the workspace."""
        x = self.head.widen(self.rows(self.hidden, begin, end))
        return x, self.head.softmax(x, self.target[begin:end], gradient=any(self.wanted))

    def accumulate(
        self, begin: int, end: int, x: Tensor, softmax: Softmax, coefficients: Tensor, into: Gradients
    ) -> None:
        """The gradient products of one chunk, for coefficients (end - begin,)."""
        row_scale = (coefficients * softmax.row_scale).to(self.head.dtype)
        if row_scale.device.type == "cpu" and not row_scale.any():
            self.skip(begin, end, into)
            return
        self.products(begin, end, x, softmax.exp, row_scale, into)

    def products(self, begin: int, end: int, x: Tensor, factor: Tensor, row_scale: Tensor, into: Gradients) -> None:
        """dX = diag(row_scale) factor W for these tokens; dW += factor^T diag(row_scale) x; likewise the bias."""
        if self.wanted.hidden:
            dx = self.head.grad_hidden(factor, row_scale).to(into.hidden.dtype)
            into.hidden.index_copy_(0, self.pack.index[begin:end], dx)
        if self.wanted.weight:
            self.head.add_grad_weight_(into.weight, factor, x, row_scale, first=not into.written)
        if self.wanted.bias:
            self.head.add_grad_bias_(into.bias, factor, row_scale)
        into.written = True

    def skip(self, begin: int, end: int, into: Gradients) -> None:
        """A chunk in which no token has a weight: its gradient is 0, and no product is taken."""
        if self.wanted.hidden:
            into.hidden.index_fill_(0, self.pack.index[begin:end], 0.0)

    def rows(self, tensor: Tensor, begin: int, end: int) -> Tensor:
        """These tokens' rows of one of the caller's tensors; a view where every token counts."""
        if self.pack.tokens == len(tensor):
            return tensor[begin:end]
        return tensor[self.pack.index[begin:end]]

    @property
    def row_bytes(self) -> int:
        return self.head.vocabulary * self.head.dtype.itemsize

    def reserve(self, chunks: list[tuple[int, int]]) -> None:
        self.head.reserve(max((end - begin for begin, end in chunks), default=0))
