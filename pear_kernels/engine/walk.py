"""The right-to-left walk: an LM head, its loss's gradients and the log-probs, chunk by chunk, without the full logits.

The engine knows chunks and coefficients; it knows no loss and no device. What it asks of a loss is an `Objective`:
take the log-probs of a chunk, later say the coefficient c_t = dL/d(-log p_t) of each of its tokens. A coefficient may
depend on all tokens to the right of its own in its sequence, because the walk goes from the last chunk to the first;
so a chunk's logits are made once, and its two gradient products follow while they are still there:

    E, log p = softmax(x W^T)        dX = diag(r) E W        dW += E^T diag(r) x        r = c * row_scale

`LogitsWalk` is the same walk for losses whose gradient in the logits is no row scale times E (an entropy bonus, a
divergence from a teacher). There the chunk's logits stay as they are until the coefficients are known, and are then
overwritten by the gradient.

A loss that is `coupled` knows a coefficient only when it has seen all of the token's sequence (PEAR's sequence level,
GSPO). Its chunks end where sequences end. If it is `separable` too, a coefficient is a number known at once (`own`)
times one of the whole sequence (`factor`), and a sequence longer than a chunk is deferred: dW is gathered with the
former and scaled once the latter is known. The first such sequence does that in dW itself, before anything else is
there; a further one needs a (V, D) buffer of its own. Where the workspace has no room for that, or the loss is not
separable, the log-probs of all but the sequence's last chunk are made first (up to a fourth product).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pear_kernels.engine.head import Head, LogitsHead, Scores, Softmax
from pear_kernels.engine.objective import Coefficients, Objective, TeacherSource
from pear_kernels.engine.packing import Pack
from pear_kernels.engine.schedule import Chunk, Schedule, Wanted, default_workspace, schedule


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
        self.workspace_bytes = workspace_bytes or default_workspace(head.planned, head.dtype.itemsize)
        self.logprobs = torch.zeros(pack.tokens, dtype=torch.float64, device=hidden.device)
        self.entropy = torch.zeros_like(self.logprobs) if entropy else None  # (n,)
        self.divergence: Tensor | None = None  # (n,), of a `LogitsWalk` with a teacher
        self.top1 = torch.zeros_like(self.logprobs)  # (n,) 0 or 1, as in `head.Softmax`
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
        self.finish(objective)

    def score_all(self, objective: Objective) -> None:
        """Fills `logprobs` (and `entropy`), and shows them to the objective. No gradient."""
        for _, chunks in self.start().steps:
            for begin, end in chunks:
                self.score(objective, begin, end, gradient=False)

    def start(self, objective: Objective | None = None) -> Schedule:
        """The plan of the walk, and the workspace for it. Only what is planned here runs."""
        coupled = objective is not None and objective.coupled
        # lengths leave the device here: the one thing a coupled loss waits for. A static pack may not
        known = coupled and any(self.wanted) and self.pack.counts is None
        planned = schedule(
            self.pack.tokens,
            self.wanted,
            row_bytes=self.row_bytes(),
            workspace_bytes=self.workspace_bytes,
            coupled=coupled,
            separable=not coupled or objective.separable,
            scalable=not coupled or objective.scalable,
            lengths=self.pack.lengths.tolist() if known else None,
            coupled_sequences=objective.coupled_sequences() if known else None,
            head_bytes=self.head.dtype.itemsize
            * (self.wanted.weight * self.head.planned.numel() + self.wanted.bias * self.head.planned[0]),
        )
        self.reserve(planned)
        return planned

    def row_bytes(self) -> int:
        """Bytes of workspace that a row of a chunk takes."""
        return self.head.row_bytes(any(self.wanted))

    def reserve(self, planned: Schedule) -> None:
        """The workspace of all chunks."""
        self.head.reserve(planned.rows, planned.gradient)

    def finish(self, objective: Objective) -> None:
        """What is left when every chunk has passed."""
        scale = objective.rescale() if any(self.wanted) else None
        if scale is not None and self.grads.written:
            gathered = self.grads.hidden, self.grads.weight, self.grads.bias, self.target_scale
            for values in gathered:
                if values is not None:
                    values.mul_(scale)
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
        """Chunks whose coefficients are known after the last: gradients with the objective's `own`, then scaled.

        Those of the hidden states row by row. Those of the head as a whole, so only one sequence may be in `into`, and
        the objective must be separable (or the head frozen).
        """
        for begin, end in chunks:
            x, softmax = self.score(objective, begin, end, gradient=True)
            # never skipped, so that `into` is written
            self.accumulate(begin, end, x, softmax, objective.known_coefficients(begin, end), into, may_skip=False)
        for begin, end in chunks:
            factor = objective.pending_factor(begin, end).to(self.head.dtype)
            if self.wanted.hidden:
                index = self.pack.index[begin:end]
                into.hidden.index_copy_(0, index, into.hidden[index].mul_(factor[:, None]))
            if self.target_scale is not None:
                self.target_scale[begin:end].mul_(factor)
        into.weight.mul_(factor[0])
        into.bias.mul_(factor[0])

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
        objective.observe(begin, end, softmax.logprobs, softmax.entropy)
        return x, softmax

    def softmax(self, begin: int, end: int, *, gradient: bool, entropy: bool = False) -> tuple[Tensor, Softmax]:
        """Product 1 of a chunk: its rows x (R, D) and their softmax, E in the workspace if `gradient`."""
        x = self.rows(begin, end)
        softmax = self.head.softmax(x, self.target[begin:end], gradient=gradient, entropy=entropy)
        self.logprobs[begin:end] = softmax.logprobs
        self.top1[begin:end] = softmax.top1
        return x, softmax

    def accumulate(
        self,
        begin: int,
        end: int,
        x: Tensor,
        softmax: Softmax,
        coefficients: Tensor | None,
        into: Gradients,
        *,
        may_skip: bool = True,
    ) -> None:
        """The gradient products of one chunk, for coefficients (end - begin,), or for ones."""
        row_scale = softmax.row_scale if coefficients is None else coefficients * softmax.row_scale
        row_scale = row_scale.to(self.head.dtype)
        if may_skip and self.may_look and not row_scale.any():
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
        return self.head.as_operand(self.pack.take(self.hidden, begin, end))

    @property
    def may_look(self) -> bool:
        """Whether a number may be read back without a wait: on a CPU, but not where a GPU's walk is played through."""
        return self.logprobs.device.type == "cpu" and self.pack.counts is None


class LogitsWalk(Walk):
    """The walk of losses with a gradient of their own in every logit, which needs its coefficients to be written.

        dL/dz_v = c (p_v - 1[v = y]) - h p_v (log p_v + H) + g dD/dz_v

    for c, h and g the coefficients of the NLL, the entropy H and the divergence D from a teacher.
    """

    head: LogitsHead

    def __init__(self, *arguments, teacher: TeacherSource | None = None, **options):
        super().__init__(*arguments, **options)
        self.teacher = teacher
        self.divergence = None if teacher is None else torch.zeros_like(self.logprobs)  # (n,)

    def row_bytes(self) -> int:
        return self.head.row_bytes(any(self.wanted)) + (0 if self.teacher is None else self.teacher.row_bytes())

    def reserve(self, planned: Schedule) -> None:
        super().reserve(planned)
        if self.teacher is not None:
            self.teacher.reserve(planned.rows)

    def softmax(self, begin: int, end: int, *, gradient: bool, entropy: bool = False) -> tuple[Tensor, Scores]:
        """Product 1 of a chunk (and the teacher's), what comes of its rows, and its logits in the workspace.

        A walk that keeps entropies makes them each time, since their gradient needs them again.
        """
        x = self.rows(begin, end)
        teacher = None if self.teacher is None else self.teacher.rows(begin, end)
        scores = self.head.scores(x, self.target[begin:end], entropy=self.entropy is not None, teacher=teacher)
        self.logprobs[begin:end] = scores.logprobs
        self.top1[begin:end] = scores.top1
        if teacher is not None:
            self.divergence[begin:end] = scores.divergence
        return x, scores

    def accumulate(
        self,
        begin: int,
        end: int,
        x: Tensor,
        scores: Scores,
        coefficients: Coefficients,
        into: Gradients,
        *,
        may_skip: bool = True,
    ) -> None:
        """The gradient products of one chunk."""
        given = [factor for factor in coefficients if factor is not None]
        if may_skip and self.may_look and not any(factor.any() for factor in given):
            self.skip(begin, end, into)
        else:
            dz, row_scale = self.head.gradient(scores, *coefficients)
            self.products(begin, end, x, dz, row_scale.to(self.head.dtype), None, into)
