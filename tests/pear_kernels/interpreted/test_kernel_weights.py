"""The scan kernel against formulas.pear_weights and objectives.pear, which the paper's formula checks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_problems import DEVICE, LEVELS
from problems import pear_objective

from pear_kernels import pear_weights
from pear_kernels.backends.triton import pear_weights as triton_weights
from pear_kernels.engine.packing import pack_tokens
from pear_kernels.formulas.pear_weights import PEARWeights
from pear_kernels.objectives import pear as objectives
from pear_kernels.options import PEAROptions

LONG = 3 * triton_weights.BLOCK + 7  # more than a program takes at a time


def random_logprobs(n: int, seed: int = 0, drift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(n, generator=rng, dtype=torch.float64)
    behavior = logprobs - drift + 0.3 * torch.randn(n, generator=rng, dtype=torch.float64)
    return logprobs.to(DEVICE), behavior.clamp(max=0).to(DEVICE)


def sequences(lengths, valid=None, static=False):
    bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    valid = torch.ones(sum(lengths), dtype=torch.bool) if valid is None else valid
    return pack_tokens(valid.to(DEVICE), bounds, static)


def both(pack, options, logprobs, behavior, chunks=None, **scales):
    """The two backends' objectives after the same walk: [(loss, weights, stats), log-weights, coefficients] of each."""
    arguments = {"reduction": "mean", "denominator": None, "sequence_scale": None, **scales}
    results = []
    for made in (triton_weights.PEARWeights, PEARWeights):
        objective = pear_objective(behavior, pack, options, **arguments, weights=made)
        for begin, end in chunks or [(0, pack.tokens)]:
            objective.observe(begin, end, logprobs[begin:end])
        coefficients = objective.coefficients(0, pack.tokens).clone()
        finished = objective.finish(logprobs)
        results.append([*finished, objective.weights.log_weights(0, pack.tokens), coefficients])
    return results


def assert_same(found, expected):
    """To float64: sums may be added up in another order."""
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12, equal_nan=True)


packs = st.lists(st.lists(st.booleans(), max_size=40), min_size=1, max_size=6)  # sequences of tokens, some ignored


@given(
    pack=packs,
    static=st.booleans(),
    level=st.sampled_from(LEVELS),
    block_size=st.sampled_from([1, 2, 3, 7, 39, 10**9, 2**62]),
    gamma=st.sampled_from([0.5, 0.97, 1.0]),
    ratio_clip=st.sampled_from([(-0.08, 0.3), (-1.0, 1.0), (-0.5, -0.1), (0.0, 0.0)]),
    weight_clip=st.sampled_from([(-10.0, 5.0), (-0.5, 0.2), (0.0, 0.0)]),
    reduction=st.sampled_from(["mean", "sum", "sequence_mean"]),
    cuts=st.lists(st.integers(0, 240), max_size=4),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_random_packs(pack, static, level, block_size, gamma, ratio_clip, weight_clip, reduction, cuts, seed):
    valid = torch.tensor([token for sequence in pack for token in sequence], dtype=torch.bool)
    compact = sequences([len(sequence) for sequence in pack], valid, static)
    n = compact.tokens
    logprobs, behavior = random_logprobs(n, seed)
    options = PEAROptions(
        level=level, block_size=block_size, gamma=gamma, log_ratio_clip=ratio_clip, log_weight_clip=weight_clip
    )
    edges = sorted({0, n, *(cut for cut in cuts if cut < n)})
    chunks = list(zip(edges[:-1], edges[1:], strict=True))[::-1]
    scale = torch.linspace(-1, 2, len(pack), dtype=torch.float64, device=DEVICE)
    found, expected = both(
        compact, options, logprobs, behavior, chunks or None, reduction=reduction, sequence_scale=scale
    )
    if static:  # of ghosts nothing is asked but that they count nowhere: weights and coefficients
        ghosts = ~compact.counts
        assert not found[1][ghosts].any() and not found[4][ghosts].any()
        found[3], expected[3] = found[3][~ghosts], expected[3][~ghosts]
    assert_same(found, expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("chunk", [1, 5, triton_weights.BLOCK, triton_weights.BLOCK + 1, 10**6])
def test_sums_are_carried_from_block_to_block_and_from_chunk_to_chunk(level, chunk):
    """A sequence over many blocks and chunks between others that begin, end and lie at their edges."""
    B = triton_weights.BLOCK
    lengths = (1, 1, B - 2, LONG, 0, B, 1, 2 * B, 3) if chunk > 5 else (1, 12, 0, 5, 5, 1, 9)
    pack = sequences(lengths)
    n = pack.tokens
    logprobs, behavior = random_logprobs(n)
    options = PEAROptions(
        level=level, block_size=5, gamma=0.99, log_ratio_clip=(-0.2, 0.2), log_weight_clip=(-40.0, 40.0)
    )
    edges = [*range(0, n, chunk), n]
    found, expected = both(pack, options, logprobs, behavior, list(zip(edges[:-1], edges[1:], strict=True))[::-1])
    assert_same(found, expected)


@pytest.mark.parametrize(
    "level, block_size",
    [("token", 4), ("sequence", 4), *[("block", size) for size in (1, 4, LONG - 1, LONG, LONG + 1, 2**62)]],
)
def test_against_sums_that_are_exact(level, block_size):
    """math.fsum, token by token, of a sequence longer than a program takes at a time."""
    logprobs, behavior = random_logprobs(LONG, 3)
    options = dict(
        level=level, block_size=block_size, gamma=0.999, log_ratio_clip=(-0.1, 0.1), log_weight_clip=(-9.0, 9.0)
    )
    found = pear_weights(logprobs.float(), behavior.float(), backend="triton", **options)
    delta = (logprobs.float().double() - behavior.float().double()).clamp(-0.1, 0.1).tolist()
    step = 1 if level == "token" else min(block_size, LONG)
    for t in (0, 1, 2, LONG // 2, LONG - 2, LONG - 1):
        first = 0 if level == "sequence" else min((t // step + 1) * step, LONG)
        log_g = math.fsum(delta[first:]) + (0 if level == "sequence" else (LONG - first) * math.log(0.999))
        assert found[t].item() == pytest.approx(math.exp(min(max(log_g, -9.0), 9.0)), rel=1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_one_token_none_and_only_empty_sequences(level):
    options = PEAROptions(level=level)
    for lengths in ((1,), (0, 1, 0), (0, 0), (1, 1, 1)):
        pack = sequences(lengths)
        logprobs, behavior = random_logprobs(pack.tokens)
        found, expected = both(pack, options, logprobs, behavior)
        assert_same(found, expected)
        if level != "sequence":  # nothing comes after the last token of a sequence
            assert (found[1] == 1).all()


@pytest.mark.parametrize("level", LEVELS)
def test_nan_stays_in_its_sequence(level):
    lengths = (30, 80, 30)
    pack = sequences(lengths)
    logprobs, behavior = random_logprobs(140)
    logprobs[60] = math.nan
    options = PEAROptions(level=level)
    found, expected = both(pack, options, logprobs, behavior, [(100, 140), (45, 100), (0, 45)])
    assert_same(found[1], expected[1])
    assert_same(found[3:], expected[3:])
    spoilt = found[1].isnan()
    assert not spoilt[:30].any() and not spoilt[110:].any() and spoilt[30:58].all()
    assert found[0].isnan() and expected[0].isnan()  # the loss says so


def test_statistics_on_the_edges_of_their_clips():
    """A ratio on its clip is not beyond it; a weight on its clip is on it; NaN is neither."""
    pack = sequences((4, 3))
    ratio = torch.tensor([-0.25, -0.5, 0.5, 0.25, 0.75, 0.5, -0.75], dtype=torch.float64, device=DEVICE)
    logprobs = torch.full_like(ratio, -2.0)
    options = PEAROptions(block_size=1, gamma=1.0, log_ratio_clip=(-0.5, 0.5), log_weight_clip=(-0.5, 0.25))
    found, expected = both(pack, options, logprobs, logprobs - ratio)
    assert_same(found, expected)
    # log G: 0.25 0.75 0.25 0 | 0 -0.5 0
    assert found[3].tolist() == [0.25, 0.75, 0.25, 0.0, 0.0, -0.5, 0.0]
    stats = dict(zip(objectives.STATS, found[2].tolist(), strict=True))
    assert stats["ratio_clipped_low"] == pytest.approx(1 / 7) and stats["ratio_clipped_high"] == pytest.approx(1 / 7)
    assert stats["weight_floor"] == pytest.approx(1 / 7) and stats["weight_ceiling"] == pytest.approx(3 / 7)


def test_tokens_are_counted_once():
    """Whoever asks for weights or coefficients meanwhile, however often."""
    pack = sequences((9, 20))
    logprobs, behavior = random_logprobs(29)
    for level in LEVELS:
        objective = pear_objective(behavior, pack, PEAROptions(level=level), "mean", weights=triton_weights.PEARWeights)
        for begin, end in [(20, 29), (9, 20), (0, 9)]:
            objective.observe(begin, end, logprobs[begin:end])
            if level != "sequence":
                objective.coefficients(begin, end)
        objective.coefficients(9, 29)
        objective.weights.weights(0, 29)
        stats = objective.finish(logprobs)[2]
        assert stats[0].item() == pytest.approx(-logprobs.mean().item(), rel=1e-12)
        assert torch.equal(objective.finish(logprobs)[2], stats)


def test_the_public_function_runs_the_kernel(monkeypatch):
    launches = []
    launch = triton_weights.launch
    monkeypatch.setattr(triton_weights, "launch", lambda *a, **k: (launches.append(a[0]), launch(*a, **k)))
    logprobs, behavior = (x.float().view(2, 15) for x in random_logprobs(30))
    mask = torch.arange(30, device=DEVICE).view(2, 15) % 4 != 1
    found = pear_weights(logprobs, behavior, mask, level="block", block_size=3, backend="triton")
    assert launches == [triton_weights.scan_and_weigh]
    expected = pear_weights(logprobs, behavior, mask, level="block", block_size=3, backend="torch")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert found.dtype == torch.float32 and not found[~mask].any()
