"""The pictures of a replication's report. Arms are told apart by their place and name, never by colour alone."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pear.curves import SMOOTH_FROM, SMOOTH_SHARE, label, running_mean
from pear.intervals import Interval
from pear.pictures import plt
from pear.replicate.results import POSITIONS, START_MODELS, Results
from pear.replicate.summary import ablation_rows, compared, difference, order, passes, rate

TITLES = {
    "passes.png": "pass@k before and after RL",
    "differences.png": "pass@k minus the baseline's, before and after RL",
    "order.png": "the arms' order before and after RL",
    "rl_curves.png": "reward and entropy over RL",
    "sft_curves.png": "held-out NLL over SFT",
    "weights.png": "mean weight by position in the response",
    "ablations.png": "ablations: pass@k minus the baseline's after RL",
}
# Okabe and Ito's colours, which the colour-blind tell apart, without the yellow that white paper swallows.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F4F24")
MARKERS = "osD^vP*X"
BASELINE, BEFORE = "black", "#808080"
START_STYLES = {"student": dict(linestyle=":", color="#606060"), "teacher": dict(linestyle="--", color="#606060")}
COLUMNS = 4  # of small panels
ENTROPY = ("entropy", "pear/entropy")  # TRL's name, and that of our own loss


def figures(results: Results) -> dict[str, Figure]:
    """Pictures by the name of their file; those that the results have nothing for are left out."""
    drawn = {
        "passes.png": passes_figure(results),
        "differences.png": differences_figure(results),
        "order.png": order_figure(results),
        "rl_curves.png": rl_figure(results),
        "sft_curves.png": sft_figure(results),
        "weights.png": weights_figure(results),
        "ablations.png": ablations_figure(results),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def styles(results: Results) -> dict[str, dict[str, Any]]:
    """Colour and marker of each arm, by its place: the baseline black, ablations grey."""
    found = {arm: dict(color=BEFORE, marker="o") for arm in results.ablations}
    found[results.study["baseline"]] = dict(color=BASELINE, marker="o")
    for place, arm in enumerate(compared(results)):
        found[arm] = dict(color=COLORS[place % len(COLORS)], marker=MARKERS[(place + 1) % len(MARKERS)])
    return found


# ---------------------------------------------------------------------------------------------------------------------
# A row an arm


def passes_figure(results: Results) -> Figure:
    """A panel a k, a row an arm: before RL hollow and grey above, after in the arm's colour."""
    figure, axes = _rows_figure(results, results.arms)
    for axis, k in zip(axes, results.study["ks"], strict=True):
        for row, arm in enumerate(results.arms):
            _mark(axis, row - 0.15, rate(results, arm, "before", k), color=BEFORE, hollow=True)
            _mark(axis, row + 0.15, rate(results, arm, "after", k), color=styles(results)[arm]["color"])
        for model in START_MODELS:
            axis.axvline(100 * passes(results, model, "start", k).mean(), linewidth=1.2, **START_STYLES[model])
        axis.set(title=f"pass@{k}", xlabel="%")
    handles, names = _moments()
    handles += [plt.Line2D([], [], **START_STYLES[model]) for model in START_MODELS]
    figure.legend(handles, [*names, *START_MODELS], loc="outside lower center", ncols=4 if len(axes) > 2 else 2)
    return figure


def differences_figure(results: Results) -> Figure:
    """A panel a k, a row an arm: the arm minus the baseline before and after RL."""
    arms, primary = compared(results), results.study["primary"]
    figure, axes = _rows_figure(results, arms)
    for axis, k in zip(axes, results.study["ks"], strict=True):
        for row, arm in enumerate(arms):
            if (arm, k) == (primary["arm"], primary["k"]):
                axis.axhspan(row - 0.42, row + 0.42, color="#FFF2CC", zorder=0)
            _mark(axis, row - 0.15, difference(results, arm, "before", k).interval, color=BEFORE, hollow=True)
            _mark(axis, row + 0.15, difference(results, arm, "after", k).interval, color=styles(results)[arm]["color"])
        _zero(axis, results, k)
    handles, names = _moments()
    handles.append(plt.Rectangle((0, 0), 1, 1, color="#FFF2CC"))
    names.append("the primary comparison")
    figure.legend(handles, names, loc="outside lower center", ncols=3 if len(axes) > 2 else 1)
    return figure


def ablations_figure(results: Results) -> Figure | None:
    """A panel a k; a row an ablation, below the arm it started from: minus the baseline after RL, on the same seeds."""
    if not (arms := ablation_rows(results)):
        return None
    figure, axes = _rows_figure(results, arms)
    for axis, k in zip(axes, results.study["ks"], strict=True):
        for row, arm in enumerate(arms):
            found = difference(results, arm, "after", k, results.study["ablation_seeds"])
            _mark(
                axis, row, found.interval, color=BEFORE if arm in results.ablations else styles(results)[arm]["color"]
            )
        _zero(axis, results, k)
        if parents := len(arms) - len(results.ablations):
            axis.axhline(parents - 0.5, color="black", linewidth=0.6)
    return figure


def _rows_figure(results: Results, names: Sequence[str]) -> tuple[Figure, Sequence[Axes]]:
    """A panel a k, with a row a name, the first on top."""
    ks = results.study["ks"]
    figure, axes = plt.subplots(
        1, len(ks), figsize=(3.6 * len(ks) + 1.4, 0.45 * len(names) + 1.7), layout="constrained", squeeze=False
    )
    for axis in axes[0]:
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_yticks(range(len(names)), [""] * len(names))
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_yticks(range(len(names)), [label(name) for name in names])
    return figure, axes[0]


def _mark(axis: Axes, y: float, interval: Interval, color: str, hollow: bool = False) -> None:
    mean, low, high = (100 * value for value in interval)
    axis.plot([low, high], [y, y], color=color, linewidth=1.8, solid_capstyle="butt")
    axis.plot([mean], [y], color=color, marker="o", markersize=6, markerfacecolor="white" if hollow else color)


def _zero(axis: Axes, results: Results, k: int) -> None:
    axis.axvline(0, color=BASELINE, linewidth=1)
    axis.set(title=f"pass@{k}", xlabel=f"points above {label(results.study['baseline'])}")


def _moments() -> tuple[list[Any], list[str]]:
    return [
        plt.Line2D([], [], color=BEFORE, marker="o", markerfacecolor="white"),
        plt.Line2D([], [], color=BASELINE, marker="o"),
    ], ["before RL", "after RL (each arm its colour)"]


# ---------------------------------------------------------------------------------------------------------------------
# Order


def order_figure(results: Results) -> Figure:
    """A panel a k, a mark an arm: pass@k before RL against that after, with both intervals."""
    ks = results.study["ks"]
    figure, axes = plt.subplots(1, len(ks), figsize=(4 * len(ks), 4.7), layout="constrained", squeeze=False)
    for axis, k in zip(axes[0], ks, strict=True):
        for arm in results.arms:
            x, y = rate(results, arm, "before", k), rate(results, arm, "after", k)
            color = styles(results)[arm]["color"]
            axis.plot([100 * x.low, 100 * x.high], [100 * y.mean] * 2, color=color, linewidth=0.8, alpha=0.5)
            axis.plot([100 * x.mean] * 2, [100 * y.low, 100 * y.high], color=color, linewidth=0.8, alpha=0.5)
            axis.plot([100 * x.mean], [100 * y.mean], linestyle="none", markersize=8, zorder=3, **styles(results)[arm])
        axis.set(title=f"pass@{k}\n{_correlation(order(results, k))}", xlabel="before RL (%)", ylabel="after RL (%)")
        axis.grid(alpha=0.3)
    handles = [plt.Line2D([], [], linestyle="none", markersize=8, **styles(results)[arm]) for arm in results.arms]
    names = [label(arm) for arm in results.arms]
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 5 if len(ks) > 2 else 2))
    return figure


def _correlation(found: Interval | None) -> str:
    if found is None:
        return "no order"
    return f"rank correlation {found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"


# ---------------------------------------------------------------------------------------------------------------------
# Curves: a small panel an arm, with the baseline in each


def rl_figure(results: Results) -> Figure | None:
    return _curves(results, "rl", {"mean reward": ("reward",), "entropy (nats a token)": ENTROPY}, "RL step")


def sft_figure(results: Results) -> Figure | None:
    return _curves(results, "sft", {"held-out NLL (nats a token)": ("eval_pear/nll",)}, "SFT step")


def mean_curve(results: Results, phase: str, arm: str, keys: Sequence[str]) -> tuple[np.ndarray, ...] | None:
    """Steps, mean over seeds and its standard error, all (n,), of the first of `keys` that the arm's logs have.

    Steps that not every seed has a number for are left out; long curves are smoothed, seed by seed, over a few steps.
    With one seed the standard error is 0.
    """
    logs = [row["log"] for row in results.training if (row["arm"], row["phase"]) == (arm, phase)]
    for key in keys:
        curves = [{e["step"]: e[key] for e in log if e.get(key) is not None} for log in logs]
        if curves and (steps := sorted(set.intersection(*(set(curve) for curve in curves)))):
            break
    else:
        return None
    values = np.array([[curve[step] for step in steps] for curve in curves], dtype=np.float64)  # (S, n)
    if len(steps) >= SMOOTH_FROM:
        values = np.stack([running_mean(each, len(steps) // SMOOTH_SHARE) for each in values])
    error = values.std(axis=0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else np.zeros(len(steps))
    return np.array(steps), values.mean(axis=0), error


def _curves(results: Results, phase: str, quantities: dict[str, Sequence[str]], xlabel: str) -> Figure | None:
    """For each quantity a block of panels, one for each arm beside the baseline; a band of one standard error."""
    baseline = results.study["baseline"]
    curves = {
        name: {arm: curve for arm in results.arms if (curve := mean_curve(results, phase, arm, keys)) is not None}
        for name, keys in quantities.items()
    }
    curves = {name: found for name, found in curves.items() if found}
    if not curves:
        return None
    arms = compared(results)
    columns = min(COLUMNS, len(arms))
    rows = math.ceil(len(arms) / columns)
    figure, grid = _panels(rows * len(curves), columns)
    for block, (name, found) in enumerate(curves.items()):
        panels = grid[block * rows : (block + 1) * rows].flat
        for place, axis in enumerate(panels):
            if place >= len(arms):
                axis.remove()
                continue
            arm = arms[place]
            for each in (baseline, arm):
                if each in found:
                    _band(axis, *found[each], **_line(results, each))
            axis.set_title(label(arm), fontsize=10, color=styles(results)[arm]["color"])
            axis.sharey(grid[block * rows, 0])
            axis.grid(alpha=0.3)
            axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
            if place % columns == 0:
                axis.set_ylabel(name, fontsize=9)
            else:
                axis.tick_params(labelleft=False)
            if block == len(curves) - 1 and place + columns >= len(arms):
                axis.set_xlabel(xlabel, fontsize=9)
    handles = [plt.Line2D([], [], **_line(results, baseline)), plt.Line2D([], [], color=COLORS[0])]
    names = [f"{label(baseline)}, in each panel", "the panel's arm (band: one standard error of the mean over seeds)"]
    figure.legend(handles, names, loc="outside lower center", ncols=2 if columns > 2 else 1)
    return figure


def _panels(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    figsize = (max(3.0 * columns, 6.5) + 0.4, 2.1 * rows + 0.6)
    return plt.subplots(rows, columns, figsize=figsize, layout="constrained", squeeze=False)


def _line(results: Results, arm: str) -> dict[str, Any]:
    return dict(color=styles(results)[arm]["color"], linestyle="--" if arm == results.study["baseline"] else "-")


def _band(axis: Axes, x: np.ndarray, mean: np.ndarray, error: np.ndarray, **style: Any) -> None:
    axis.plot(x, mean, linewidth=1.4, **style)
    axis.fill_between(x, mean - error, mean + error, color=style["color"], alpha=0.2, linewidth=0)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def weights_figure(results: Results) -> Figure | None:
    """A panel for each arm with weights: their mean by relative position in the response, before and after SFT."""
    profiles = {(arm, moment): weight_profile(results, arm, moment) for arm in results.arms for moment in _WEIGHTED}
    arms = [arm for arm in results.arms if any(profiles[arm, moment] is not None for moment in _WEIGHTED)]
    if not arms:
        return None
    columns = min(COLUMNS, len(arms))
    figure, grid = _panels(math.ceil(len(arms) / columns), columns)
    middles = (np.arange(POSITIONS) + 0.5) / POSITIONS
    for place, axis in enumerate(grid.flat):
        if place >= len(arms):
            axis.remove()
            continue
        arm = arms[place]
        for moment in _WEIGHTED:
            if (profile := profiles[arm, moment]) is not None:
                _band(axis, middles, *profile, **_weight_line(results, arm, moment))
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set(yscale="log", xlim=(0, 1))
        axis.sharey(grid[0, 0])
        axis.set_title(label(arm), fontsize=10, color=styles(results)[arm]["color"])
        axis.grid(alpha=0.3)
        if place % columns == 0:
            axis.set_ylabel("mean weight", fontsize=9)
        else:
            axis.tick_params(labelleft=False)
        if place + columns >= len(arms):
            axis.set_xlabel("relative position t/T", fontsize=9)
    handles = [
        plt.Line2D([], [], color=BEFORE, linestyle="--"),
        plt.Line2D([], [], color=COLORS[0]),
        plt.Line2D([], [], color="black", linestyle=":", linewidth=0.8),
    ]
    names = ["start of SFT", "end of SFT (each arm its colour)", "1, the weight of plain SFT"]
    figure.legend(handles, names, loc="outside lower center", ncols=3 if columns > 2 else 1)
    return figure


_WEIGHTED = ("start", "end")


def weight_profile(results: Results, arm: str, moment: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean over seeds and its standard error, both (POSITIONS,); NaN at a position that some seed has no token at."""
    found = [row["by_position"] for row in results.weights if (row["arm"], row["moment"]) == (arm, moment)]
    if not found:
        return None
    values = np.array(found, dtype=np.float64)  # (S, POSITIONS); null is NaN
    error = values.std(axis=0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else np.zeros(POSITIONS)
    return values.mean(axis=0), error


def _weight_line(results: Results, arm: str, moment: str) -> dict[str, Any]:
    if moment == "start":
        return dict(color=BEFORE, linestyle="--")
    return dict(color=styles(results)[arm]["color"], linestyle="-")
