"""`block_ids` and the options against collapse on the kernels: the scan against its PyTorch, losses against float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_problems import DEVICE, assert_matches_naive, chunk_bytes, kernel_problem
from problems import gradients, make_distill_problem, random_blocks
from test_kernel_weights import assert_same, both, random_logprobs, sequences

from pear_kernels import pear_weights
from pear_kernels.backends.triton import pear_weights as triton_weights
from pear_kernels.backends.triton import tiles
from pear_kernels.options import PEAROptions

B = triton_weights.BLOCK
OPTIONS = {
    "none": {},
    "clip_blocks": {"clip_blocks": True},
    "center": {"center": True},
    "clip_length": {"clip_length": 7},
    "normalize sequence": {"normalize": "sequence"},
    "normalize batch": {"normalize": "batch"},
    "all": {"clip_blocks": True, "center": True, "clip_length": 9, "normalize": "sequence"},
}
AT_SEQUENCE_LEVEL = ["none", "clip_blocks", "clip_length", "normalize batch"]
CASES = [
    (level, name)
    for level in ("token", "block", "sequence")
    for name in OPTIONS
    if level != "sequence" or name in AT_SEQUENCE_LEVEL
]


def edges_to_chunks(n: int, edges) -> list[tuple[int, int]]:
    return list(itertools.pairwise(sorted({0, n, *(edge for edge in edges if edge < n)})))[::-1]


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    ignored=st.sampled_from([0.2, 0.0, 0.7]),
    static=st.booleans(),
    case=st.sampled_from([case for case in CASES if case[0] != "token" or case[1] in ("center", "clip_length")]),
    by_ids=st.sampled_from([True, True, True, False]),
    longest=st.sampled_from([1, 3, 9, 60]),
    without=st.sampled_from([0.3, 0.0, 1.0]),
    ratio_clip=st.sampled_from([(-0.08, 0.3), (-1.0, 1.0), (-0.5, -0.1), (-math.inf, math.inf)]),
    reduction=st.sampled_from(["mean", "sequence_mean"]),
    cuts=st.lists(st.integers(0, 240), max_size=4),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50, deadline=None)
def test_random_packs(lengths, ignored, static, case, by_ids, longest, without, ratio_clip, reduction, cuts, seed):
    level, name = case
    valid = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed)) >= ignored
    compact = sequences(lengths, valid, static)
    logprobs, behavior = random_logprobs(compact.tokens, seed)
    ids = None
    if by_ids and level != "token":
        ids = compact.take(random_blocks(lengths, valid, seed=seed % 1000, longest=longest, without=without).to(DEVICE))
        behavior[ids < 0] = math.nan
    options = PEAROptions(
        level=level,
        block_size=longest,
        gamma=0.97,
        log_ratio_clip=ratio_clip,
        log_weight_clip=(-9.0, 4.0),
        **OPTIONS[name],
    )
    scale = torch.linspace(-1, 2, len(lengths), dtype=torch.float64, device=DEVICE)
    chunks = edges_to_chunks(compact.tokens, cuts) or None
    found, expected = both(
        compact, options, logprobs, behavior, chunks, reduction=reduction, sequence_scale=scale, block_ids=ids
    )
    if static:  # of ghosts nothing is asked but that they count nowhere: weights and coefficients
        ghosts = ~compact.counts
        assert not found[1][ghosts].any() and not found[4][ghosts].any()
        found[3], expected[3] = found[3][~ghosts], expected[3][~ghosts]
    assert_same(found, expected)


@pytest.mark.parametrize("level, name", [case for case in CASES if case[0] != "token"])
@pytest.mark.parametrize("chunk", [B - 1, B, 10**6])
def test_blocks_longer_than_a_program_takes_at_a_time(level, name, chunk):
    """Blocks of three times that, that end and begin at its edges and at those of chunks; -1 on each side of them."""
    lengths = (2, 3 * B + 7, B, 5 * B, 1)
    pack = sequences(lengths)
    n = pack.tokens
    ids = torch.zeros(n, dtype=torch.int32)
    begin = 2 + lengths[1] + B
    ids[2 + B : 2 + lengths[1]] = 3
    ids[begin : begin + 3 * B], ids[begin + 3 * B : begin + 5 * B - 1], ids[begin + 5 * B - 1] = 1, 2, 7
    for hole in (2, 2 + B, begin, begin + B - 1, begin + B, begin + 3 * B, n - 2):
        ids[hole] = -1
    logprobs, behavior = random_logprobs(n)
    options = PEAROptions(level=level, log_ratio_clip=(-0.02, 0.03), log_weight_clip=(-40.0, 40.0), **OPTIONS[name])
    chunks = edges_to_chunks(n, range(0, n, chunk))
    found, expected = both(pack, options, logprobs, behavior, chunks, block_ids=ids.to(DEVICE))
    assert_same(found, expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_infinities_are_clipped_and_nan_stays_in_its_sequence(name):
    lengths = (30, 80, 30)
    pack = sequences(lengths)
    ids = random_blocks(lengths, longest=30).to(DEVICE)
    ids[60] = ids[59].clamp(min=0) if ids[59] >= 0 else ids[30:60].amax()
    logprobs, behavior = random_logprobs(140)
    options = PEAROptions(level="block", **OPTIONS[name])
    for value in (-math.inf, math.nan):
        logprobs[60] = value
        found, expected = both(pack, options, logprobs, behavior, [(100, 140), (45, 100), (0, 45)], block_ids=ids)
        assert_same(found[1], expected[1])
        assert_same(found[3:], expected[3:])
        if options.normalize != "batch":
            spoilt = found[1].isnan()
            assert spoilt[30:40].all() == math.isnan(value) and not spoilt[:30].any() and not spoilt[110:].any()


def test_the_public_function_runs_the_kernel(monkeypatch):
    launches = []
    launch = triton_weights.launch
    monkeypatch.setattr(triton_weights, "launch", lambda *a, **k: (launches.append(a[0]), launch(*a, **k)))
    logprobs, behavior = (x.float().view(2, 15) for x in random_logprobs(30))
    mask = torch.arange(30, device=DEVICE).view(2, 15) % 4 != 1
    ids = random_blocks((15, 15)).view(2, 15).to(DEVICE)
    options = dict(OPTIONS["all"], level="block", block_ids=ids)
    found = pear_weights(logprobs, behavior, mask, backend="triton", **options)
    assert launches == [triton_weights.scan_and_weigh]
    expected = pear_weights(logprobs, behavior, mask, backend="torch", **options)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert not found[~mask].any()


# ---- losses and gradients


def blocks_problem(lengths=(9, 0, 14, 1), *, level: str, **options):
    problem = kernel_problem(lengths, V=45, level=level, **options)
    if level != "token":
        ids = random_blocks(lengths, problem.target.cpu() >= 0, longest=9).to(DEVICE)
        problem.options["block_ids"] = ids
        problem.behavior_logprobs[ids < 0] = math.nan
    return problem


@pytest.mark.parametrize("level, name", [case for case in CASES if case[0] != "token"])
def test_losses_and_gradients(level, name):
    """Blocks of up to nine tokens in chunks of four."""
    problem = blocks_problem(level=level, **OPTIONS[name])
    assert_matches_naive(problem, workspace_bytes=chunk_bytes(problem, 4))


@pytest.mark.parametrize("name", ["normalize sequence", "normalize batch"])
def test_the_targets_own_term_is_scaled_too(name, monkeypatch):
    """The kernels keep that of dW and db apart until the walk is over."""
    monkeypatch.setenv(tiles.VARIABLE, "plain")
    problem = blocks_problem((12, 5), level="token", bias=True, **OPTIONS[name])
    assert_matches_naive(problem, workspace_bytes=chunk_bytes(problem, 6), reduction="sequence_mean")


@pytest.mark.parametrize("level, name", [("block", "all"), ("token", "normalize batch"), ("sequence", "clip_blocks")])
def test_distillation(level, name):
    problem = make_distill_problem((9, 4), D=24, V=45, dtype=torch.float32, level=level, nll_coef=0.2, **OPTIONS[name])
    if level != "token":
        problem.options["block_ids"] = random_blocks((9, 4))
    (loss, _, weights), exact_leaves = problem.naive()
    for field in ("hidden", "weight", "target", "behavior_logprobs", "cu_seqlens"):
        setattr(problem, field, getattr(problem, field).to(DEVICE))
    teacher = problem.options["teacher"]
    problem.options["teacher"] = teacher._replace(hidden=teacher.hidden.to(DEVICE), weight=teacher.weight.to(DEVICE))
    if level != "token":
        problem.options["block_ids"] = problem.options["block_ids"].to(DEVICE)
    out, leaves = problem.ours(backend="triton", workspace_bytes=chunk_bytes(problem, 6) * 3)
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(out.weights.cpu().double(), weights, rtol=1e-4, atol=0)
    for ours, exact in zip(gradients(out.loss, leaves), gradients(loss, exact_leaves), strict=True):
        assert (ours.cpu() - exact).norm() < 2e-5 * exact.norm()


@pytest.mark.parametrize("name", ["clip_blocks", "center", "normalize sequence"])
def test_beside_wrong_responses(name):
    label = torch.tensor([True, False, True, False, True], device=DEVICE)
    options = {**OPTIONS[name], "sequence_label": label, "logprob_floor": -math.inf}
    problem = blocks_problem((5, 4, 0, 7, 3), level="block", **options)
    assert_matches_naive(problem, workspace_bytes=chunk_bytes(problem, 4))


@pytest.mark.parametrize("level, name", [("block", "all"), ("block", "normalize batch"), ("sequence", "clip_blocks")])
def test_bitwise_repeatable(level, name):
    problem = blocks_problem(level=level, ignored=0.0, **OPTIONS[name])
    problem.target[::3] = 5  # many tokens share a row of dW
    runs = []
    for _ in range(2):
        out, leaves = problem.ours(workspace_bytes=chunk_bytes(problem, 8))
        runs.append([out.loss.detach(), out.logprobs, out.weights, *gradients(out.loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
