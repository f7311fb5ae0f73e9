"""The numbers of `pear inspect` against loops in plain Python that share no code with them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inspected import make_data, policy_logprobs, report_of, shifted, tokens_of

from pear.inspecting import statistics
from pear.inspecting.statistics import along, at_level, by_following, grid, histogram, ratio_quantiles, summarize
from pear.inspecting.tokens import log_ratios, weights
from pear.inspecting.worst import choose, judge
from pear_kernels.options import DEFAULTS, PEAROptions

NARROW = PEAROptions(gamma=0.98, log_ratio_clip=(-0.4, 0.5), log_weight_clip=(-1.0, 0.8), block_size=3)
SETTINGS = [
    NARROW,
    NARROW.replace(level="block"),
    NARROW.replace(level="block", clip_blocks=True),
    NARROW.replace(level="sequence"),
    NARROW.replace(center=True),
    NARROW.replace(clip_length=4),
    NARROW.replace(normalize="sequence"),
    NARROW.replace(normalize="batch"),
]


def example(seed=0, rows=5, lengths=(1, 12), spread=0.5):
    rng = np.random.default_rng(seed)
    behavior = policy_logprobs(rng, rows, lengths)
    return make_data(behavior), shifted(behavior, rng, -0.05, spread)


def naive(data, student, options):
    """Weights a row and the log-ratios, clipped ones and clip ends, by the formulas of the paper and of our options."""
    weights, ratios, deltas, ends = [], [], [], []
    for row, logprobs in zip(data.rows, student, strict=True):
        length = len(logprobs)
        scale = min(1.0, (options.clip_length or math.inf) / length)
        low, high = (bound * scale for bound in options.log_ratio_clip)
        ratio = [float(p) - float(b) for p, b in zip(logprobs, row.behavior_logprobs, strict=True)]
        size = options.block_size if options.level == "block" else 1
        if options.clip_blocks:
            blocks = [ratio[k : k + size] for k in range(0, length, size)]
            ratio = [sum(block) / len(block) for block in blocks for _ in block]
        delta = [min(max(r, low), high) for r in ratio]
        mean = sum(delta) / length if options.center else 0.0
        row_weights = []
        for t in range(length):
            first = 0 if options.level == "sequence" else (t // size + 1) * size
            log_g = sum(d - mean for d in delta[first:])
            if options.level != "sequence":
                log_g += max(length - first, 0) * math.log(options.gamma)
            row_weights.append(math.exp(min(max(log_g, options.log_weight_clip[0]), options.log_weight_clip[1])))
        weights.append(row_weights)
        ratios.append(ratio)
        deltas.append(delta)
        ends += [(low, high)] * length
    unnormalised = [w for row in weights for w in row]
    if options.normalize == "sequence":
        weights = [[w * len(row) / sum(row) for w in row] for row in weights]
    if options.normalize == "batch":
        total = sum(unnormalised)
        weights = [[w * len(unnormalised) / total for w in row] for row in weights]
    return weights, unnormalised, ratios, deltas, ends


@pytest.mark.parametrize(
    "options", SETTINGS, ids=lambda o: f"{o.level}-{o.clip_blocks}-{o.center}-{o.clip_length}-{o.normalize}"
)
def test_summary_is_that_of_plain_loops(options):
    data, student = example()
    found = summarize(tokens_of(data, student), options)
    rows, unnormalised, ratios, deltas, ends = naive(data, student, options)
    g = [w for row in rows for w in row]
    flat = [r for row in ratios for r in row]
    n, total = len(g), sum(g)
    low, high = options.log_weight_clip
    ordered = sorted(g, reverse=True)
    half = next(k for k in range(1, n + 1) if sum(ordered[:k]) >= total / 2 - 1e-12)
    last = sum(w for row in rows for t, w in enumerate(row) if len(row) - 1 - t < 0.1 * len(row))
    expected = {
        "delta_mean": sum(d for row in deltas for d in row) / n,
        "clipped_low": sum(r < a for r, (a, _) in zip(flat, ends, strict=True)) / n,
        "clipped_high": sum(r > b for r, (_, b) in zip(flat, ends, strict=True)) / n,
        "weight_mean": total / n,
        "weight_max": max(g),
        "log_weight_mean": sum(map(math.log, g)) / n,
        "floor": sum(math.isclose(math.log(w), low, abs_tol=1e-9) for w in unnormalised) / n,
        "ceiling": sum(math.isclose(math.log(w), high, abs_tol=1e-9) for w in unnormalised) / n,
        "ess": total**2 / (n * sum(w * w for w in g)),
        "trains": sum(w >= 0.1 * total / n for w in g) / n,
        "half": half / n,
        "last_tenth": last / total,
    }
    assert found._asdict() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert 0 < expected["clipped_low"] < 1 and 0 < expected["clipped_high"] < 1  # else nothing was tested


def test_spans_have_one_ratio_which_is_clipped_as_a_whole():
    """Two student tokens in a span whose total stands at its first; one token without; beside an ordinary row."""
    spans = np.array([0, 0, 1, -1, 2], dtype=np.int32)
    data = make_data(
        [[-0.6, 0.0, -0.2, 0.0, -0.9], [-0.3, -0.1]], {0: {"spans": spans, "aligned": True}, 1: {"policy": "other"}}
    )
    student = [[-0.2, -0.1, -1.0, -5.0, -0.5], [-0.35, -0.2]]
    tokens = tokens_of(data, student)
    assert log_ratios(tokens) == pytest.approx([0.15, 0.15, -0.8, np.nan, 0.4, -0.05, -0.1], nan_ok=True, abs=1e-6)
    options = DEFAULTS.replace(gamma=0.9, clip_blocks=True)
    found = summarize(tokens, options)
    assert found.delta_mean == pytest.approx((0.15 + 0.15 - 0.08 + 0.3 - 0.05 - 0.08) / 6, abs=1e-6)
    assert (found.clipped_low, found.clipped_high) == pytest.approx((2 / 6, 1 / 6))
    gamma = math.log(0.9)
    logs = [2 * gamma - 0.08 + 0.3] * 2 + [gamma + 0.3] * 2 + [0.0] + [gamma - 0.08, 0.0]
    assert np.log(weights(tokens, options)) == pytest.approx(logs, abs=1e-6)
    at_block = np.log(weights(tokens, options.replace(level="block", block_size=2)))
    assert at_block == pytest.approx([*logs[:5], 0.0, 0.0], abs=1e-6)  # spans stay; own tokens are two a block


def test_rows_without_a_policy_weigh_one_and_have_no_statistics():
    nothing = {"spans": np.full(3, -1, np.int32), "policy": None}
    data = make_data([[0.0, 0.0, 0.0], [-0.5, -0.5]], {0: nothing})
    tokens = tokens_of(data, [[-1.0, -2.0, -3.0], [-0.4, -0.4]])
    assert weights(tokens, DEFAULTS)[:3].tolist() == [1, 1, 1]
    assert ratio_quantiles(tokens)["tokens"] == 2
    alone = make_data([[0.0, 0.0, 0.0]], {0: nothing})
    report = report_of(alone, [[-1.0, -2.0, -3.0]])
    assert report["summary"]["delta_mean"] is None and report["summary"]["weight_mean"] == 1
    assert report["log_ratio"]["mean"] is None


@given(st.integers(0, 10_000), st.floats(0.01, 3.0), st.floats(-2.0, 2.0))
def test_histogram_holds_every_token_once_on_the_right_side_of_the_clip(seed, spread, mean):
    rng = np.random.default_rng(seed)
    behavior = policy_logprobs(rng, 3, (1, 30))
    data, student = make_data(behavior), shifted(behavior, rng, mean, spread)
    tokens = tokens_of(data, student)
    found, ratio = histogram(tokens, DEFAULTS), log_ratios(tokens)
    low, high = DEFAULTS.log_ratio_clip
    parts = [sum(getattr(found, name)) for name in ("low", "inside", "high")]
    assert parts == pytest.approx(
        [(ratio < low).mean(), ((ratio >= low) & (ratio <= high)).mean(), (ratio > high).mean()]
    )
    edges = np.array(found.edges)
    assert (np.diff(edges) > 0).all() and edges == pytest.approx(-edges[::-1])
    for left, right, *values in zip(edges, edges[1:], found.low, found.inside, found.high, strict=False):
        inner = ((ratio > left + 1e-9) & (ratio < right - 1e-9)).mean()
        assert sum(values) >= inner - 1e-9  # what lies at or beyond the outer edges comes on top


def test_curves_hold_every_token_at_its_position():
    data, student = example(seed=3, rows=7, lengths=(1, 90))
    tokens = tokens_of(data, student)
    g = weights(tokens, DEFAULTS)
    following = [len(row.behavior_logprobs) - 1 - t for row in data.rows for t in range(len(row.behavior_logprobs))]
    curve = by_following(tokens, g)
    assert sum(curve.tokens) == len(g) and sum(curve.weight_share) == pytest.approx(1)
    assert curve.position == sorted(curve.position)
    for k in range(4):  # alone in their bins
        here = [math.log(w) for w, f in zip(g, following, strict=True) if f == k]
        at = curve.position.index(k)
        assert curve.tokens[at] == len(here) and curve.mean[at] == pytest.approx(np.mean(here))
        assert curve.quantiles[at] == pytest.approx(np.quantile(here, statistics.BAND))
    parts = along(tokens, g)
    assert sum(parts.tokens) == len(g) and sum(parts.weight_share) == pytest.approx(1)
    assert all(0 < place < 1 for place in parts.position)


def test_grid_has_the_chosen_setting_and_no_gamma_at_sequence_level():
    chosen = PEAROptions(gamma=0.97, log_ratio_clip=(-0.5, 0.6))
    settings = grid(chosen)
    assert chosen in settings and len(settings) == len(set(settings)) == 2 * 4 * 5 + 5
    centred = grid(chosen.replace(center=True, normalize="sequence"))
    assert all(not s.center and s.normalize is None for s in centred if s.level == "sequence")
    assert at_level(chosen.replace(normalize="batch"), "sequence").normalize == "batch"


def test_worst_rows_by_each_reason_and_an_ordinary_one():
    behavior = [[-0.5] * 20 for _ in range(9)]
    student = [np.full(20, -0.5 + 0.004 * i) for i in range(9)]
    student[2] = np.full(20, -0.58)  # lowest weight
    student[6] = np.full(20, -0.2)  # highest weight
    student[4][7] -= 9.0  # one token far off
    data = make_data(behavior)
    tokens = tokens_of(data, student)
    judged = judge(tokens, weights(tokens, DEFAULTS))
    chosen = choose(tokens, judged, 5)
    assert len(chosen) == 5
    assert "lowest mean weight" in chosen[2] and "highest mean weight" in chosen[6]
    assert "largest |log-ratio| of a token" in chosen[4] and "largest mean |log-ratio|" in chosen[4]
    assert len(choose(tokens, judged, 100)) == 9 and choose(tokens, judged, 0) == {}
    assert len(choose(tokens, judged, 1)) == 1
