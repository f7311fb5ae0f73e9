"""The right-to-left walk: an LM head, its loss's gradients and the log-probs, chunk by chunk, without the full logits.

The engine knows chunks and coefficients; it knows no loss and no device. A loss is an `Objective`: it takes the
log-probs of a chunk, and later returns the coefficient c_t = dL/d(-log p_t) of each of its tokens. The walk goes from
the last chunk to the first, so a coefficient may depend on all tokens to the right of its own in its sequence. A
chunk's logits are made once, and its two gradient products follow while they are in the workspace:

    E, log p = softmax(x W^T)        dX = diag(r) E W        dW += E^T diag(r) x        r = c * row_scale

`LogitsWalk` is the same walk for losses whose gradient in the logits is not a per-row scalar times E (an entropy bonus,
a divergence from a teacher). The chunk's logits stay as they are until the coefficients are known, and the gradient
then overwrites them.

The coefficients of a coupled loss are known once all tokens of their sequence are observed (PEAR's sequence level,
GSPO). Its chunks end where sequences end, and only a sequence longer than a chunk is special. If the loss is
`separable`, each coefficient is a part known now (`known_coefficients`) times one factor per sequence
(`pending_factor`). The first long sequence is then accumulated into dW with the known part, before dW holds anything
else, and dW is rescaled once the factor is known. For further long sequences, or if the loss is not separable, the
log-probs of all but the sequence's last chunk are made first (up to a fourth product).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pear_kernels.engine.head import Head, LogitsHead, Scores, Softmax
from pear_kernels.engine.objective import Coefficients, Objective, TeacherSource, present
from pear_kernels.engine.packing import Pack, with_chunk
from pear_kernels.engine.schedule import Chunk, Coupling, Schedule, Wanted, default_workspace, schedule
from pear_kernels.engine.sparsify import Choice, Sparsifier, compact_, say_once_that_all_is_kept


def grad_hidden_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of dX while the walk makes it: hidden's `dtype`, but float32 for float16, which has no coefficients of 1/N."""
    return torch.float32 if dtype == torch.float16 else dtype


@dataclass
class Gradients:
    """Where gradients are accumulated. Empty (0,) tensors stand for those that nobody wants."""

    hidden: Tensor  # (N, D): `grad_hidden_dtype`
    weight: Tensor  # (V, D): float32 (float64); rounded to the weight's dtype once, in the backward pass
    bias: Tensor  # (V,): like weight
    written: bool = False  # `weight` starts uninitialised: the first chunk writes it, later ones add to it


class Walk:
    """One call: which tokens, which head, which gradients, and the buffers they are accumulated in."""

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
        gradient_tolerance: float = 0.0,
    ):
        self.hidden = hidden  # (N, D), the caller's
        self.head = head
        self.target = pack.take(target)  # (n,)
        self.pack = pack
        self.wanted = wanted
        self.workspace_bytes = workspace_bytes or default_workspace(head.planned, head.dtype.itemsize)
        # no zeros: chunks write every row before anything reads it
        self.logprobs = torch.empty(pack.tokens, dtype=torch.float64, device=hidden.device)
        self.entropy = torch.empty_like(self.logprobs) if entropy else None  # (n,)
        self.divergence: Tensor | None = None  # (n,), of a `LogitsWalk` with a teacher
        self.top1 = torch.empty_like(self.logprobs)  # (n,) 0 or 1, as in `head.Softmax`
        self.sparsifier = Sparsifier(gradient_tolerance) if gradient_tolerance and any(wanted[:2]) else None
        if self.sparsifier is not None:
            head.separate_target = True
        # (n,): dW[target] is still to be reduced by this times x, where the head keeps the target's term apart from E
        self.target_scale: Tensor | None = None

        def buffer(shape: torch.Size, dtype: torch.dtype, is_wanted: bool) -> Tensor:
            return torch.empty(shape if is_wanted else (0,), dtype=dtype, device=hidden.device)

        self.grads = Gradients(
            buffer(hidden.shape, grad_hidden_dtype(hidden.dtype), wanted.hidden),
            buffer(head.weight.shape, head.dtype, wanted.weight),
            buffer(head.weight.shape[:1], head.dtype, wanted.bias).zero_(),
        )
        if pack.tokens < len(hidden):
            self.grads.hidden.zero_()  # no chunk visits ignored tokens, whose gradient is 0

    # ---- whole walks

    def run(self, objective: Objective) -> None:
        """Fills `logprobs`, and the gradients for a loss whose coefficients come from `objective`."""
        for how, chunks in self.start(objective).steps:
            if how == "visit":
                self.visit(objective, *chunks)
            elif how == "deferred":
                self.visit_deferred(objective, chunks)
            else:
                self.visit_twice(objective, chunks)
        self.finish(objective)

    def score_all(self, objective: Objective) -> None:
        """Fills `logprobs` (and `entropy`), and passes them to the objective. No gradient."""
        for _, chunks in self.start().steps:
            for begin, end in chunks:
                self.score(objective, begin, end, gradient=False)

    def start(self, objective: Objective | None = None) -> Schedule:
        """The schedule of the walk, and the workspace for it. The walk executes the schedule and nothing else."""
        coupling = None
        if objective is not None and objective.coupled:
            # a host sync, for the lengths: the only one that a coupled loss adds. A static pack may not sync
            known = any(self.wanted) and self.pack.counts is None
            coupling = Coupling(
                objective.separable,
                objective.scalable,
                self.pack.lengths.tolist() if known else None,
                objective.coupled_sequences() if known else None,
            )
        planned = schedule(
            self.pack.tokens,
            self.wanted,
            row_bytes=self.row_bytes(),
            workspace_bytes=self.workspace_bytes,
            coupling=coupling,
        )
        self.reserve(planned)
        return planned

    def row_bytes(self) -> int:
        """Bytes of workspace per row of a chunk."""
        return self.head.row_bytes(any(self.wanted))

    def reserve(self, planned: Schedule) -> None:
        """Allocates the workspace of all chunks."""
        self.head.reserve(planned.rows, planned.gradient)

    def finish(self, objective: Objective) -> None:
        """Completes the gradients after the last chunk."""
        scale = objective.rescale() if any(self.wanted) else None
        if scale is not None and self.grads.written:
            for values in (self.grads.hidden, self.grads.weight, self.grads.bias, self.target_scale):
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

    # ---- steps of a walk; chunks come from right to left

    def visit(self, objective: Objective, chunk: Chunk) -> None:
        """One chunk whose coefficients are known as soon as its log-probs are."""
        x, softmax = self.score(objective, *chunk, gradient=any(self.wanted))
        if any(self.wanted):
            self.accumulate(*chunk, x, softmax, objective.coefficients(*chunk))

    def visit_deferred(self, objective: Objective, chunks: list[Chunk]) -> None:
        """Chunks whose coefficients are known after the last: accumulated with their known part, then rescaled.

        dX is rescaled row by row. dW is rescaled as a whole, so it must hold this one sequence and the objective must
        be separable, or the head must be frozen.
        """
        for begin, end in chunks:
            x, softmax = self.score(objective, begin, end, gradient=True)
            # never skipped, so that dW is written; a factor for each token changes how much of a chunk each row is
            known, may_leave_out = objective.known_coefficients(begin, end), objective.separable
            self.accumulate(begin, end, x, softmax, known, may_skip=False, may_leave_out=may_leave_out)
        for i, (begin, end) in enumerate(chunks):
            exact = self.checked(begin, end, objective.pending_factor(begin, end))
            factor = exact.to(self.head.dtype)
            if self.sparsifier is not None:
                self.sparsifier.rescale(i - len(chunks), exact)
            if self.wanted.hidden:
                index = self.pack.index[begin:end]
                self.grads.hidden.index_copy_(0, index, self.grads.hidden[index].mul_(factor[:, None]))
            if self.target_scale is not None:
                self.target_scale[begin:end].mul_(factor)
        self.grads.weight.mul_(factor[0])
        self.grads.bias.mul_(factor[0])

    def visit_twice(self, objective: Objective, chunks: list[Chunk]) -> None:
        """Chunks whose coefficients are known after the last: log-probs of all but the last chunk are made first."""
        *earlier, last = chunks
        for begin, end in earlier:
            self.score(objective, begin, end, gradient=False)
        self.visit(objective, last)
        for begin, end in earlier:
            x, softmax = self.softmax(begin, end, gradient=True)
            self.accumulate(begin, end, x, softmax, objective.coefficients(begin, end))

    # ---- one chunk

    def score(self, objective: Objective, begin: int, end: int, *, gradient: bool) -> tuple[Tensor, Softmax | Scores]:
        """Product 1 of a chunk. Its log-probs (and entropies) are kept and passed to the objective."""
        x, softmax = self.softmax(begin, end, gradient=gradient, entropy=self.entropy is not None)
        if self.entropy is not None:
            self.entropy = with_chunk(self.entropy, begin, end, present(softmax.entropy))
        objective.observe(begin, end, softmax.logprobs, softmax.entropy)
        return x, softmax

    def softmax(
        self, begin: int, end: int, *, gradient: bool, entropy: bool = False
    ) -> tuple[Tensor, Softmax | Scores]:
        """Product 1 of a chunk: its rows x (R, D) and their softmax, E in the workspace if `gradient`."""
        x = self.rows(begin, end)
        softmax = self.head.softmax(x, self.target[begin:end], gradient=gradient, entropy=entropy)
        self.logprobs = with_chunk(self.logprobs, begin, end, softmax.logprobs)
        self.top1 = with_chunk(self.top1, begin, end, present(softmax.top1))
        return x, softmax

    def accumulate(
        self,
        begin: int,
        end: int,
        x: Tensor,  # (R, D)
        softmax: Softmax | Scores,
        coefficients: Tensor | Coefficients | None,
        *,
        may_skip: bool = True,
        may_leave_out: bool = True,
    ) -> None:
        """The gradient products of one chunk, for coefficients (R,), or for ones."""
        assert isinstance(softmax, Softmax)
        if isinstance(coefficients, Coefficients):
            raise TypeError("an objective that returns Coefficients must have on_logits = True")
        if coefficients is None:
            row_scale = softmax.row_scale.to(self.head.dtype)
        else:  # the float64 product and its rounding in one launch
            out = torch.empty_like(softmax.row_scale, dtype=self.head.dtype)
            row_scale = torch.mul(self.checked(begin, end, coefficients), softmax.row_scale, out=out)
        if may_skip and self.may_branch and not row_scale.any():
            self.skip(begin, end)
        else:
            choice = None
            if self.sparsifier is not None:
                may_sync = self.pack.counts is None
                if not may_sync:
                    say_once_that_all_is_kept()
                choice = self.sparsifier.choose(self.head, softmax, row_scale, may_leave_out and may_sync)
            self.products(begin, end, x, softmax.exp, row_scale, softmax.target_mass, choice)

    def checked(self, begin: int, end: int, coefficients: Tensor) -> Tensor:
        """An objective's (end - begin,), with 0 for ghosts."""
        if coefficients.shape != (end - begin,):
            raise ValueError(
                f"an objective must return one coefficient per token, of shape {(end - begin,)} for [{begin}, {end}), "
                f"got {tuple(coefficients.shape)}"
            )
        return self.pack.zero_ghosts(coefficients, begin, end)

    def products(
        self,
        begin: int,
        end: int,
        x: Tensor,  # (R, D)
        factor: Tensor,  # (R, V)
        row_scale: Tensor,  # (R,)
        target_mass: Tensor | None,  # (R,)
        choice: Choice | None = None,
    ) -> None:
        """dX = diag(row_scale) factor W for these tokens; dW += factor^T diag(row_scale) x; likewise the bias.

        With a `choice`, dX and dW are made of what it keeps of the factor, which overwrites the factor.
        """
        if self.wanted.bias:  # takes no product, so nothing is left out of it
            self.head.add_grad_bias_(self.grads.bias, factor, row_scale)
        kept = None if choice is None else compact_(self.head, factor, choice, self.wanted.hidden)
        if self.wanted.hidden:
            index, target = self.pack.index[begin:end], self.target[begin:end]
            self.head.write_grad_hidden_(self.grads.hidden, index, factor, row_scale, target, target_mass, kept)
        if self.wanted.weight:
            self.head.add_grad_weight_(self.grads.weight, factor, x, row_scale, not self.grads.written, kept)
        if target_mass is not None and self.wanted.head:
            if self.target_scale is None:
                # zeros where a chunk may be skipped, which writes nothing here
                made = torch.zeros if self.may_branch else torch.empty
                self.target_scale = made(self.pack.tokens, dtype=self.head.dtype, device=x.device)
            torch.mul(row_scale, target_mass, out=self.target_scale[begin:end])
        self.grads.written = True

    def skip(self, begin: int, end: int) -> None:
        """A chunk whose coefficients are all 0: its gradient is 0, and no product is taken."""
        if self.wanted.hidden:
            self.grads.hidden.index_fill_(0, self.pack.index[begin:end], 0.0)
        if self.sparsifier is not None:
            self.sparsifier.skip(end - begin, len(self.head.weight))

    def rows(self, begin: int, end: int) -> Tensor:
        """(R, D) hidden states of these tokens, as operand of a product."""
        return self.head.as_operand(self.pack.take(self.hidden, begin, end))

    @property
    def may_branch(self) -> bool:
        """Whether Python may branch on values: on a CPU, where that is no host sync, but not in a static pack."""
        return self.logprobs.device.type == "cpu" and self.pack.counts is None


class LogitsWalk(Walk):
    """The walk of losses with a gradient of their own in every logit, which needs its coefficients to be written.

        dL/dz_v = c (p_v - 1[v = y]) - h p_v (log p_v + H) + g dD/dz_v

    for c, h and g the coefficients of the NLL, the entropy H and the divergence D from a teacher.
    """

    head: LogitsHead

    def __init__(
        self,
        hidden: Tensor,
        head: LogitsHead,
        target: Tensor,
        pack: Pack,
        wanted: Wanted,
        workspace_bytes: int | None,
        *,
        entropy: bool = False,
        teacher: TeacherSource | None = None,
    ):
        super().__init__(hidden, head, target, pack, wanted, workspace_bytes, entropy=entropy)
        self.teacher = teacher
        self.divergence = None if teacher is None else torch.empty_like(self.logprobs)  # (n,)

    def row_bytes(self) -> int:
        return self.head.row_bytes(any(self.wanted)) + (0 if self.teacher is None else self.teacher.row_bytes())

    def reserve(self, planned: Schedule) -> None:
        super().reserve(planned)
        if self.teacher is not None:
            self.teacher.reserve(planned.rows)

    def softmax(self, begin: int, end: int, *, gradient: bool, entropy: bool = False) -> tuple[Tensor, Scores]:
        """Product 1 of a chunk (and the teacher's), the per-row results, and the logits in the workspace.

        A walk that keeps entropies makes them each time, since their gradient needs them again.
        """
        x = self.rows(begin, end)
        teacher = None if self.teacher is None else self.teacher.rows(begin, end)
        scores = self.head.scores(x, self.target[begin:end], entropy=self.entropy is not None, teacher=teacher)
        self.logprobs = with_chunk(self.logprobs, begin, end, scores.logprobs)
        self.top1 = with_chunk(self.top1, begin, end, scores.top1)
        if self.divergence is not None:
            self.divergence = with_chunk(self.divergence, begin, end, present(scores.divergence))
        return x, scores

    def accumulate(
        self,
        begin: int,
        end: int,
        x: Tensor,
        softmax: Softmax | Scores,
        coefficients: Tensor | Coefficients | None,
        *,
        may_skip: bool = True,
        may_leave_out: bool = True,
    ) -> None:
        """The gradient products of one chunk, of which nothing is left out."""
        assert isinstance(softmax, Scores)
        if not isinstance(coefficients, Coefficients):
            raise TypeError(f"an objective with on_logits must return Coefficients, got {type(coefficients).__name__}")
        coefficients.require(self.entropy, self.divergence)
        given = [None if part is None else self.checked(begin, end, part) for part in coefficients]
        if may_skip and self.may_branch and not any(part.any() for part in given if part is not None):
            self.skip(begin, end)
        else:
            dz, row_scale = self.head.gradient(softmax, *given)
            self.products(begin, end, x, dz, row_scale.to(self.head.dtype), None)
