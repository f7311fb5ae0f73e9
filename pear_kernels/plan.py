"""What a call will cost, before it runs: the engine's own schedule, and the products and bytes that follow from it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import torch

from pear_kernels import checks
from pear_kernels.backends.torch.head import temporary_bytes
from pear_kernels.engine.head import torch_row_bytes, triton_row_bytes
from pear_kernels.engine.schedule import Chunk, Coupling, Schedule, Wanted, default_workspace, schedule
from pear_kernels.engine.walk import grad_hidden_dtype
from pear_kernels.options import (
    LEVELS,
    HeadOptions,
    PEAROptions,
    PlanKeywords,
    check,
    gather,
    is_number,
    one_of,
    or_none,
    rule,
    takes,
)

CLASSES = PEAROptions, HeadOptions
TOKEN_BYTES = 28 * 8  # per-token numbers that are kept: positions, blocks, log-probs, ratios, sums, weights


@dataclass(frozen=True)
class Plan:
    """The schedule of one call (forward and backward), and its cost. `print` it for a table."""

    tokens: int  # N: the tokens that count; in a static pack, all of the caller's
    vocabulary: int  # V
    hidden_size: int  # D
    dtype: torch.dtype  # of hidden and weight
    level: str | None  # None: linear_logprobs
    backend: str  # "triton" or "torch"
    wanted: Wanted  # which gradients are made
    schedules: tuple[Schedule, ...]  # one walk; log-probs with a gradient take a second one in the backward pass

    workspace_bytes: int  # one chunk: its logits (Triton: E); on Triton also the operands of the gradient products
    grad_head_bytes: int  # dW and db in float32 (float64)
    grad_hidden_bytes: int  # dX
    temporary_bytes: int  # upper bound of everything else while chunks are walked
    rounded_bytes: int  # copies of dX and dW in their tensors' dtypes, made in the backward pass
    bytes_moved: int  # by the products alone, each reading its operands and writing its result once per chunk
    may_leave_out: bool = False  # by a gradient_tolerance: gradients' products, their FLOPs and bytes are the most
    gradient_kept: float | None = None  # the share of their work that `products_kept` is for

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """Every chunk [begin, end) whose logits are made, in order; a chunk that is visited twice is listed twice."""
        return tuple(chunk for walk in self.schedules for chunk in walk.visits)

    @property
    def rows(self) -> dict[str, int]:
        """Rows that go through each product: "logits", "hidden" (dX) and "weight" (dW)."""
        return {
            "logits": sum(walk.scored for walk in self.schedules),
            "hidden": self.tokens * self.wanted.hidden,
            "weight": self.tokens * self.wanted.weight,
        }

    @property
    def products(self) -> float:
        """Matrix products, in units of a full one of (N, V, D)."""
        return sum(self.rows.values()) / max(self.tokens, 1)

    @property
    def products_kept(self) -> float:
        """`products` where `gradient_kept` of the work of the gradients is done, in the last of the walks."""
        kept = 1.0 if self.gradient_kept is None else self.gradient_kept
        rows = self.rows
        return (rows["logits"] + kept * (rows["hidden"] + rows["weight"])) / max(self.tokens, 1)

    @property
    def flops(self) -> int:
        """Of the products, 2 V D per row. On a CPU, chunks whose weights all turn out to be 0 take fewer."""
        return sum(self.rows.values()) * self._row_flops

    @property
    def peak_bytes(self) -> int:
        """Upper bound of memory beside the inputs: while the walk runs, or while the backward pass rounds gradients."""
        grads = self.grad_head_bytes + self.grad_hidden_bytes
        walking = self.workspace_bytes + grads + self.temporary_bytes
        if self.level is None:  # rounds before the workspace is freed
            return walking + self.rounded_bytes
        return max(walking, grads + self.rounded_bytes)

    @property
    def _row_flops(self) -> int:
        return 2 * self.vocabulary * self.hidden_size

    def __str__(self) -> str:
        call = "linear_logprobs" if self.level is None else f"linear_pear_loss, {self.level} level"
        trained = " and ".join(["hidden"] * self.wanted.hidden + ["head"] * self.wanted.head)
        lines = [
            f"{call}: {self.tokens:,} tokens, vocabulary {self.vocabulary:,}, hidden size {self.hidden_size:,}, "
            f"{str(self.dtype).removeprefix('torch.')}, {self.backend}; gradients of {trained or 'nothing'}",
            *map(self._walk_line, self.schedules),
            "",
            f"{'product':<28}{'of N V D':>12}{'TFLOP':>12}",
        ]
        shares = {name: rows / max(self.tokens, 1) for name, rows in self.rows.items()}
        shares["together, at most" if self.may_leave_out else "together"] = self.products
        if self.gradient_kept is not None:
            shares[f"with {self.gradient_kept:g} of gradients"] = self.products_kept
        for name, share in shares.items():
            tflop = share * self.tokens * self._row_flops / 1e12
            lines.append(f"{_LABELS.get(name, name):<28}{share:>12.2f}{tflop:>12.3f}")
        lines += ["", f"{'memory beside the inputs':<40}{'MiB':>12}"]
        for name in ("workspace", "grad_head", "grad_hidden", "temporary", "rounded", "peak"):
            lines.append(f"{_LABELS[name]:<40}{getattr(self, name + '_bytes') / 2**20:>12,.1f}")
        lines += ["", f"{'moved by the products, at least':<40}{self.bytes_moved / 2**20:>12,.1f}"]
        return "\n".join(lines)

    @staticmethod
    def _walk_line(walk: Schedule) -> str:
        how = Counter(step.how for step in walk.steps)
        steps = ", ".join(f"{count:,} {_STEPS[name]}" for name, count in how.items())
        return f"chunks of at most {walk.rows:,} rows, from the last token to the first: {steps or 'none'}"


_LABELS = {
    "logits": "logits",
    "hidden": "gradient of hidden",
    "weight": "gradient of weight",
    "workspace": "workspace",
    "grad_head": "gradient of the head, accumulated",
    "grad_hidden": "gradient of hidden",
    "temporary": "temporaries, at most",
    "rounded": "gradients rounded in the backward pass",
    "peak": "peak, at most",
}
_STEPS = {
    "visit": "visited once",
    "deferred": "longer run scaled at its end",
    "twice": "longer run visited twice",
}


@takes(*CLASSES)
def plan(
    tokens: int,
    vocabulary: int,
    hidden_size: int,
    *,
    lengths: Sequence[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    level: str | None = PEAROptions.level,
    gradient: bool = True,
    train_head: bool = True,
    bias: bool = False,
    static: bool = False,
    device: str = "cuda",
    gradient_kept: float | None = None,
    **keywords: Unpack[PlanKeywords],
) -> Plan:
    """What a call of this shape will do and cost, from the code that schedules the call itself. Nothing runs.

    Args:
        tokens: N, the tokens that count (an ignored one costs a row of dX and nothing else).
        vocabulary: V.
        hidden_size: D.
        lengths: the tokens that count in each sequence, which sum to `tokens`; None: one sequence. They matter where
            weights are coupled: at level "sequence", with center, or with normalize "sequence".
        dtype: of hidden and weight.
        level: that of `linear_pear_loss`; None: `linear_logprobs`, whose backward pass makes the logits again. For
            `linear_policy_loss` and `linear_weighted_loss`: "token", but "sequence" for "gspo" and "iw-sft". (Losses of
            a `LogitsWalk`, with a teacher or an entropy bonus, have other chunks: not planned yet.)
        gradient: False: no gradient at all, as under `torch.no_grad()`.
        train_head: False: a frozen head, whose weight (and bias) need no gradient.
        bias: whether the head has one.
        static: the call is recorded into a CUDA graph: `tokens` are then all tokens, the ignored ones included.
        device: "cuda" or "cpu".
        gradient_kept: share, from 0 to 1, of the work of the gradients' products for which the table gets a line:
            `stats["gradient_kept"]` of a call with a gradient_tolerance.
        center, normalize, workspace_bytes, backend, gradient_tolerance: as in the call, whose other options cost
            nothing here. Without a backend: "triton" on "cuda" (except for float64), else "torch".

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it should be.
    """
    for name, value, least in (("tokens", tokens, 0), ("vocabulary", vocabulary, 2), ("hidden_size", hidden_size, 1)):
        if not (is_number(value, int) and value >= least):
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    lengths = [tokens] if lengths is None else list(lengths)
    if sum(lengths) != tokens or min(lengths, default=0) < 0:
        raise ValueError(
            f"lengths must be 0 or more and sum to tokens = {tokens}, got {lengths[:20]}, sum {sum(lengths)}"
        )
    if dtype not in checks.DTYPES:
        raise TypeError(f"dtype must be torch.float32, bfloat16, float16 or float64, got {dtype!r}")
    share = rule(lambda value: is_number(value) and 0 <= value <= 1, "be None, or a number from 0 to 1")
    check("gradient_kept", gradient_kept, or_none(share))
    check("level", level, or_none(one_of(LEVELS, "be None or one of")))
    pear, head = gather("plan", CLASSES, (), {"level": level or PEAROptions.level, **keywords})
    backend, workspace_bytes = head.backend, head.workspace_bytes
    if device not in ("cuda", "cpu"):
        raise ValueError(f'device must be "cuda" or "cpu", got {device!r}')
    if dtype == torch.float64 or backend is None:
        backend = "triton" if device == "cuda" and dtype != torch.float64 else "torch"
    sums = torch.float64 if dtype == torch.float64 else torch.float32  # dtype of the products' accumulators and of dW
    if backend == "triton":  # by the table of this machine's GPU, or of an H100 where there is none
        from pear_kernels.backends.triton import tiles  # which needs no triton

        gpu = torch.device("cuda" if torch.cuda.is_available() else "meta")
        choice = tiles.choose(tiles.architecture(gpu), dtype, hidden_size)

    def row_bytes(gradient: bool) -> int:
        if backend == "torch":
            return torch_row_bytes(vocabulary, sums.itemsize)
        plain, tile = choice.plain(gradient, dtype), (choice.softmax if gradient else choice.logprobs).vocabulary
        return triton_row_bytes(vocabulary, hidden_size, dtype.itemsize, gradient=gradient, plain=plain, tile=tile)

    # ---- the walks
    wanted = Wanted(gradient, gradient and train_head, gradient and train_head and bias)
    weight = torch.empty(vocabulary, hidden_size, device="meta")
    head_numbers = weight.numel() * wanted.weight + vocabulary * wanted.bias  # of dW and db

    def walk(wanted: Wanted) -> Schedule:
        return schedule(
            tokens,
            wanted,
            row_bytes=row_bytes(any(wanted)),
            workspace_bytes=workspace_bytes or default_workspace(weight, sums.itemsize),
            coupling=Coupling(pear.separable, True, None if static else lengths) if pear.coupled else None,
        )

    walks: tuple[Schedule, ...] = (walk(wanted),)
    if level is None and gradient:  # linear_logprobs: the forward pass alone comes first
        walks = walk(Wanted(False, False, False)), *walks

    # ---- their bytes
    rows, itemsize = max(walk.rows for walk in walks), dtype.itemsize
    grad_hidden_itemsize = grad_hidden_dtype(dtype).itemsize
    temporary = tokens * TOKEN_BYTES
    if backend == "torch":
        temporary += temporary_bytes(rows, vocabulary, hidden_size, itemsize, sums, head.gradient_tolerance > 0)
    rounded = itemsize * head_numbers if dtype != sums else 0
    if grad_hidden_itemsize != itemsize:
        rounded += itemsize * tokens * hidden_size * wanted.hidden

    # ---- what the products move
    cell = sums.itemsize if backend == "torch" else itemsize  # bytes of an element of E that a product reads or writes
    moved = 0
    for walk_ in walks:
        visits, chunks = len(walk_.visits), sum(len(step.chunks) for step in walk_.steps)
        written = tokens * walk_.gradient if backend == "triton" else walk_.scored
        moved += (
            visits * weight.numel() * itemsize + walk_.scored * hidden_size * itemsize + written * vocabulary * cell
        )
        if walk_.gradient and wanted.hidden:
            moved += chunks * weight.numel() * itemsize
            moved += tokens * (vocabulary * cell + hidden_size * grad_hidden_itemsize)
        if walk_.gradient and wanted.weight:  # the first chunk writes dW, the others read and write it
            moved += max(2 * chunks - 1, 0) * weight.numel() * sums.itemsize
            moved += tokens * (vocabulary * cell + hidden_size * itemsize)

    return Plan(
        *(tokens, vocabulary, hidden_size, dtype, level, backend, wanted, walks),
        workspace_bytes=max(walk.rows * row_bytes(walk.gradient) for walk in walks),
        grad_head_bytes=sums.itemsize * head_numbers,
        grad_hidden_bytes=tokens * hidden_size * grad_hidden_itemsize * wanted.hidden,
        temporary_bytes=temporary,
        rounded_bytes=rounded,
        bytes_moved=moved,
        may_leave_out=head.gradient_tolerance > 0 or gradient_kept is not None,
        gradient_kept=gradient_kept,
    )
