"""The right-to-left walk: an LM head, its loss's gradients and the log-probs, chunk by chunk, without the full logits.

The engine knows chunks and coefficients; it knows no loss and no device. What it asks of a loss is an `Objective`:
take the log-probs of a chunk, later say the coefficient c_t = dL/d(-log p_t) of each of its tokens. A coefficient may
depend on all tokens to the right of its own in its sequence, because the walk goes from the last chunk to the first;
so a chunk's logits are made once, and its two gradient products follow while they are still there:

    E, log p = softmax(x W^T)        dX = diag(r) E W        dW += E^T diag(r) x        r = c * row_scale

A loss that is `coupled` knows a coefficient only when it has seen all of the token's sequence (PEAR's sequence level,
GSPO). Its chunks end where sequences end. If it is `separable` too, a sequence has one coefficient, and one longer than
a chunk is deferred: dW is gathered with c = 1 and scaled once c is known. The first such sequence does that in dW
itself, before anything else is there; a further one needs a (V, D) buffer of its own. Where the workspace has no room
for that, or the loss is not separable, the log-probs of all but the sequence's last chunk are made first (up to a
fourth product).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pear_kernels.head import Head, Softmax
from pear_kernels.packing import Pack
from pear_kernels.schedule import Chunk, Schedule, Wanted, default_workspace, schedule


class Objective(Protocol):
    """A loss, to the engine. Bounds are [begin, end) in the pack's compact order."""

    coupled: bool  # a coefficient depends on all tokens of its sequence
    separable: bool  # of a coupled loss: a sequence's tokens share one coefficient

    def observe(self, begin: int, end: int, logprobs: Tensor) -> None:
        """The log-probs (end - begin,) of these tokens; called once for each token, right to left in a sequence."""

    def coefficients(self, begin: int, end: int) -> Tensor:
        """(end - begin,) c_t = dL/d(-log p_t), of tokens that were observed."""


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


class Walk:
    """One call: which tokens, which head, which gradients, and the buffers they are gathered in."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        target: Tensor,
        pack: Pack,
        wanted: Wanted,
        workspace_bytes: int | None,
        *,
        entropy: bool = False,
    ):
        self.hidden = hidden  # (N, D), the caller's
        self.head = head
        self.target = pack.take(target)  # (n,)
        self.pack = pack
        self.wanted = wanted
        self.workspace_bytes = workspace_bytes or default_workspace(head.weight, head.dtype.itemsize)
        self.logprobs = torch.zeros(pack.tokens, dtype=torch.float64, device=hidden.device)
        self.entropy = torch.zeros_like(self.logprobs) if entropy else None  # (n,)
        self.target_scale: Tensor | None = None  # (n,): dW[target] less this times x, if the head keeps that apart
        grad_dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype

        def buffer(shape: tuple[int, ...], dtype: torch.dtype, is_wanted: bool) -> Tensor:
            return torch.empty(shape if is_wanted else (0,), dtype=dtype, device=hidden.device)

        self.grads = Gradients(
            buffer(tuple(hidden.shape), grad_dtype, wanted.hidden),
            buffer(tuple(head.weight.shape), head.dtype, wanted.weight),
            buffer(tuple(head.weight.shape[:1]), head.dtype, wanted.bias).zero_(),
        )
        if pack.tokens < len(hidden):
            self.grads.hidden.zero_()  # ignored tokens have no gradient, and no chunk ever visits them

    # ---- whole walks

    def run(self, objective: Objective) -> None:
        """Fills `logprobs`, and the gradients for a loss whose coefficients come from `objective`."""
        for how, chunks in self.start(objective).steps:
            if how == "visit":
                self.visit(objective, *chunks)
            elif how == "deferred":
                self.visit_deferred(objective, chunks, self.grads)
            elif how == "own buffer":
                own = self.grads.own_head()
                self.visit_deferred(objective, chunks, own)
                self.grads.add_head_(own)
            else:
                self.visit_twice(objective, chunks)
        self.finish()

    def score_all(self, objective: Objective) -> None:
        """Fills `logprobs` (and `entropy`), and shows them to the objective. No gradient."""
        for _, chunks in self.start().steps:
            for begin, end in chunks:
                self.score(objective, begin, end, gradient=False)

    def run_dense(self, of_nll: Tensor, of_entropy: Tensor) -> None:
        """Gradients for known coefficients (n,) on -log p and on the entropy, which rewrite the whole chunk."""
        for _, chunks in self.start(dense=True).steps:
            for begin, end in chunks:
                x = self.rows(begin, end)
                dz, row_scale = self.head.entropy_gradient(
                    x, self.target[begin:end], of_nll[begin:end], of_entropy[begin:end]
                )
                self.products(begin, end, x, dz, row_scale.to(self.head.dtype), None, self.grads)
        self.finish()

    def start(self, objective: Objective | None = None, *, dense: bool = False) -> Schedule:
        """The plan of the walk, and the workspace for it. Only what is planned here runs."""
        coupled = objective is not None and objective.coupled
        # lengths leave the device here: the one thing a coupled loss waits for. A static pack may not
        known = coupled and any(self.wanted) and self.pack.counts is None
        planned = schedule(
            self.pack.tokens,
            self.wanted,
            row_bytes=self.head.row_bytes(any(self.wanted), dense),
            workspace_bytes=self.workspace_bytes,
            coupled=coupled,
            separable=not coupled or objective.separable,
            lengths=self.pack.lengths.tolist() if known else None,
            head_bytes=self.head.dtype.itemsize * (self.grads.weight.numel() + self.grads.bias.numel()),
        )
        self.head.reserve(planned.rows, planned.gradient, dense)
        return planned

    def finish(self) -> None:
        """What is left when every chunk has passed."""
        if not self.grads.written:
            self.grads.weight.zero_()
        elif self.target_scale is not None:
            self.head.subtract_targets_(
                self.grads.weight if self.wanted.weight else None,
                self.grads.bias if self.wanted.bias else None,
                self.hidden,
                self.pack.index,
                self.target,
                self.target_scale,
            )

    # ---- steps of a walk; chunks come from the right to the left

    def visit(self, objective: Objective, chunk: Chunk) -> None:
        """One chunk whose coefficients are known as soon as its log-probs are."""
        x, softmax = self.score(objective, *chunk, gradient=any(self.wanted))
        if any(self.wanted):
            self.accumulate(*chunk, x, softmax, objective.coefficients(*chunk), self.grads)

    def visit_deferred(self, objective: Objective, chunks: list[Chunk], into: Gradients) -> None:
        """Chunks whose coefficients are known after the last: gradients with c = 1, then scaled.

        Those of the hidden states row by row. Those of the head as a whole, so only one sequence may be in `into`, and
        the objective must be separable (or the head frozen).
        """
        for begin, end in chunks:
            x, softmax = self.score(objective, begin, end, gradient=True)
            row_scale = softmax.row_scale.to(self.head.dtype)  # never skipped, so that `into` is written
            self.products(begin, end, x, softmax.exp, row_scale, softmax.target_mass, into)
        for begin, end in chunks:
            coefficients = objective.coefficients(begin, end).to(self.head.dtype)
            if self.wanted.hidden:
                index = self.pack.index[begin:end]
                into.hidden.index_copy_(0, index, into.hidden[index].mul_(coefficients[:, None]))
            if self.target_scale is not None:
                self.target_scale[begin:end].mul_(coefficients)
        into.weight.mul_(coefficients[0])
        into.bias.mul_(coefficients[0])

    def visit_twice(self, objective: Objective, chunks: list[Chunk]) -> None:
        """Chunks whose coefficients are known after the last: log-probs of all but that one first, which goes once."""
        *earlier, last = chunks
        for begin, end in earlier:
            self.score(objective, begin, end, gradient=False)
        self.visit(objective, last)
        for begin, end in earlier:
            x, softmax = self.softmax(begin, end, gradient=True)
            self.accumulate(begin, end, x, softmax, objective.coefficients(begin, end), self.grads)

    # ---- one chunk

    def score(self, objective: Objective, begin: int, end: int, *, gradient: bool) -> tuple[Tensor, Softmax]:
        """Product 1 of a chunk, its log-probs (and entropies) kept and shown to the objective."""
        x, softmax = self.softmax(begin, end, gradient=gradient, entropy=self.entropy is not None)
        if self.entropy is not None:
            self.entropy[begin:end] = softmax.entropy
        objective.observe(begin, end, softmax.logprobs)
        return x, softmax

    def softmax(self, begin: int, end: int, *, gradient: bool, entropy: bool = False) -> tuple[Tensor, Softmax]:
        """Product 1 of a chunk: its rows x (R, D) and their softmax, E in the workspace if `gradient`."""
        x = self.rows(begin, end)
        softmax = self.head.softmax(x, self.target[begin:end], gradient=gradient, entropy=entropy)
        self.logprobs[begin:end] = softmax.logprobs
        return x, softmax

    def accumulate(
        self, begin: int, end: int, x: Tensor, softmax: Softmax, coefficients: Tensor, into: Gradients
    ) -> None:
        """The gradient products of one chunk, for coefficients (end - begin,)."""
        row_scale = (coefficients * softmax.row_scale).to(self.head.dtype)
        if self.may_look and not row_scale.any():
            self.skip(begin, end, into)
        else:
            self.products(begin, end, x, softmax.exp, row_scale, softmax.target_mass, into)

    def products(
        self,
        begin: int,
        end: int,
        x: Tensor,  # (R, D)
        factor: Tensor,  # (R, V)
        row_scale: Tensor,  # (R,)
        target_mass: Tensor | None,  # (R,)
        into: Gradients,
    ) -> None:
        """dX = diag(row_scale) factor W for these tokens; dW += factor^T diag(row_scale) x; likewise the bias."""
        if self.wanted.hidden:
            self.head.write_grad_hidden_(
                into.hidden, self.pack.index[begin:end], factor, row_scale, self.target[begin:end], target_mass
            )
        if self.wanted.weight:
            self.head.add_grad_weight_(into.weight, factor, x, row_scale, first=not into.written)
        if self.wanted.bias:
            self.head.add_grad_bias_(into.bias, factor, row_scale)
        if target_mass is not None and self.wanted.head:
            if self.target_scale is None:
                self.target_scale = torch.zeros(self.pack.tokens, dtype=self.head.dtype, device=x.device)
            self.target_scale[begin:end] = row_scale * target_mass
        into.written = True

    def skip(self, begin: int, end: int, into: Gradients) -> None:
        """A chunk in which no token has a weight: its gradient is 0, and no product is taken."""
        if self.wanted.hidden:
            into.hidden.index_fill_(0, self.pack.index[begin:end], 0.0)

    def rows(self, begin: int, end: int) -> Tensor:
        """(R, D) hidden states of these tokens, as operand of a product."""
        return self.head.widen(self.pack.take(self.hidden, begin, end))

    @property
    def may_look(self) -> bool:
        """Whether a number may be read back without a wait: on a CPU, but not where a GPU's walk is played through."""
        return self.logprobs.device.type == "cpu" and self.pack.counts is None
