"""The pictures of `pear compare`: what runs logged over training, and pass@k before and after."""

import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from pear.intervals import all_ks, evaluations_of, interval_of
from pear.pictures import plt, save_figure
from pear.runs import Run

PASSES = "passes.png"
CURVES = {"rl": "curves_rl.png", "sft": "curves_sft.png"}
TITLES = {PASSES: "pass@k before and after", CURVES["rl"]: "RL over training", CURVES["sft"]: "SFT over training"}
ZERO_IS_NONE = ("pear/kl_ref",)  # logged as 0 by a run that has no reference
SMOOTH_FROM, SMOOTH_SHARE = 50, 25  # points from which a curve is smoothed, over this part of it


# ---------------------------------------------------------------------------------------------------------------------
# Logs


def series(run: Run, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one quantity in a run's log, both (n,); entries without a finite number are left out."""
    entries = [entry for entry in run.log if _finite(entry.get(key))]
    if key in ZERO_IS_NONE and not any(entry[key] for entry in entries):
        return [], []
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def last(run: Run, key: str) -> float | None:
    values = series(run, key)[1]
    return values[-1] if values else None


def _rollout_keys(runs: Sequence[Run]) -> dict[str, str]:
    """pear/pass@k of the rollouts, for every k in any log, and how to name it; k is the group's size or 1."""
    found = {int(match[1]) for run in runs for e in run.log for key in e if (match := _ROLLOUT.fullmatch(key))}
    return {f"pear/pass@{k}": f"pass@{k}" for k in sorted(found, reverse=True)}


_ROLLOUT = re.compile(r"pear/pass@(\d+)")


class Panel(NamedTuple):
    """One axes: quantities of the log, by key, with the name that tells them apart where there are several."""

    title: str
    label: str
    keys: dict[str, str]


def _panels(runs: Sequence[Run]) -> list[Panel]:
    """What to draw of runs of one kind; only panels for which some run has data."""
    if runs[0].kind == "sft":
        panels = [
            Panel("training data, each batch before its step", "NLL (nats a token)", {"pear/nll": "NLL"}),
            Panel("held-out data", "NLL (nats a token)", {"eval_pear/nll": "NLL"}),
            Panel("wrong answers", "NLL (nats a token)", {"pear/wrong_nll": "NLL"}),
            Panel("divergence from the teacher", "nats a token", {"pear/divergence": "divergence"}),
            Panel("weights", "mean weight of a token", {"pear/weight_mean": "mean"}),
            Panel("effective sample size", "share of tokens", {"pear/effective_sample_size": "share"}),
        ]
    else:
        clipped = {"pear/clip_low": "low", "pear/clip_high": "high"}
        panels = [
            Panel("reward", "mean reward", {"reward": "reward"}),
            Panel("pass@k of the rollouts", "share of prompts", _rollout_keys(runs)),
            Panel("KL from the policy that drew", "nats a token", {"pear/kl_old": "KL"}),
            Panel("KL to the reference", "nats a token", {"pear/kl_ref": "KL"}),  # apart: it may be 100 times as large
            Panel("completion length", "tokens", {"completions/mean_length": "mean length"}),
            Panel("clipped", "share of tokens", clipped),
            Panel("entropy", "nats a token", {"pear/entropy": "entropy"}),
        ]
    panels += [
        Panel("gradient products", "share of their work done", {"pear/gradient_kept": "kept"}),
        Panel("gradient left out", "share of its mass", {"pear/gradient_left_out": "left out"}),
    ]
    drawn = [p._replace(keys={k: v for k, v in p.keys.items() if any(series(r, k)[1] for r in runs)}) for p in panels]
    return [panel for panel in drawn if panel.keys]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def draw_curves(runs: Sequence[Run], path: str | os.PathLike) -> bool:
    """Draw the logs of runs of one kind as PNG; False, and no file, if there is nothing to draw.

    Raises:
        ValueError: no runs, or runs of several kinds
        WriteError: the picture cannot be written
    """
    return _save(curves_figure(runs, colors_of(runs)), path)


def draw_passes(runs: Sequence[Run], path: str | os.PathLike) -> bool:
    """Draw pass@1 and pass@k before and after, with their intervals; False, and no file, if nothing was evaluated.

    Raises:
        WriteError: the picture cannot be written
    """
    return _save(passes_figure(runs), path)


def _save(figure: plt.Figure | None, path: str | os.PathLike) -> bool:
    if figure is not None:
        save_figure(figure, path)
    return figure is not None


def curves_figure(runs: Sequence[Run], colors: Sequence[Any]) -> plt.Figure | None:
    if len(kinds := {run.kind for run in runs}) != 1:
        raise ValueError(f"curves are of runs of one kind, got {', '.join(sorted(kinds)) or 'no runs'}")
    if not (panels := _panels(runs)):
        return None
    columns = min(3 if len(panels) <= 6 else 4, len(panels))
    figure, grid = plt.subplots(
        rows := math.ceil(len(panels) / columns),
        columns,
        figsize=(max(4.4 * columns, 6), 3.3 * rows + 0.7),
        layout="constrained",
        squeeze=False,
    )
    for axis in grid.flat[len(panels) :]:
        axis.remove()
    for axis, panel in zip(grid.flat, panels, strict=False):
        _draw_panel(axis, panel, runs, colors)
    handles = [plt.Line2D([], [], color=color, linewidth=2) for color in colors]
    _name_runs(figure, handles, [run.name for run in runs])
    return figure


def _draw_panel(axis: plt.Axes, panel: Panel, runs: Sequence[Run], colors: Sequence[Any]) -> None:
    """A colour a run, a line style a quantity; long curves as a running mean over a pale original."""
    styles = dict(zip(panel.keys, ("-", "--", ":", "-.") * len(panel.keys), strict=False))
    for run, color in zip(runs, colors, strict=True):
        for key in panel.keys:
            steps, values = series(run, key)
            few = len(values) <= 20
            if len(values) >= SMOOTH_FROM:
                axis.plot(steps, values, color=color, linewidth=0.5, alpha=0.2)
                values = running_mean(values, len(values) // SMOOTH_SHARE)
            axis.plot(
                steps,
                values,
                color=color,
                linestyle=styles[key],
                linewidth=1.5,
                marker="o" if few else None,
                markersize=4,
            )
    if len(panel.keys) > 1:
        lines = [plt.Line2D([], [], color="black", linestyle=styles[key]) for key in panel.keys]
        axis.legend(lines, list(panel.keys.values()), fontsize=8)
    axis.set(title=panel.title, xlabel="training step", ylabel=panel.label)
    axis.grid(alpha=0.3)


def running_mean(values: Sequence[float], width: int) -> np.ndarray:
    """(n,) mean over `width` neighbours or so, centred; at the ends over those that there are."""
    kernel = np.ones(2 * (width // 2) + 1)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def passes_figure(runs: Sequence[Run]) -> plt.Figure | None:
    """A panel a k, a line a run: before in grey above, after in the run's colour."""
    if not evaluations_of(runs):
        return None
    ks = all_ks(runs)
    figure, axes = plt.subplots(
        1, len(ks), figsize=(max(4.2 * len(ks), 6) + 1, 0.6 * len(runs) + 1.9), layout="constrained", squeeze=False
    )
    for axis, k in zip(axes[0], ks, strict=True):
        for place, (run, color) in enumerate(zip(runs, colors_of(runs), strict=True)):
            for moment, shift, style in (
                ("before", -0.13, dict(color="tab:gray", marker="o", markerfacecolor="white")),
                ("after", 0.13, dict(color=color, marker="o")),
            ):
                if (interval := interval_of(getattr(run, moment), k)) is not None:
                    mean, low, high = (100 * value for value in interval)
                    axis.plot([low, high], [place + shift] * 2, color=style["color"], linewidth=2)
                    axis.plot([mean], [place + shift], linestyle="none", **style)
        axis.set(title=f"pass@{k}", xlabel="% of problems, 95 % interval", ylim=(len(runs) - 0.5, -0.5))
        axis.set_yticks(range(len(runs)), [""] * len(runs))
        axis.margins(x=0.08)
        axis.grid(alpha=0.3)
    axes[0][0].set_yticks(range(len(runs)), [label(run.name) for run in runs])
    handles = [
        plt.Line2D([], [], color="tab:gray", marker="o", markerfacecolor="white"),
        plt.Line2D([], [], color="black", marker="o"),
    ]
    _name_runs(figure, handles, ["before", "after (each run its colour)"])
    return figure


def colors_of(runs: Sequence[Run]) -> list[Any]:
    """A colour a run, by its place: blue and orange first, as in the demo's report."""
    if len(runs) <= 10:
        return [f"C{i}" for i in range(len(runs))]
    return list(matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(runs))))


def _name_runs(figure: plt.Figure, handles: list[plt.Line2D], names: list[str]) -> None:
    figure.legend(handles, [label(name) for name in names], loc="outside lower center", ncols=min(len(names), 3))


def label(name: str) -> str:
    """A name as matplotlib shows it: no formulas between dollars, and of a bearable length."""
    return shorten(plain(name), 40).replace("$", r"\$")


def shorten(text: str, width: int) -> str:
    """Text of at most `width` characters, by leaving out the middle: names differ at their ends."""
    half = (width - 3) // 2
    return text if len(text) <= width else f"{text[:half]}...{text[-half:]}"


def figures(runs: Sequence[Run]) -> dict[str, plt.Figure | None]:
    found = {PASSES: passes_figure(runs)}
    for kind, name in CURVES.items():
        # A run has one colour in all pictures.
        if alike := [(run, color) for run, color in zip(runs, colors_of(runs), strict=True) if run.kind == kind]:
            found[name] = curves_figure(*zip(*alike, strict=True))
    return found


def plain(text: str) -> str:
    return " ".join(text.split())
