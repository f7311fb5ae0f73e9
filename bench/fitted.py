"""Synthetic inputs whose logits resemble a trained model's, for any N, D, V and device.

    z_tv = strength bias_v + scale s_t h_t . W_v        h Gaussian, W of norm 1, both of D numbers

`bias` falls with the id as in Zipf's law, and each token of the vocabulary is off that line by chance: ids are roughly,
not exactly, in order of frequency. `s_t` differs from row to row, so that some rows are sure and others are not. The
four constants of these two (`FITS`) were fitted to SmolLM2's logits on a text (`bench/real_logits.py`). `strength` and
`scale` are chosen for each shape, such that the mean entropy is SmolLM2's, and so is the share of products 2 and 3 that
is kept at a gradient_tolerance of 0.01. Targets are drawn from the softmax.

Hidden states and rows of the head have a large common part, as SmolLM2's have. It changes no probability. It does
change what leaving out a column costs: without it, rows that are left out would cancel each other by chance.

`python -m bench.fitted` prints the fit and draws it into bench/results/fitted.png.
"""

import argparse
import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import shapes
from bench.machine import ROOT
from bench.report import table
from bench.shapes import BEHAVIOR_TEMPERATURE, SHAPES, TEXTS, Inputs, Shape, sequences

TOLERANCES = (0.005, 0.01, 0.02, 0.05)
ROWS = 1024  # of a chunk, whose columns are chosen together: with more rows more columns are kept
FITTED_AT = 0.01  # the tolerance at which the share kept is SmolLM2's for every shape; at others it is near
PROBED = 256  # rows of which the entropy is
BLOCK = 512  # rows whose logits are in memory at a time
CCE_TILE, CCE_THRESHOLD = (128, 256), 2.0**-12  # tokens x columns
SHARED_HIDDEN, SHARED_WEIGHT, MEAN_LOGIT = 3.4, 0.93, 7.0  # SmolLM2's |mean of x|, |mean of W|, mean of x.W, if scaled


class Fit(NamedTuple):
    slope: float  # of bias over log(id + first)
    first: float
    scatter: float  # standard deviation of bias around that line
    spread: float  # standard deviation of log s_t


class Statistics(NamedTuple):
    entropy: float  # mean, in nats
    nll: float
    kept: tuple[float, ...]  # share of products 2 and 3, at each of `TOLERANCES`, for an unweighted mean
    tiles: float  # share of cut-cross-entropy's tiles that it would not skip, in its order of columns


FITS = {"code": Fit(1.344, 4.2, 2.282, 0.404), "samples": Fit(1.272, 7.1, 1.884, 0.25)}
MEASURED = {  # of SmolLM2, by `python -m bench.fitted`
    "code": Statistics(2.476, 2.581, (0.360, 0.256, 0.166, 0.078), 0.68),
    "samples": Statistics(3.003, 2.950, (0.464, 0.356, 0.251, 0.131), 0.93),
}


@torch.no_grad()
def make_inputs(shape: Shape, seed: int = 0) -> Inputs:
    """Inputs of `shape.inputs`, "fitted-code" or "fitted-samples"; behaviour is the same model at temperature 1.3."""
    text = shape.inputs.removeprefix("fitted-")
    fit, (N, D, V) = FITS[text], shape[:3]
    rng = torch.Generator(shape.device).manual_seed(seed)
    on_device = {"device": shape.device, "generator": rng}
    bias = fit.scatter * torch.randn(V, **on_device)
    bias -= fit.slope * (torch.arange(V, device=shape.device) + fit.first).log()
    bias -= bias.mean()
    hidden = torch.randn(N, D, dtype=shape.dtype, **on_device)
    hidden *= (fit.spread * torch.randn(N, 1, **on_device)).exp()
    weight = torch.randn(V, D, dtype=shape.dtype, **on_device)
    weight /= torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    hidden[:, :3] = weight[:, :3] = 0.0
    strength, scale = calibrate(MEASURED[text], F.linear(hidden[:ROWS], weight).float(), bias, rng)
    # three coordinates carry the bias, what rows of the head have in common, and what hidden states have
    weight[:, 0], weight[:, 1], weight[:, 2] = bias * (strength * D**-0.5), SHARED_WEIGHT, 0.0
    hidden *= scale
    hidden[:, 0], hidden[:, 1], hidden[:, 2] = D**0.5, MEAN_LOGIT / SHARED_WEIGHT, SHARED_HIDDEN * D**0.5
    target = torch.empty(N, dtype=torch.int64, device=shape.device)
    behavior_logprobs = torch.empty(N, device=shape.device)
    for begin in range(0, N, BLOCK):
        rows = slice(begin, begin + BLOCK)
        logits = F.linear(hidden[rows], weight).float()
        target[rows] = torch.multinomial(logits.softmax(1), 1, generator=rng).squeeze(1)
        behavior = torch.log_softmax(logits / BEHAVIOR_TEMPERATURE, 1)
        behavior_logprobs[rows] = behavior.gather(1, target[rows, None]).squeeze(1)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), target, behavior_logprobs, sequences(shape, seed))


def calibrate(wanted: Statistics, noise: Tensor, bias: Tensor, rng: torch.Generator) -> tuple[float, float]:
    """What to multiply `bias` (V,) and `noise` (R, V) by for the wanted share kept at `FITTED_AT` and the entropy."""

    def kept(strength: float) -> float:
        scale = bisect(lambda scale: entropy(bias * strength + noise[:PROBED] * scale), wanted.entropy, 1.0, 12.0)
        p = torch.softmax(bias * strength + noise * scale, 1)
        return kept_share(p.scatter_(1, torch.multinomial(p, 1, generator=rng), 0.0), FITTED_AT)

    strength = bisect(kept, wanted.kept[TOLERANCES.index(FITTED_AT)], 0.5, 2.0)
    scale = bisect(lambda scale: entropy(bias * strength + noise[:PROBED] * scale), wanted.entropy, 1.0, 12.0)
    return strength, scale


def entropy(logits: Tensor) -> float:
    log_p = torch.log_softmax(logits, 1)
    return -(log_p.exp() * log_p).sum(1).mean().item()


def bisect(falling: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where a function that falls is as `wanted`, to a hundredth of a factor of two or so."""
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if falling(middle) > wanted else (low, middle)
    return middle


# ---- what is fitted


@torch.no_grad()
def statistics(x: Inputs) -> Statistics:
    """Means over chunks of `ROWS` tokens."""
    entropy, nll, kept, tiles = [], [], [], []
    for begin in range(0, len(x.target), ROWS):
        target = x.target[begin : begin + ROWS, None]
        logits = F.linear(x.hidden[begin : begin + ROWS], x.weight).float()
        order = logits.mean(0).argsort(descending=True)
        log_p = torch.log_softmax(logits, 1)
        nll.append(-log_p.gather(1, target).mean())
        p = log_p.exp()
        entropy.append(-log_p.mul_(p).sum(1).mean())
        above = F.max_pool2d(p[None, :, order], CCE_TILE, ceil_mode=True) > CCE_THRESHOLD
        tiles.append(above.float().mean())
        p.scatter_(1, target, 0.0)
        kept.append(torch.tensor([kept_share(p, tolerance) for tolerance in TOLERANCES]))
    means = [torch.stack(values).mean(0).tolist() for values in (entropy, nll, kept, tiles)]
    return Statistics(means[0], means[1], tuple(means[2]), means[3])


def kept_share(p: Tensor, tolerance: float) -> float:
    """Share of p (R, V) in the rows and columns kept, for this tolerance and equal coefficients.

    Written independently of `pear_kernels/engine/sparsify.py`, and without its dense products where much is kept.
    """
    mass = p.sum(1, dtype=torch.float64)
    ordered, order = mass.sort()
    rows_left = int((ordered.cumsum(0) <= 0.1 * tolerance * mass.sum()).sum())
    left = ordered[:rows_left].sum()
    columns = p[order[rows_left:]].sum(0, dtype=torch.float64).sort().values
    columns_left = int((columns.cumsum(0) <= tolerance * mass.sum() - left).sum())
    return (1 - rows_left / len(mass)) * (1 - columns_left / len(columns))


# ---- the picture


@torch.no_grad()
def mean_probability(x: Inputs) -> Tensor:
    """(V,) of each token of the vocabulary, over all rows."""
    blocks = (F.linear(hidden, x.weight).float().softmax(1).sum(0) for hidden in x.hidden.split(BLOCK))
    return functools.reduce(Tensor.add_, blocks) / len(x.hidden)


def draw(found: dict[str, tuple[Statistics, Tensor]], path: Path) -> None:
    """By label: what is kept against the tolerance, and mean probabilities by rank and by id."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    for label, (of, probability) in found.items():
        style = {"linestyle": "-" if label.startswith("SmolLM2") else ":" if label.startswith("random") else "--"}
        style["color"] = "#8a94a6" if label.startswith("random") else "#c0562f" if "code" in label else "#2f6f8f"
        style["alpha"] = 0.5 if "V=" in label else 1.0
        axes[0].plot(
            TOLERANCES, of.kept, marker="o", label=f"{label}: entropy {of.entropy:.2f}, NLL {of.nll:.2f}", **style
        )
        V = len(probability)
        edges = torch.logspace(0, math.log10(V), 25).long().unique().tolist()
        middle = [math.sqrt(a * b) for a, b in itertools.pairwise(edges)]
        for axis, values in zip(axes[1:], (probability.sort(descending=True).values, probability), strict=True):
            axis.plot(middle, [values[a - 1 : b - 1].mean().item() for a, b in itertools.pairwise(edges)], **style)
    axes[0].set(xlabel="gradient_tolerance", ylabel="share of products 2 and 3 that is kept", xscale="log", ylim=(0, 1))
    axes[1].set(xlabel="rank", ylabel="mean probability", xscale="log", yscale="log", ylim=(1e-9, 1))
    axes[2].set(xlabel="id in the vocabulary", ylabel="mean probability", xscale="log", yscale="log", ylim=(1e-9, 1))
    axes[0].set_xticks(TOLERANCES, map(str, TOLERANCES))
    axes[0].minorticks_off()
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fitted", description="The fit, as a table and a picture.")
    parser.add_argument("--picture", type=Path, default=ROOT / "bench" / "results" / "fitted.png")
    arguments = parser.parse_args()
    of = {"random, variance 1": SHAPES["real-code"]._replace(tokens=ROWS, inputs="random")}
    for text in TEXTS:
        of[f"SmolLM2, {text}"] = SHAPES[f"real-{text}"]
        of[f"fitted to {text}"] = SHAPES[f"real-{text}"]._replace(tokens=ROWS, inputs=f"fitted-{text}")
    of["fitted to code, V=8192, D=64"] = Shape(ROWS, 64, 8192, inputs="fitted-code")
    found = {}
    for label, shape in of.items():
        x = shapes.make_inputs(shape)
        found[label] = statistics(x), mean_probability(x)
    head = ["", "entropy", "NLL", *(f"kept at {tolerance}" for tolerance in TOLERANCES), "tiles kept"]
    rows = [
        [label, f"{of.entropy:.2f}", f"{of.nll:.2f}", *(f"{kept:.3f}" for kept in of.kept), f"{of.tiles:.2f}"]
        for label, (of, _) in found.items()
    ]
    print("\n".join(table(head, rows)))
    draw(found, arguments.picture)


if __name__ == "__main__":
    main()
