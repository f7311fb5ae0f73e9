"""How exact are loss, dX and dW in float32, and log-probs of bf16 inputs, against float64?

Three kinds of targets, as training meets them: random ones; peaked ones, of which the model is nearly sure, with 1 - p
from 1e-3 to 1e-8; unlikely ones, down to log p = -60. The reference is float64 throughout, its PEAR weights come from
`pear_kernels.reference`, and it shares no code with what it judges. Errors are norms relative to the reference's norm.
"""

import argparse
import itertools
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import machine
from bench.peers import PEERS
from bench.shapes import Inputs, Shape
from pear_kernels import linear_logprobs
from pear_kernels.reference import naive_weights

SHAPE = Shape(512, 512, 32000, torch.float32, "cpu")
SEQUENCE = 128
TARGETS = ("random", "peaked", "unlikely")
LEFT_OUT = {"bare"}  # computes no loss


def make_inputs(kind: str, seed: int = 0) -> Inputs:
    """float32 inputs whose targets have the wanted probabilities."""
    rng = torch.Generator().manual_seed(seed)
    N, D, V = SHAPE.tokens, SHAPE.hidden, SHAPE.vocabulary
    weight = torch.randn(V, D, generator=rng)
    target = torch.randint(V, (N,), generator=rng)
    noise = torch.randn(N, D, generator=rng) * D**-0.5  # adds about 1 to the variance of every logit
    if kind == "random":
        hidden = noise
    else:
        # along x = a W[y] / |W[y]| the target's logit is a |W[y]| and the others have variance a^2, with the noise
        # a^2 + 0.09: log sum_{v != y} exp(z_v) = log V + (a^2 + 0.09) / 2
        norm = weight[target].norm(dim=1)
        others = math.log(V) + 0.09 / 2
        if kind == "peaked":  # a |W[y]| - log sum = log(p / (1 - p)) = q
            q = torch.linspace(math.log(1e3), math.log(1e8), N)[torch.randperm(N, generator=rng)]
            along = norm - (norm.square() - 2 * (others + q)).sqrt()
        else:  # a |W[y]| - log sum = log p
            logp = -torch.linspace(12, 60, N)[torch.randperm(N, generator=rng)]
            along = norm - (norm.square() - 2 * (others + logp)).sqrt()
        hidden = along[:, None] * weight[target] / norm[:, None] + 0.3 * noise
    logprobs = exact_logprobs(hidden, weight, target)
    behavior_logprobs = (logprobs + 0.02 + 0.1 * torch.randn(N, generator=rng)).clamp(max=0.0).float()
    bounds = torch.arange(0, N + 1, SEQUENCE, dtype=torch.int32)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), target, behavior_logprobs, bounds)


@torch.no_grad()
def exact_logprobs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """float64 log p, without the cancellation of log_softmax at p near 1."""
    logits = F.linear(hidden.double(), weight.double())
    others = logits - logits.gather(1, target[:, None])
    others.scatter_(1, target[:, None], -math.inf)
    return -F.softplus(others.logsumexp(1), threshold=math.inf)


class Exact:
    """Float64 losses and gradients for one set of inputs, at any level."""

    @torch.no_grad()
    def __init__(self, x: Inputs):
        self.x = x
        self.hidden, self.weight = x.hidden.double(), x.weight.double()
        self.logprobs = exact_logprobs(self.hidden, self.weight, x.target)
        # dL/dz = G / N * (p - onehot), and p_y - 1 = expm1(log p) keeps its digits
        self.softmax = torch.log_softmax(F.linear(self.hidden, self.weight), 1).exp_()
        self.softmax.scatter_(1, x.target[:, None], torch.expm1(self.logprobs)[:, None])

    @torch.no_grad()
    def at(self, level: str | None) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, dX and dW of PEAR at this level, or of the plain mean."""
        weights = torch.ones_like(self.logprobs)
        if level is not None:
            for begin, end in itertools.pairwise(self.x.cu_seqlens.tolist()):
                behavior_logprobs = self.x.behavior_logprobs[begin:end].double()
                weights[begin:end] = naive_weights(self.logprobs[begin:end], behavior_logprobs, level)
        scale = weights / len(weights)
        loss = -(scale * self.logprobs).sum()
        dx = (self.softmax @ self.weight) * scale[:, None]
        return loss, dx, self.softmax.t() @ (self.hidden * scale[:, None])


def relative(value: Tensor, reference: Tensor) -> float:
    return ((value.double() - reference).norm() / reference.norm()).item()


def errors() -> list[dict]:
    """Of every peer that runs here, on every kind of target."""
    rows = []
    for kind in TARGETS:
        x = make_inputs(kind)
        exact = Exact(x)
        references = {level: exact.at(level) for level in (None, "token", "block", "sequence")}
        span = [exact.logprobs.min().item(), exact.logprobs.max().item()]
        gap = torch.expm1(exact.logprobs).neg()
        for name, peer in PEERS.items():
            if name in LEFT_OUT or peer.unavailable(SHAPE):
                continue
            x.clear()
            loss = peer.run(x)
            found = loss, x.hidden.grad, x.weight.grad
            of = dict(zip(("loss", "dX", "dW"), map(relative, found, references[peer.level]), strict=True))
            about = {"targets": kind, "logprobs": span, "one_minus_p": [gap.min().item(), gap.max().item()]}
            rows.append({"peer": name, **of, **about})
            print(f"{kind:9} {name:14} " + "  ".join(f"{key} {value:8.1e}" for key, value in of.items()), flush=True)
    return rows


def bf16_logprob_error() -> list[dict]:
    """Root mean square error of log-probs when hidden and weight are bf16, over the three kinds of targets together."""
    ways = {"ours": linear_logprobs, "naive": _naive_logprobs, "trl": _trl_logprobs}
    squares = dict.fromkeys(ways, 0.0)
    for kind in TARGETS:
        x = make_inputs(kind)
        hidden, weight = x.hidden.detach().bfloat16(), x.weight.detach().bfloat16()
        reference = exact_logprobs(hidden, weight, x.target)
        for name, way in ways.items():
            with torch.no_grad():
                squares[name] += (way(hidden, weight, x.target).double() - reference).square().mean().item()
    rows = [{"peer": name, "rms": math.sqrt(total / len(TARGETS))} for name, total in squares.items()]
    for row in rows:
        print(f"bf16 log-probs {row['peer']:9} rms {row['rms']:8.1e}", flush=True)
    return rows


def _naive_logprobs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return torch.log_softmax(F.linear(hidden, weight).float(), 1).gather(1, target[:, None]).squeeze(1)


def _trl_logprobs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 32768, None, 1.0, ())[0]


def far_targets(distance: float = 200.0) -> dict:
    """Targets whose logit lies `distance` under the row's largest: exp(distance) is no float32. Errors of ours."""
    x = make_inputs("random")
    with torch.no_grad():
        logits = F.linear(x.hidden.double(), x.weight.double())
        gap = logits.amax(1) - logits.gather(1, x.target[:, None]).squeeze(1)
        x.hidden.mul_((distance / gap).float()[:, None])
    references = Exact(x).at(None)
    x.clear()
    loss = PEERS["unweighted"].run(x)
    found = loss, x.hidden.grad, x.weight.grad
    row = dict(zip(("loss", "dX", "dW"), map(relative, found, references), strict=True))
    row["finite"] = all(bool(value.isfinite().all()) for value in found)
    print(f"z_v - z_y = {distance:.0f}: {row}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    result = {"errors": errors(), "bf16_logprobs": bf16_logprob_error(), "far_targets": far_targets()}
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine.facts(), **result}, indent=1))


if __name__ == "__main__":
    main()
