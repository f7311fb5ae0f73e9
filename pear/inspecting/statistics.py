"""What the weights of given options will do: numbers that a person decides by. Weights are `pear_kernels`' own."""

from typing import Any, NamedTuple

import numpy as np

from pear.inspecting.tokens import Tokens, log_ratios, weights
from pear_kernels.options import PEAROptions

TRAINS = 0.1  # a token trains if its weight is at least this share of the mean weight
QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
BAND = (0.1, 0.25, 0.5, 0.75, 0.9)  # quantiles at each position
PARTS = 20  # of a response, in "along"
_BINS = 81  # of the histogram, odd: one of them is around 0
_SCALE = 0.02  # of the histogram's axis, asinh(x / scale): even near 0, logarithmic further out


class Summary(NamedTuple):
    """Of all N tokens under one setting. A share is of the tokens; of those with a ratio where it is about ratios."""

    delta_mean: float | None  # of log pi - log pi_b after its clip, a token; None: no token has a ratio
    clipped_low: float | None
    clipped_high: float | None
    weight_mean: float
    weight_max: float
    log_weight_mean: float
    floor: float  # share of tokens on the lower end of log_weight_clip
    ceiling: float
    ess: float  # (sum w)^2 / (N sum w^2)
    trains: float  # share of tokens whose weight is at least TRAINS of the mean weight
    half: float  # the smallest share of tokens that has half of all weight
    last_tenth: float  # share of all weight that the last tenth of each response has


class Curve(NamedTuple):
    """log G by position; K positions."""

    position: list[float]  # (K,)
    tokens: list[int]  # (K,)
    mean: list[float]  # (K,) of log G
    quantiles: list[list[float]]  # (K, len(BAND)) of log G
    weight_share: list[float]  # (K,) share of all weight


class Histogram(NamedTuple):
    edges: list[float]  # (_BINS + 1,); the outer bins hold what lies beyond
    low: list[float]  # (_BINS,) share of the tokens with a ratio, of those below the clip
    inside: list[float]
    high: list[float]


def summarize(tokens: Tokens, options: PEAROptions, g: np.ndarray | None = None) -> Summary:
    """All numbers of one setting; `g` (N,) are its weights, if they are there already."""
    g = weights(tokens, options) if g is None else g
    clipped = g if options.normalize is None else weights(tokens, options.replace(normalize=None))
    low, high = options.log_weight_clip
    log_clipped = logs(clipped)
    delta, below, above = _deltas(tokens, options)
    total = g.sum()
    lengths = np.repeat(tokens.lengths, tokens.lengths)
    ends = np.sort(g)[::-1].cumsum()
    return Summary(
        delta_mean=_mean(delta),
        clipped_low=_mean(below),
        clipped_high=_mean(above),
        weight_mean=float(g.mean()),
        weight_max=float(g.max()),
        log_weight_mean=float(logs(g).mean()),
        floor=float((log_clipped <= low + 1e-9).mean()),  # exp and log took off some bits
        ceiling=float((log_clipped >= high - 1e-9).mean()),
        ess=float(total**2 / (len(g) * np.square(g).sum())) if total else 0.0,
        trains=float(trains(g).mean()),
        half=float((1 + np.searchsorted(ends, total / 2)) / len(g)),
        last_tenth=float(g[tokens.following < 0.1 * lengths].sum() / total) if total else 0.0,
    )


def trains(g: np.ndarray) -> np.ndarray:
    """(N,) bool: whether each token trains."""
    return g >= TRAINS * g.mean()


def logs(g: np.ndarray) -> np.ndarray:
    """(N,) log G; a weight too small for a number counts as the smallest that is one."""
    return np.log(np.maximum(g, np.finfo(np.float64).tiny))


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def clip_ends(tokens: Tokens, options: PEAROptions) -> tuple[np.ndarray, np.ndarray]:
    """(N,) each: the clip of each token's log-ratio, which `clip_length` makes narrower in long responses."""
    ends = np.broadcast_to(np.array(options.log_ratio_clip)[:, None], (2, len(tokens.logprobs)))
    if options.clip_length is None:
        return ends[0], ends[1]
    counts = np.add.reduceat(tokens.has_ratio.astype(np.int64), tokens.starts[:-1])
    scale = np.minimum(1.0, options.clip_length / np.maximum(counts, 1))
    return ends[0] * scale[tokens.rows], ends[1] * scale[tokens.rows]


def _deltas(tokens: Tokens, options: PEAROptions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(R,) of the tokens with a ratio: delta, and whether the clip's low and high end cut it."""
    ratio, (low, high) = log_ratios(tokens, options), clip_ends(tokens, options)
    has = tokens.has_ratio
    ratio, low, high = ratio[has], low[has], high[has]
    return np.clip(ratio, low, high), ratio < low, ratio > high


# ---------------------------------------------------------------------------------------------------------------------
# Log-ratios


def ratio_quantiles(tokens: Tokens) -> dict[str, Any]:
    """Mean, spread and quantiles of the log-ratios before any clip."""
    ratio = log_ratios(tokens)[tokens.has_ratio]
    if not len(ratio):
        return {"tokens": 0, "mean": None, "std": None, "quantiles": None}
    return {
        "tokens": len(ratio),
        "mean": float(ratio.mean()),
        "std": float(ratio.std()),
        "quantiles": dict(zip(map(str, QUANTILES), map(float, np.quantile(ratio, QUANTILES)), strict=True)),
    }


def histogram(tokens: Tokens, options: PEAROptions) -> Histogram:
    """Log-ratios before any clip, parted by where the clip of these options cuts."""
    ratio = log_ratios(tokens, options)[tokens.has_ratio]
    _, below, above = _deltas(tokens, options)
    reach = np.arcsinh(max(10.0, float(np.quantile(np.abs(ratio), 0.999)) if len(ratio) else 0.0) / _SCALE)
    edges = np.linspace(-reach, reach, _BINS + 1)
    at = np.clip(np.arcsinh(ratio / _SCALE), -reach, reach)
    groups = (at[below], at[~below & ~above], at[above])
    counts = [np.histogram(group, edges)[0] / max(len(ratio), 1) for group in groups]
    return Histogram((np.sinh(edges) * _SCALE).tolist(), *(count.tolist() for count in counts))


def to_axis(x: float) -> float:
    """Where a log-ratio lies on the histogram's axis."""
    return float(np.arcsinh(x / _SCALE))


# ---------------------------------------------------------------------------------------------------------------------
# Positions


def by_following(tokens: Tokens, g: np.ndarray) -> Curve:
    """log G by the number of tokens that follow: 0, 1, 2, 3, then ranges that grow by a fifth; position is their mean.

    `g` (N,) are the weights.
    """
    longest = int(tokens.lengths.max())
    edges = [0]
    while edges[-1] < longest:
        edges.append(max(edges[-1] + 1, int(edges[-1] * 1.2)))
    following = tokens.following
    return _curve(following, np.searchsorted(edges, following, side="right") - 1, g)


def along(tokens: Tokens, g: np.ndarray) -> Curve:
    """log G by the part of the response, from 0 (its first token) to 1, in PARTS parts."""
    lengths = np.repeat(tokens.lengths, tokens.lengths)
    place = (lengths - tokens.following - 0.5) / lengths
    return _curve(place, np.minimum((place * PARTS).astype(np.int64), PARTS - 1), g)


def _curve(position: np.ndarray, bins: np.ndarray, g: np.ndarray) -> Curve:
    order = np.argsort(bins, kind="stable")
    first = np.unique(bins[order], return_index=True)[1]
    log_g, position, g = logs(g)[order], position[order], g[order]
    ends = [*first[1:], len(order)]
    parts = [slice(a, b) for a, b in zip(first, ends, strict=True)]
    total = g.sum() or 1.0
    return Curve(
        [float(position[part].mean()) for part in parts],
        [int(part.stop - part.start) for part in parts],
        [float(log_g[part].mean()) for part in parts],
        [np.quantile(log_g[part], BAND).tolist() for part in parts],
        [float(g[part].sum() / total) for part in parts],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Other settings


GAMMAS = (0.99, 0.999, 1.0)
CLIPS = ((-0.08, 0.3), (-0.08, 0.08), (-0.02, 0.08), (-0.01, 0.04))  # the paper's, an even one, two narrower ones
LEVELS = ("token", "block", "sequence")


def grid(options: PEAROptions) -> list[PEAROptions]:
    """The chosen options at each level, gamma and clip: those above and their own; level sequence has no gamma."""
    gammas = sorted({*GAMMAS, options.gamma})
    clips = list(dict.fromkeys([*CLIPS, options.log_ratio_clip]))
    found = []
    for level in LEVELS:
        for gamma in gammas if level != "sequence" else [options.gamma]:
            found += [at_level(options, level).replace(gamma=gamma, log_ratio_clip=clip) for clip in clips]
    return found


def at_level(options: PEAROptions, level: str) -> PEAROptions:
    """The options at another level, without what the sequence level refuses."""
    if level == "sequence":
        options = options.replace(center=False)
        if options.normalize == "sequence":
            options = options.replace(normalize=None)
    return options.replace(level=level)
