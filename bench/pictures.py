"""Time and memory beside the peers, and over N, V and D, as PNGs."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from bench.figures import Figures  # noqa: E402
from bench.peers import OURS, PEERS  # noqa: E402
from bench.shapes import CPU_BASE, GPU_BASE, SHAPES, Shape  # noqa: E402

OWN_COLOR, PEER_COLOR = "#c0562f", "#8a94a6"
AXES = {"tokens": "N", "vocabulary": "V", "hidden": "D"}  # fields of a Shape
MARKERS = "osD^v<>P*X"  # there are more peers than colours


def draw(figures: Figures, folder: Path) -> list[str]:
    """Names of the files it wrote."""
    measured = figures.cases("sweeps")
    base = next((case for case in (GPU_BASE, CPU_BASE, *measured) if figures.seconds("sweeps", case, "bare")), None)
    if base is None:
        return []
    drawn = [beside_peers(figures, base, folder / "report.png")]
    sweep = base if base == GPU_BASE else "cpu-small"
    if sweep in measured:
        drawn.append(over_shapes(figures, sweep, folder / "sweeps.png"))
    return [name for name in drawn if name]


def beside_peers(figures: Figures, case: str, path: Path) -> str:
    peers = [name for name in PEERS if figures.ratio("sweeps", case, name, "bare") is not None][::-1]
    labels = [PEERS[name].label for name in peers]
    colors = [OWN_COLOR if PEERS[name].package == OURS else PEER_COLOR for name in peers]
    panels = [("time, bare products = 1", [figures.ratio("sweeps", case, name, "bare") for name in peers], "{:.2f}")]
    extra = [(figures.bytes(case, name) or 0) / 2**20 for name in peers]
    if any(extra):
        panels.append(("extra peak memory, MiB", extra, "{:.0f}"))
    size = (5.5 * len(panels), 0.4 * len(peers) + 1.4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for axis, (title, values, style) in zip(axes[0], panels, strict=True):
        bars = axis.barh(labels, values, color=colors)
        axis.bar_label(bars, [style.format(value) for value in values], padding=3, fontsize=9)
        axis.set_title(title, fontsize=11)
        axis.set_xlim(0, 1.15 * max(values))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].axvline(1, color="#222222", linestyle="--", linewidth=1)
    figure.suptitle(f"Forward and backward, {SHAPES[case]}", fontsize=12)
    return save(figure, path)


def over_shapes(figures: Figures, base: str, path: Path) -> str | None:
    """Time over the bare products' along N, V and D, the two others as in the base shape.

    Along those of which two sizes and more were measured; None, and no file, where that is none.
    """
    lines = {axis: along(figures, base, field) for field, axis in AXES.items()}
    lines = {axis: of_peers for axis, of_peers in lines.items() if of_peers}
    if not lines:
        return None
    figure, axes = plt.subplots(
        1, len(lines), figsize=(3.3 * len(lines) + 3.1, 4.6), sharey=True, layout="constrained", squeeze=False
    )
    shown = {}
    for axis, (name, of_peers) in zip(axes[0], lines.items(), strict=True):
        for peer, points in of_peers.items():
            number = list(PEERS).index(peer)
            style = {"color": f"C{number % 10}", "marker": MARKERS[number // 3 % len(MARKERS)]}
            width = 2.5 if PEERS[peer].package == OURS else 1.2
            (shown[PEERS[peer].label],) = axis.plot(*zip(*points, strict=True), linewidth=width, **style)
        axis.set_xscale("log", base=2)
        axis.set_xlabel(name)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yscale("log", base=2)
    axes[0][0].set_ylabel("time, bare products = 1")
    legend = {"frameon": False, "fontsize": 8, "loc": "center left", "bbox_to_anchor": (1, 0.5)}
    axes[0][-1].legend(shown.values(), shown.keys(), **legend)
    figure.suptitle(f"Forward and backward, around {SHAPES[base]}", fontsize=12)
    return save(figure, path)


def along(figures: Figures, base: str, field: str) -> dict[str, list[tuple[int, float]]]:
    """Of each peer with two sizes or more, (size, time over the bare products') in order of size."""
    cases = [case for case in figures.cases("sweeps") if differs_in(SHAPES[case], SHAPES[base], field)]
    found = {}
    for peer in PEERS:
        ratios = {getattr(SHAPES[case], field): figures.ratio("sweeps", case, peer, "bare") for case in cases}
        points = sorted((size, ratio) for size, ratio in ratios.items() if ratio is not None)
        if len(points) > 1:
            found[peer] = points
    return found


def differs_in(shape: Shape, base: Shape, field: str) -> bool:
    """Whether that is all, at most, in which it differs."""
    return shape._replace(**{field: getattr(base, field)}) == base


def save(figure, path: Path) -> str:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path.name
