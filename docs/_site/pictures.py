"""`python docs/_site/pictures.py`: draws docs/pictures/ anew, from response.json and from `pear_kernels.plan`."""

import json
import sys
from pathlib import Path

import torch

import pear_kernels
from pear.pictures import plt, write_whole
from pear.pictures import png as as_png

HERE = Path(__file__).resolve().parent
STUDENTS = {"300": "a student far behind (300 steps)", "500": "a student close behind (500 steps)"}
WRITER = "600"
COLORS = {"token": "#00897b", "block": "#ef6c00", "sequence": "#5e35b1"}
# NVIDIA H100 SXM, from its data sheet: dense bfloat16 products, and memory. Nothing here was measured.
PEAK_FLOPS, PEAK_BYTES = 989e12, 3.35e12
SHAPE = (8192, 151936, 4096)  # N, V, D


def main(folder: Path = HERE.parent / "pictures") -> None:
    response = {name: torch.tensor(values) for name, values in read()["logprobs"].items()}
    write_whole(
        {
            folder / "weights.png": as_png(weights_along(response)),
            folder / "gamma.png": as_png(gammas(response)),
            folder / "roofline.png": as_png(roofline()),
        }
    )


def read() -> dict:
    return json.loads((HERE / "response.json").read_text())


def weights_along(logprobs: dict[str, torch.Tensor]) -> plt.Figure:
    """log G at the three levels, under two students."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for (steps, title), axis in zip(STUDENTS.items(), axes, strict=True):
        student, behavior = logprobs[steps], logprobs[WRITER]
        for level, color in COLORS.items():
            log_weight = pear_kernels.pear_weights(student, behavior, level=level, block_size=16).log()
            label = "block of 16" if level == "block" else level
            axis.step(range(1, len(student) + 1), log_weight, where="mid", label=label, color=color, linewidth=1.4)
        delta = (student - behavior).clamp(-0.08, 0.3)
        axis.set_title(f"{title}\nmean delta {delta.mean():+.3f}", fontsize=10)
        bounds(axis)
        axis.set_xlabel("position t in the response")
    axes[0].set_ylabel("log G")
    axes[0].legend(fontsize=9, loc="upper left", bbox_to_anchor=(0.0, 0.92))
    return figure


def gammas(logprobs: dict[str, torch.Tensor]) -> plt.Figure:
    """log G at token level for several gammas, under the student close behind."""
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for gamma, color in ((1.0, "#004d40"), (0.999, "#00897b"), (0.99, "#4db6ac"), (0.95, "#b2dfdb")):
        log_weight = pear_kernels.pear_weights(logprobs["500"], logprobs[WRITER], gamma=gamma).log()
        axis.plot(range(1, len(log_weight) + 1), log_weight, label=f"gamma {gamma:g}", color=color, linewidth=1.4)
    bounds(axis)
    axis.set(xlabel="position t in the response", ylabel="log G, token level")
    axis.legend(fontsize=9, loc="lower right")
    return figure


def bounds(axis) -> None:
    """The ends of log_weight_clip, and plain SFT at 0."""
    for height, style in ((5, "--"), (0, ":"), (-10, "--")):
        axis.axhline(height, linestyle=style, color="gray", linewidth=0.8)
    axis.set_ylim(-10.8, 5.8)


def cost(workspace_bytes: int | None) -> tuple[int, float, float]:
    """Rows of a chunk, FLOP and bytes of the three products of SHAPE in bfloat16."""
    plan = pear_kernels.plan(*SHAPE, workspace_bytes=workspace_bytes, backend="triton")
    return max(end - begin for begin, end in plan.chunks), plan.flops, plan.bytes_moved


def roofline() -> plt.Figure:
    """Where chunks of several sizes lie under the roof of one GPU: arithmetic, no measurement."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    intensity = torch.logspace(1.3, 3.7, 200)
    axis.plot(intensity, (intensity * PEAK_BYTES).clamp(max=PEAK_FLOPS) / 1e12, color="gray")
    axis.axvline(PEAK_FLOPS / PEAK_BYTES, color="gray", linestyle=":", linewidth=0.8)
    for workspace in (2**26, 2**27, 2**28, None, 2**33):
        rows, flops, moved = cost(workspace)
        reached = min(PEAK_FLOPS, flops / moved * PEAK_BYTES) / 1e12
        default = workspace is None
        axis.plot(flops / moved, reached, "o", color=COLORS["block" if default else "token"])
        label = f"{rows} rows" + (", the default" if default else "")
        place = (-40, 7) if default else (4, -14)
        axis.annotate(label, (flops / moved, reached), xytext=place, textcoords="offset points", fontsize=9)
    axis.set(xscale="log", yscale="log", xlabel="FLOP for each byte moved", ylabel="TFLOP/s, at most")
    axis.set_ylim(50, 1500)
    n, v, d = SHAPE
    axis.set_title(f"three products, N={n}, V={v}, D={d}, bfloat16: data-sheet roof of an H100", fontsize=10)
    return figure


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
