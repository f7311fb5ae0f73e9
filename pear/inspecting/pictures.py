"""The page's pictures, each from the report alone: log-ratios, weights by position, where weight lies, and the grid."""

import math
from typing import Any

from pear.inspecting.finding import share
from pear.inspecting.statistics import to_axis
from pear.inspecting.svg import Plot, labelled

RATIO_TICKS = (-100, -30, -10, -3, -1, -0.3, -0.1, 0, 0.1, 0.3, 1, 3, 10, 30, 100)
FOLLOWING_TICKS = (0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000)


def ratios(report: dict[str, Any]) -> str:
    """Histogram of the log-ratios, with the ends of the clip."""
    found, (low, high) = report["log_ratio"], report["options"]["log_ratio_clip"]
    bars = found["histogram"]
    edges = [to_axis(edge) for edge in bars["edges"]]
    totals = [sum(parts) for parts in zip(bars["low"], bars["inside"], bars["high"], strict=True)]
    top = 1.12 * (max(totals) or 1.0)
    plot = Plot(1100, 270, (edges[0], edges[-1]), (0, top), label="Histogram of log-ratios", margin=(26, 14, 38, 50))
    step = _round_step(top / 4)
    x_ticks = labelled(RATIO_TICKS, (bars["edges"][0], bars["edges"][-1]), lambda x: f"{x:g}")
    plot.axes(
        [(to_axis(x), words) for x, words in x_ticks],
        [(i * step, share(i * step)) for i in range(int(top / step) + 1)],
        "log π − log π_b of a token, nats (linear near 0, logarithmic further out)",
        "share of tokens",
    )
    for left, right, *parts in zip(edges, edges[1:], bars["low"], bars["inside"], bars["high"], strict=False):
        base = 0.0
        for part, kind in zip(parts, ("low", "mid", "high"), strict=True):
            if part:
                ends = f"{_back(left):.3g} to {_back(right):.3g}: {share(part)}"
                plot.bar((left + 0.02, right - 0.02), (base, base + part), f"fill-{kind}", ends)
                base += part
    summary = report["summary"]
    for value, kind, words, anchor in (
        (low, "low", f"clip {low:g}: {share(summary['clipped_low'])} lie below", "end"),
        (high, "high", f"clip {high:g}: {share(summary['clipped_high'])} above", "start"),
    ):
        at = min(max(to_axis(value), edges[0]), edges[-1])
        plot.vertical(at, f"end-{kind}")
        plot.text(plot.x(at) + (-5 if anchor == "end" else 5), 16, words, f"note-{kind}", anchor)
    return str(plot)


def _back(x: float) -> float:
    return math.sinh(x) * 0.02


def by_position(report: dict[str, Any], level: str) -> str:
    """log G against the tokens that follow: median, the middle 50% and 80%, floor and ceiling."""
    curve = report["levels"][level]["by_following"]
    floor, ceiling = report["options"]["log_weight_clip"]
    longest = max(report["data"]["longest"] - 1, 1)
    bottom, top = _range(report)
    plot = Plot(
        372,
        250,
        (_log1(longest), 0),
        (bottom, top),
        label=f"Weights by position, level {level}",
        margin=(24, 12, 38, 40),
    )
    ticks = labelled(FOLLOWING_TICKS, (0, longest), lambda x: f"{x:g}" if x < 1000 else f"{x / 1000:g}k")
    plot.axes([(_log1(x), words) for x, words in ticks], _log_weight_ticks(bottom, top), "tokens that follow", "log G")
    x = [_log1(position) for position in curve["position"]]
    quantiles = {key: list(zip(x, values, strict=True)) for key, values in curve["quantiles"].items()}
    plot.band(quantiles["0.9"], quantiles["0.1"], "band-wide")
    plot.band(quantiles["0.75"], quantiles["0.25"], "band")
    plot.horizontal(0, "one")
    for value, kind in ((floor, "low"), (ceiling, "high")):
        if bottom <= value <= top:
            plot.horizontal(value, f"end-{kind}")
    plot.line(quantiles["0.5"], "median")
    chosen = " (chosen)" if level == report["options"]["level"] else ""
    plot.text(plot.left, 15, f"{level}{chosen}", "title", "start")
    summary = report["levels"][level]["summary"]
    plot.text(plot.right, 15, f"{share(summary['trains'])} train", "note", "end")
    return str(plot)


def along(report: dict[str, Any], level: str) -> str:
    """The share of all weight in each part of the response."""
    curve = report["levels"][level]["along"]
    shares = curve["weight_share"]
    tokens = sum(curve["tokens"])
    top = 1.1 * max(*shares, 2 / len(shares))
    plot = Plot(
        372, 190, (0, 1), (0, top), label=f"Share of weight along the response, level {level}", margin=(24, 12, 38, 46)
    )
    step = _round_step(top / 3)
    plot.axes(
        [(0.0, "start"), (0.5, "middle"), (1.0, "end")],
        [(i * step, share(i * step)) for i in range(int(top / step) + 1)],
        "part of the response",
        "share of weight",
    )
    for place, part, count in zip(curve["position"], shares, curve["tokens"], strict=True):
        left = math.floor(place * 20) / 20
        plot.bar((left + 0.004, left + 0.046), (0, part), "fill-weight", f"{share(part)} of the weight, {count} tokens")
        plot.parts.append(_mark(plot, left, count / tokens))
    plot.text(plot.left, 15, level, "title", "start")
    return str(plot)


def _mark(plot: Plot, left: float, y: float) -> str:
    return (
        f'<line class="one" x1="{plot.x(left):.1f}" x2="{plot.x(left + 0.05):.1f}" y1="{plot.y(y):.1f}" '
        f'y2="{plot.y(y):.1f}"/>'
    )


def cell(report: dict[str, Any], found: dict[str, Any]) -> str:
    """One setting of the grid: the median of log G, small."""
    bottom, top = _range(report)
    longest = max(report["data"]["longest"] - 1, 1)
    label = f"gamma {found['gamma']:g}, clip {found['log_ratio_clip']}"
    plot = Plot(150, 64, (_log1(longest), 0), (bottom, top), label=label, margin=(4, 4, 4, 4))
    plot.horizontal(0, "one")
    for value, kind in zip(report["options"]["log_weight_clip"], ("low", "high"), strict=True):
        if bottom <= value <= top:
            plot.horizontal(value, f"end-{kind}")
    curve = found["by_following"]
    plot.line([(_log1(x), y) for x, y in zip(curve["position"], curve["quantiles"]["0.5"], strict=True)], "median")
    return str(plot)


def _range(report: dict[str, Any]) -> tuple[float, float]:
    """Of log G in all pictures: the floor and the ceiling where they are near, else what there is."""
    lows = [min(level["by_following"]["quantiles"]["0.1"]) for level in report["levels"].values()]
    highs = [max(level["by_following"]["quantiles"]["0.9"]) for level in report["levels"].values()]
    medians = [found["by_following"]["quantiles"]["0.5"] for found in report["grid"]]
    lows += map(min, medians)
    highs += map(max, medians)
    low, high = min(*lows, -0.5), max(*highs, 0.5)
    floor, ceiling = report["options"]["log_weight_clip"]
    low = min(low, floor) if low < 0.5 * floor else low
    high = max(high, ceiling) if high > 0.5 * ceiling else high
    space = 0.06 * (high - low)
    return low - space, high + space


def _log_weight_ticks(bottom: float, top: float) -> list[tuple[float, str]]:
    step = _round_step((top - bottom) / 5)
    first, last = math.ceil(bottom / step), math.floor(top / step)
    return [(i * step, f"{i * step:g}".replace("-", "−")) for i in range(first, last + 1)]


def _log1(x: float) -> float:
    return math.log1p(x)


def _round_step(x: float) -> float:
    """1, 2 or 5 times a power of ten, at least x."""
    power = 10.0 ** math.floor(math.log10(x))
    return next(power * k for k in (1, 2, 5, 10) if power * k >= x * (1 - 1e-9))
