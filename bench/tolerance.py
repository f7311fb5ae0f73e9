"""`python -m bench.tolerance`: what `gradient_tolerance` saves and what it costs, on a trained model's own logits.

Inputs are those of `bench.real_logits`, float32. Times are forward and backward of PEAR at token level, in rounds that
take the methods in turn: medians, and the median of the ratios within a round. Memory is the high-water mark of a
process of its own above inputs and gradients. Errors are ||G - G64|| / ||G64|| of dX and dW against float64, over three
losses (plain NLL, PEAR at token level, DFT), each with coefficients that are the same for every method.

Beside ours: the naive loss, also in bfloat16, whose error everybody accepts; the rule of cut-cross-entropy (a tile of
128 tokens by 256 columns is skipped if no entry of the gradient of the logits exceeds 2^-12, columns sorted by their
mean logit), computed in float32; and ours without the correction of dX.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from unittest import mock

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import machine
from bench.fitted import CCE_TILE, TOLERANCES
from bench.memory import resident, settle
from bench.peers import full_logits_nll, ours, weighted
from bench.real_logits import real_inputs
from bench.report import table
from bench.shapes import TEXTS, Inputs
from bench.store import write_text_whole
from pear_kernels import linear_logprobs, linear_pear_loss, linear_weighted_loss
from pear_kernels.backends.torch.head import Head

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

CURVE = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)  # of the picture
CCE_EXPONENTS = (8, 10, 12, 14, 16)  # thresholds 2^-n; cut-cross-entropy has 2^-12
LOSSES = ("nll", "pear", "dft")
NAIVE, BF16, EXACT, CCE = "naive", "naive, bfloat16", "ours, exact", "cut-cross-entropy's rule"
ROWS = 512  # of logits at a time


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tolerance", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="around the methods (default 7)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--results", type=Path, default=machine.ROOT / "bench" / "results")
    parser.add_argument("--note", default="", help="what a reader of the table should know, in a line")
    parser.add_argument("--child", nargs=2, metavar=("TEXT", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    if arguments.child:
        print(extra_bytes(*arguments.child))
        return
    found = {text: measure(text, arguments.rounds) for text in TEXTS}
    facts = machine.facts("cpu")
    folder = arguments.results.resolve() / machine.folder_name(facts)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"machine": facts, "note": arguments.note, "texts": found}
    write_text_whole(folder / "tolerance.json", json.dumps(content, indent=1) + "\n")
    write_text_whole(folder / "tolerance.md", report(facts, found, arguments.note))
    draw(found, folder / "tolerance.png")
    print((folder / "tolerance.md").read_text())


METHODS = {
    NAIVE: weighted(full_logits_nll),
    EXACT: ours,
    **{f"ours, {t:g}": functools.partial(ours, gradient_tolerance=t) for t in TOLERANCES},
}


def measure(text: str, rounds: int) -> dict:
    x = real_inputs(text)
    return {
        "nll": -linear_logprobs(x.hidden.detach(), x.weight.detach(), x.target).mean().item(),
        "seconds": times(x, rounds),
        "bytes": {method: memory(text, method) for method in METHODS},
        "errors": {loss: errors(x, loss) for loss in LOSSES},
    }


def times(x: Inputs, rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {method: [] for method in METHODS}
    for i in range(rounds + 1):  # the first round warms up
        for method, run in METHODS.items():
            x.clear()
            begin = time.perf_counter()
            run(x)
            if i:
                found[method].append(time.perf_counter() - begin)
    x.clear()
    return found


def memory(text: str, method: str) -> int:
    command = [sys.executable, "-m", "bench.tolerance", "--child", text, method]
    return int(subprocess.run(command, cwd=machine.ROOT, check=True, capture_output=True, text=True).stdout.split()[-1])


def extra_bytes(text: str, method: str) -> int:
    """High-water mark of one call above inputs and gradients; the first tokens of the text have warmed up."""
    x = real_inputs(text)
    few = slice(0, 32)
    bounds = torch.tensor([0, 32], dtype=torch.int32)
    METHODS[method](Inputs(x.hidden[few], x.weight, x.target[few], x.behavior_logprobs[few], bounds))
    x.clear()
    before = settle()
    METHODS[method](x)
    return resident("VmHWM") - before - x.hidden.nbytes - x.weight.nbytes


# ---- errors


def errors(x: Inputs, loss: str) -> dict[str, dict[str, float]]:
    """By method: relative errors "dX" and "dW", and "kept", the share of the work of products 2 and 3."""
    hidden, weight = x.hidden.detach(), x.weight.detach()

    def run(dtype: torch.dtype, tolerance: float = 0.0) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
        h, w = (tensor.to(dtype).detach().requires_grad_() for tensor in (hidden, weight))  # leaves of their own
        if loss == "pear":
            found = linear_pear_loss(
                h, w, x.target, x.behavior_logprobs, cu_seqlens=x.cu_seqlens, gradient_tolerance=tolerance
            )
        else:
            weighting = "none" if loss == "nll" else loss
            found = linear_weighted_loss(h, w, x.target, weighting=weighting, gradient_tolerance=tolerance)
        found.loss.backward()
        assert h.grad is not None and w.grad is not None
        return h.grad, w.grad, found.stats, found.weights / len(x.target)

    dX, dW, _, coefficients = run(torch.float64)

    def of(grads: tuple[Tensor, Tensor], kept: float) -> dict[str, float]:
        off = [((found - exact).norm() / exact.norm()).item() for found, exact in zip(grads, (dX, dW), strict=True)]
        return {"dX": off[0], "dW": off[1], "kept": kept}

    h, w = (tensor.bfloat16().requires_grad_() for tensor in (hidden, weight))
    (F.cross_entropy(F.linear(h, w).float(), x.target, reduction="none") * coefficients).sum().backward()
    found = {BF16: of((h.grad, w.grad), 1.0), EXACT: of(run(torch.float32)[:2], 1.0)}
    pictured = loss == "pear"
    for corrected in (True, False) if pictured else (True,):
        without = mock.patch.object(Head, "mean_row", lambda self, mass: torch.zeros_like(self.weight[0]))
        for tolerance in sorted({*TOLERANCES, *CURVE}) if pictured else TOLERANCES:
            with nullcontext() if corrected else without:
                *grads, stats, _ = run(torch.float32, tolerance)
            name = f"ours, {tolerance:g}" + ("" if corrected else ", without the correction")
            found[name] = of(tuple(grads), stats["gradient_kept"].item())
            found[name]["left out"] = stats["gradient_left_out"].item()
    for exponent in CCE_EXPONENTS if pictured else (12,):
        found[f"{CCE}, 2^-{exponent}"] = of(*cce_rule(hidden, weight, x.target, coefficients, 2.0**-exponent))
    return found


def cce_rule(
    hidden: Tensor, weight: Tensor, target: Tensor, coefficients: Tensor, threshold: float
) -> tuple[tuple[Tensor, Tensor], float]:
    """dX and dW without the tiles in which no |p - 1[v = y]| exceeds the threshold, and the share of tiles kept."""
    h, w, coefficients = hidden, weight, coefficients.to(hidden.dtype)
    order = (h.mean(0) @ w.T).argsort(descending=True)
    w, place = w[order], order.argsort()[target]
    dX, dW, kept = torch.empty_like(h), torch.zeros_like(w), []
    for rows in torch.arange(len(h)).split(ROWS):
        g = (h[rows] @ w.T).softmax(1)
        g[torch.arange(len(rows)), place[rows]] -= 1
        tiles = F.max_pool2d(g.abs()[None], CCE_TILE, ceil_mode=True)[0] > threshold
        kept.append(tiles.double().mean())
        g *= tiles.repeat_interleave(CCE_TILE[0], 0)[: len(g)].repeat_interleave(CCE_TILE[1], 1)[:, : g.shape[1]]
        g *= coefficients[rows, None]
        dX[rows] = g @ w
        dW += g.T @ h[rows]
    return (dX, torch.empty_like(dW).index_copy_(0, order, dW)), torch.stack(kept).mean().item()


# ---- results


def report(facts: dict, found: dict[str, dict], note: str) -> str:
    lines = [
        "# Gradients that leave out what does not count",
        "",
        *(f"- {key}: {value}" for key, value in facts.items()),
    ]
    lines += [f"- note: {note}"] if note else []
    lines += ["", *(line.strip() for line in __doc__.split("\n\n", 1)[1].strip().splitlines())]
    head = ["", "work of products 2 and 3", "s", "of exact", "of naive", "extra memory, MiB", "dX error", "dW error"]
    for text, measured in found.items():
        lines += ["", f"## {text}: mean NLL {measured['nll']:.2f} nats", ""]
        rows = []
        for method in [NAIVE, BF16, EXACT, *list(METHODS)[2:], f"{CCE}, 2^-12"]:
            row, taken = [method], measured["seconds"].get(method)
            off = [measured["errors"][loss].get(method) for loss in LOSSES]
            row.append(span([each["kept"] for each in off if each], ".2f"))
            if taken:
                row.append(f"{median(taken):.2f}")
                for other in (EXACT, NAIVE):
                    pairs = zip(taken, measured["seconds"][other], strict=True)
                    row.append(f"{median(own / its for own, its in pairs):.2f}")
                row.append(f"{measured['bytes'][method] / 2**20:.0f}")
            else:
                row += [""] * 4
            rows.append([*row, *(span([each[grad] for each in off if each], ".1e") for grad in ("dX", "dW"))])
        lines += table(head, rows)
    return "\n".join([*lines, "", "![error against work](tolerance.png)"]) + "\n"


def span(values: list[float], style: str) -> str:
    """The lowest and the highest, or the one value that both are written as."""
    return " to ".join(dict.fromkeys(format(end, style) for end in (min(values), max(values)))) if values else ""


def draw(found: dict[str, dict], path: Path) -> None:
    """Error of dX against the work of products 2 and 3, with PEAR's weights."""
    figure, axes = plt.subplots(1, len(found), figsize=(6 * len(found), 4), sharey=True, layout="constrained")
    for axis, (text, measured) in zip(axes, found.items(), strict=True):
        errors = measured["errors"]["pear"]
        for label, names, style in (
            ("ours", [f"ours, {t:g}" for t in CURVE], "o-"),
            ("ours, without the correction of dX", [f"ours, {t:g}, without the correction" for t in CURVE], "s--"),
            (f"{CCE}, 2^-8 to 2^-16", [f"{CCE}, 2^-{n}" for n in CCE_EXPONENTS], "^:"),
        ):
            axis.plot(
                [errors[name]["kept"] for name in names], [errors[name]["dX"] for name in names], style, label=label
            )
        axis.axhline(errors[BF16]["dX"], color="#8a94a6", linewidth=1, label="naive loss in bfloat16, all of the work")
        axis.set(title=f"{text}, mean NLL {measured['nll']:.2f}", xlabel="share of the work of products 2 and 3")
        axis.set(xlim=(0, 1), yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative error of dX")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
