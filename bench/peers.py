"""What is measured: each peer is one function from `Inputs` to a loss, with gradients left in hidden and weight.

A peer either computes PEAR's weighted loss (`level` says which) or the plain mean of the NLL (`level` is None), since
no other library has the weights; the naive way and ours are here as both.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.shapes import Inputs, Shape
from pear_kernels import linear_logprobs, linear_pear_loss, ops, pear_weights
from pear_kernels.cpu import Head
from pear_kernels.engine import Walk, Wanted, default_workspace
from pear_kernels.objectives import FixedCoefficients
from pear_kernels.packing import chunk_rows, cut, pack_tokens

# ---- the usual way, and the least there is to do


def naive(x: Inputs) -> Tensor:
    """PEAR at token level with full logits, log_softmax, gather: what one writes without a library."""
    logits = F.linear(x.hidden, x.weight).float()
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, x.target[:, None]).squeeze(1)
    weights = pear_weights(logprobs, x.behavior_logprobs, cu_seqlens=x.cu_seqlens)
    loss = -(weights * logprobs).mean()
    loss.backward()
    return loss.detach()


def naive_nll(x: Inputs) -> Tensor:
    """The same without weights, by PyTorch's own cross-entropy."""
    loss = F.cross_entropy(F.linear(x.hidden, x.weight).float(), x.target)
    loss.backward()
    return loss.detach()


@torch.no_grad()
def bare(x: Inputs) -> Tensor:
    """The three products in our chunks and nothing else: logits, dX, dW. No loss; the gradients are not gradients."""
    vocabulary = x.weight.shape[0]
    accumulator = torch.float64 if x.hidden.dtype == torch.float64 else torch.float32
    rows = chunk_rows(default_workspace(x.weight, accumulator.itemsize), vocabulary * accumulator.itemsize)
    chunks = cut(0, len(x.hidden), rows)
    buffer = x.hidden.new_empty(max(end - begin for begin, end in chunks), vocabulary)
    dx, dw = torch.empty_like(x.hidden), torch.empty_like(x.weight)
    for begin, end in reversed(chunks):
        hidden, logits = x.hidden[begin:end], buffer[: end - begin]
        torch.mm(hidden, x.weight.t(), out=logits)
        torch.mm(logits, x.weight, out=dx[begin:end])
        torch.addmm(dw, logits.t(), hidden, beta=0 if end == len(x.hidden) else 1, out=dw)
    x.hidden.grad, x.weight.grad = dx, dw
    return x.hidden.new_zeros(())


# ---- ours


def ours(x: Inputs, level: str) -> Tensor:
    loss = linear_pear_loss(
        x.hidden, x.weight, x.target, x.behavior_logprobs, cu_seqlens=x.cu_seqlens, level=level
    ).loss
    loss.backward()
    return loss.detach()


class Unweighted(torch.autograd.Function):
    """The same walk with every coefficient 1/N: what our pass costs before there is any PEAR in it."""

    @staticmethod
    def forward(ctx, hidden, weight, target, cu_seqlens):
        pack = pack_tokens(target != -100, cu_seqlens)
        head = Head(weight, None, 1.0, None, hidden.dtype)
        walk = Walk(hidden, head, target, pack, Wanted(True, True, False), None)
        walk.run(FixedCoefficients(walk.logprobs.new_full((pack.tokens,), 1 / pack.tokens)))
        ctx.save_for_backward(walk.grads.hidden, walk.grads.weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return -walk.logprobs.mean()

    @staticmethod
    def backward(ctx, upstream):
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(ops.scaled(gradient, upstream, dtype) for gradient, dtype in pairs), None, None


def ours_unweighted(x: Inputs) -> Tensor:
    loss = Unweighted.apply(x.hidden, x.weight, x.target, x.cu_seqlens)
    loss.backward()
    return loss.detach()


def ours_logprobs(x: Inputs) -> Tensor:
    """Per-token log-probs and a loss of one's own on top: four products."""
    loss = -linear_logprobs(x.hidden, x.weight, x.target).mean()
    loss.backward()
    return loss.detach()


# ---- other libraries


def torch_chunked(x: Inputs) -> Tensor:
    """PyTorch's own, in chunks as it chooses them."""
    options = torch.nn.LinearCrossEntropyOptions()
    loss = F.linear_cross_entropy(x.hidden, x.weight, x.target, options=options)
    loss.backward()
    return loss.detach()


def trl_chunked(x: Inputs) -> Tensor:
    """TRL's autograd function with the vocabulary tile and the outputs that its SFT loss uses."""
    from trl.kernels import ChunkedLogProbFunction

    logprobs, *_ = ChunkedLogProbFunction.apply(x.hidden, x.weight, None, x.target, 1.0, 32768, None, 1.0, ())
    loss = -logprobs.mean()
    loss.backward()
    return loss.detach()


def liger(x: Inputs) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)(x.weight, x.hidden, x.target)
    loss.backward()
    return loss.detach()


def cut_cross_entropy(x: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    loss = linear_cross_entropy(x.hidden, x.weight, x.target)
    loss.backward()
    return loss.detach()


def quack(x: Inputs) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    loss = chunked_linear_cross_entropy(x.hidden, x.weight, x.target)
    loss.backward()
    return loss.detach()


# ---- the list


class Peer(NamedTuple):
    label: str
    run: Callable[[Inputs], Tensor]
    level: str | None = None  # PEAR's level, or None: the plain mean
    package: str = "torch"  # whose version the result carries
    needs_gpu: bool = False

    def unavailable(self, shape: Shape) -> str | None:
        """Why it cannot run here, or None."""
        if shape.device == "cuda" and not torch.cuda.is_available():
            return "the shape needs a CUDA device"
        if self.needs_gpu and shape.device != "cuda":
            return f"{self.package} has GPU kernels only"
        if self.run is torch_chunked and not hasattr(F, "linear_cross_entropy"):
            return f"torch {torch.__version__} has no F.linear_cross_entropy"
        if self.version() is None:
            return f"{self.package} is not installed"
        return None

    def version(self) -> str | None:
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


OURS = "pear-kernels"
PEERS = {
    "naive": Peer("naive, PEAR token", naive, "token"),
    "naive-nll": Peer("naive, F.cross_entropy", naive_nll),
    "bare": Peer("three bare products, our chunks", bare),
    "pear-token": Peer("ours, PEAR token", lambda x: ours(x, "token"), "token", OURS),
    "pear-block": Peer("ours, PEAR block", lambda x: ours(x, "block"), "block", OURS),
    "pear-sequence": Peer("ours, PEAR sequence", lambda x: ours(x, "sequence"), "sequence", OURS),
    "unweighted": Peer("ours, unweighted", ours_unweighted, None, OURS),
    "logprobs": Peer("ours, log-probs + own loss", ours_logprobs, None, OURS),
    "torch": Peer("F.linear_cross_entropy, chunked", torch_chunked),
    "trl": Peer("TRL ChunkedLogProbFunction", trl_chunked, None, "trl"),
    "liger": Peer("Liger fused linear CE", liger, None, "liger-kernel", True),
    "cce": Peer("cut-cross-entropy", cut_cross_entropy, None, "cut-cross-entropy", True),
    "quack": Peer("QuACK chunked linear CE", quack, None, "quack-kernels", True),
}
