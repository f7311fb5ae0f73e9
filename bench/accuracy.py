"""Inputs of known difficulty, and what is exact for them, in float64.

Four kinds of targets, as training meets them: random ones; peaked ones, of which the model is nearly sure, with 1 - p
from 1e-3 to 1e-8; unlikely ones, down to p = 1e-26; and far ones, whose logit lies 200 under the row's largest, so that
exp of the difference is no float32. The reference is float64 throughout, its PEAR weights come from
`pear_kernels.reference`, and it shares no code with what it judges. Errors are norms relative to the reference's norm.
"""

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.shapes import Inputs, Shape
from pear_kernels.reference import naive_weights

SHAPE = Shape(256, 512, 32000)
SEQUENCES = 2
BLOCK = 256  # rows whose float64 logits are in memory at a time
KINDS = ("random", "peaked", "unlikely", "far")
FAR = 200.0


def make_inputs(kind: str, shape: Shape, seed: int = 0) -> Inputs:
    """Inputs whose targets have the wanted probabilities; in half precision, as far as its rounding lets them."""
    rng = torch.Generator().manual_seed(seed)
    N, D, V = shape.tokens, shape.hidden, shape.vocabulary
    weight = torch.randn(V, D, generator=rng)
    target = torch.randint(V, (N,), generator=rng)
    noise = torch.randn(N, D, generator=rng) * D**-0.5  # adds about 1 to the variance of every logit
    if kind == "random":
        hidden = noise
    elif kind == "far":
        logits = F.linear(noise.to(shape.device), weight.to(shape.device)).cpu()
        gap = logits.amax(1) - logits.gather(1, target[:, None]).squeeze(1)
        hidden = noise * (FAR / gap)[:, None]
    else:
        # along x = a W[y] / |W[y]| the target's logit is a |W[y]| and the others have variance a^2, with the noise
        # a^2 + 0.09: log sum_{v != y} exp(z_v) = log V + (a^2 + 0.09) / 2
        norm = weight[target].norm(dim=1)
        others = math.log(V) + 0.09 / 2
        if kind == "peaked":  # a |W[y]| - log sum = log(p / (1 - p)) = q
            q = torch.linspace(math.log(1e3), math.log(1e8), N)[torch.randperm(N, generator=rng)]
            along = norm - (norm.square() - 2 * (others + q)).clamp(min=0).sqrt()
        else:  # a |W[y]| - log sum = log p
            logp = -torch.linspace(12, 60, N)[torch.randperm(N, generator=rng)]
            along = norm - (norm.square() - 2 * (others + logp)).sqrt()
        hidden = along[:, None] * weight[target] / norm[:, None] + 0.3 * noise
    hidden, weight, target = hidden.to(shape.device, shape.dtype), weight.to(shape.device, shape.dtype), target
    target = target.to(shape.device)
    spread = 0.02 + 0.1 * torch.randn(N, generator=rng)
    behavior_logprobs = (exact_logprobs(hidden, weight, target) + spread.to(shape.device)).clamp(max=0.0).float()
    bounds = torch.tensor([N * i // SEQUENCES for i in range(SEQUENCES + 1)], dtype=torch.int32, device=shape.device)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), target, behavior_logprobs, bounds)


@torch.no_grad()
def exact_logprobs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """float64 log p, without the cancellation of log_softmax at p near 1."""
    logits = F.linear(hidden.double(), weight.double())
    others = logits - logits.gather(1, target[:, None])
    others.scatter_(1, target[:, None], -math.inf)
    return -F.softplus(others.logsumexp(1), threshold=math.inf)


class Exact:
    """Float64 losses and gradients for one set of inputs, at any level, from blocks of rows."""

    @torch.no_grad()
    def __init__(self, x: Inputs):
        self.x = x
        self.hidden, self.weight = x.hidden.double(), x.weight.double()
        of_block = [exact_logprobs(self.hidden[rows], self.weight, x.target[rows]) for rows in self.blocks()]
        self.logprobs = torch.cat(of_block)

    def blocks(self) -> Iterator[slice]:
        return (slice(begin, begin + BLOCK) for begin in range(0, len(self.hidden), BLOCK))

    def grad_logits(self, rows: slice) -> Tensor:
        """(R, V) d(-log p)/dz = p - onehot, where p_y - 1 = expm1(log p) keeps its digits."""
        softmax = torch.log_softmax(F.linear(self.hidden[rows], self.weight), 1).exp_()
        return softmax.scatter_(1, self.x.target[rows, None], torch.expm1(self.logprobs[rows])[:, None])

    @torch.no_grad()
    def at(self, level: str | None) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, dX and dW of PEAR at this level, of the mean weighted by p ("dft"), or of the plain mean (None)."""
        weights = torch.ones_like(self.logprobs)
        if level == "dft":
            weights = self.logprobs.exp()
        elif level is not None:
            for begin, end in itertools.pairwise(self.x.cu_seqlens.tolist()):
                behavior_logprobs = self.x.behavior_logprobs[begin:end].double()
                weights[begin:end] = naive_weights(self.logprobs[begin:end], behavior_logprobs, level)
        scale = weights / len(weights)
        loss = -(scale * self.logprobs).sum()
        dx, dw = torch.empty_like(self.hidden), torch.zeros_like(self.weight)
        for rows in self.blocks():
            grad = self.grad_logits(rows).mul_(scale[rows, None])
            torch.mm(grad, self.weight, out=dx[rows])
            dw.addmm_(grad.t(), self.hidden[rows])
        return loss, dx, dw


def relative(value: Tensor, reference: Tensor) -> float:
    return ((value.double() - reference).norm() / reference.norm()).item()


def rms(value: Tensor, reference: Tensor) -> float:
    return (value.double() - reference).square().mean().sqrt().item()
