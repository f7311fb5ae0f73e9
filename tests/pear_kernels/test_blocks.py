"""`block_ids` and the options against collapse, against the naive formulas, and what must not change their answers."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    assert_matches_naive,
    count_products,
    gradients,
    make_distill_problem,
    make_problem,
    pear_objective,
    random_blocks,
    relative_error,
    workspace,
)
from test_static import NoSync, as_on_a_device

from pear_kernels import LinearDistillLoss, LinearPEARLoss, linear_pear_loss, pear_weights
from pear_kernels.engine import packing
from pear_kernels.engine.packing import pack_tokens
from pear_kernels.engine.schedule import Wanted
from pear_kernels.engine.walk import Walk
from pear_kernels.formulas.pear_weights import PEARWeights
from pear_kernels.options import PEAROptions
from pear_kernels.reference import naive_weights

LEVELS = ["token", "block", "sequence"]
OPTIONS = {
    "none": {},
    "clip_blocks": {"clip_blocks": True},
    "center": {"center": True},
    "clip_length": {"clip_length": 3},
    "normalize sequence": {"normalize": "sequence"},
    "normalize batch": {"normalize": "batch"},
    "center, normalize": {"center": True, "normalize": "sequence"},
    "all": {"clip_blocks": True, "center": True, "clip_length": 4, "normalize": "batch"},
}
# without center and normalize "sequence", which the sequence level refuses
AT_SEQUENCE_LEVEL = ["none", "clip_blocks", "clip_length", "normalize batch"]
CASES = [(level, name) for level in LEVELS for name in OPTIONS if level != "sequence" or name in AT_SEQUENCE_LEVEL]
LENGTHS = (7, 1, 0, 12, 5)
COUPLED = [name for name, options in OPTIONS.items() if "center" in options or options.get("normalize") == "sequence"]


def blocks_problem(lengths=LENGTHS, *, level: str = "block", longest: int = 4, without: float = 0.2, **options):
    """`make_problem` with block ids, but at level "token"; no log-prob stands where a token has no log-ratio."""
    problem = make_problem(lengths, level=level, **options)
    if level != "token":
        counts, seed = problem.target >= 0, options.get("seed", 0)
        ids = random_blocks(lengths, counts, seed=seed, longest=longest, without=without)
        problem.options["block_ids"] = ids
        problem.behavior_logprobs[ids < 0] = math.nan
    return problem


# ---- the weights


@given(
    lengths=st.lists(st.integers(0, 14), min_size=1, max_size=6),
    ignored=st.sampled_from([0.2, 0.0, 0.7]),
    case=st.sampled_from(CASES),
    by_ids=st.sampled_from([True, True, True, False]),
    longest=st.integers(1, 9),
    without=st.sampled_from([0.3, 0.0, 0.9, 1.0]),
    gamma=st.sampled_from([0.5, 0.99, 1.0]),
    ratio_clip=st.sampled_from([(-0.08, 0.3), (-1.0, 1.0), (-0.5, -0.1), (0.0, 0.0), (-math.inf, math.inf)]),
    weight_clip=st.sampled_from([(-10.0, 5.0), (-0.5, 0.2), (-math.inf, 20.0)]),
    clip_length=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=200, deadline=None)
def test_random_packs_match_the_formula(
    lengths, ignored, case, by_ids, longest, without, gamma, ratio_clip, weight_clip, clip_length, seed
):
    level, name = case
    options = dict(OPTIONS[name], level=level, block_size=longest, gamma=gamma)
    options.update(log_ratio_clip=ratio_clip, log_weight_clip=weight_clip)
    if "clip_length" in options:
        options["clip_length"] = clip_length
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(sum(lengths), generator=rng) >= ignored
    logprobs = -3 * torch.rand(len(mask), generator=rng, dtype=torch.float64)
    behavior = (logprobs + 0.3 * torch.randn(len(mask), generator=rng, dtype=torch.float64)).clamp(max=0)
    ids = None
    if by_ids and level != "token":
        ids = random_blocks(lengths, mask, seed=seed % 1000, longest=longest, without=without)
        behavior[ids < 0] = math.nan
    weights = pear_weights(logprobs, behavior, mask, cu_seqlens=bounds, block_ids=ids, **options)
    expected = torch.zeros_like(weights)
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        response = begin + mask[begin:end].nonzero().squeeze(-1)
        of_sequence = None if ids is None else ids[response]
        expected[response] = naive_weights(logprobs[response], behavior[response], block_ids=of_sequence, **options)
    if options.get("normalize") == "batch" and mask.any():
        expected /= expected[mask].mean()
    torch.testing.assert_close(weights, expected, rtol=1e-11, atol=0)


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    cuts=st.lists(st.integers(0, 60), max_size=8),
    longest=st.integers(1, 12),
    clip_blocks=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(max_examples=100, deadline=None)
def test_walking_in_chunks_changes_nothing(lengths, cuts, longest, clip_blocks, seed):
    n = sum(lengths)
    logprobs = -3 * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    behavior = logprobs.roll(1)
    pack = pack_tokens(torch.ones(n, dtype=torch.bool), torch.tensor([0, *lengths]).cumsum(0))
    ids = random_blocks(lengths, seed=seed, longest=longest)
    options = PEAROptions(level="block", clip_blocks=clip_blocks)
    whole = PEARWeights(behavior, pack, options, ids)
    whole.observe(0, n, logprobs)
    walk = PEARWeights(behavior, pack, options, ids)
    edges = sorted({0, n, *(c for c in cuts if c < n)})
    for begin, end in reversed(list(zip(edges[:-1], edges[1:], strict=True))):
        walk.observe(begin, end, logprobs[begin:end])
        # right as soon as they are observed, also those of a block that goes on to the left
        torch.testing.assert_close(walk.weights(begin, end), whole.weights(begin, end), rtol=1e-13, atol=0)


@pytest.mark.parametrize("level, name", [case for case in CASES if case[0] != "token"])
@pytest.mark.parametrize("size", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_one_size_are_that_block_size(level, name, size, dtype):
    lengths = (13, 0, 30, 1)
    mask = torch.rand(44, generator=torch.Generator().manual_seed(1)) < 0.8
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    logprobs = -3 * torch.rand(44, dtype=torch.float64)
    behavior = -3 * torch.rand(44, dtype=torch.float64)
    before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
    ids = torch.cat([(before[b:e] - before[b]) // size for b, e in itertools.pairwise(bounds.tolist())]).to(dtype)
    options = dict(OPTIONS[name], level=level, cu_seqlens=bounds)
    by_size = pear_weights(logprobs, behavior, mask, block_size=size, **options)
    assert torch.equal(pear_weights(logprobs, behavior, mask, block_ids=5 + 3 * ids, **options), by_size)


def test_tokens_without_a_ratio_by_hand():
    # blocks of 0.1; 0.2; 0.3 + 0.4, and tokens of -1 before, between, inside and after
    ids = torch.tensor([-1, 4, -1, 5, 9, -1, 9, -1])
    ratio = torch.tensor([7.0, 0.1, 7.0, 0.2, 0.3, 7.0, 0.4, 7.0], dtype=torch.float64)
    behavior = torch.full_like(ratio, -10.0)
    options = dict(level="block", block_ids=ids, gamma=0.9, log_ratio_clip=(-1.0, 1.0))
    log_g = pear_weights(behavior + ratio, behavior, **options).log()
    after = [1.0 + 4 * math.log(0.9), 0.9 + 3 * math.log(0.9), 0.9 + 3 * math.log(0.9), 0.7 + 2 * math.log(0.9)]
    expected = torch.tensor([*after, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(log_g, expected, rtol=0, atol=1e-13)
    options.update(level="sequence")
    log_g = pear_weights(behavior + ratio, behavior, **options).log()
    torch.testing.assert_close(log_g, torch.full_like(ratio, 1.0), rtol=0, atol=1e-13)
    # the block of two is clipped to twice the bound; 0.3 and 0.4 alone would be to 0.35 each
    options.update(level="block", log_ratio_clip=(-1.0, 0.34), clip_blocks=True)
    log_g = pear_weights(behavior + ratio, behavior, **options).log()
    assert log_g[3].item() == pytest.approx(0.68 + 2 * math.log(0.9), abs=1e-13)
    by_token = pear_weights(behavior + ratio, behavior, **options | {"clip_blocks": False}).log()
    assert by_token[3].item() == pytest.approx(0.3 + 0.34 + 2 * math.log(0.9), abs=1e-13)


@pytest.mark.parametrize("level", ["block", "sequence"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_sequence_without_any_ratio_weighs_one(level, name):
    if level == "sequence" and name not in AT_SEQUENCE_LEVEL:
        return
    logprobs, behavior = -torch.rand(9, dtype=torch.float64), torch.full((9,), math.nan, dtype=torch.float64)
    ids = torch.full((9,), -1)
    given_ = dict(block_ids=ids, level=level, cu_seqlens=torch.tensor([0, 4, 9]), gamma=0.5)
    assert torch.equal(pear_weights(logprobs, behavior, **given_, **OPTIONS[name]), torch.ones(9).double())


def test_a_span_with_its_whole_logprob_at_its_first_token():
    """What an alignment of two tokenizers hands over: the sum of a span, at its first token, and 0 at the others."""
    rng = torch.Generator().manual_seed(0)
    ids = random_blocks((60,), seed=3, without=0.1)
    logprobs = -2 * torch.rand(60, generator=rng, dtype=torch.float64)
    behavior = -2 * torch.rand(60, generator=rng, dtype=torch.float64)
    at_first = torch.zeros_like(behavior)
    for block in set(ids[ids >= 0].tolist()):
        members = (ids == block).nonzero()[:, 0]
        at_first[members[0]] = behavior[members].sum()
    options = dict(level="block", block_ids=ids, clip_blocks=True)
    spread, gathered = (pear_weights(logprobs, b, **options) for b in (behavior, at_first))
    torch.testing.assert_close(gathered, spread, rtol=1e-12, atol=0)


def test_what_the_options_are_for():
    """A teacher surer than the student on every token: without an option, G is on its floor; each moves it off."""
    n = 400
    behavior = torch.full((n,), -0.01, dtype=torch.float64)
    logprobs = behavior - torch.linspace(0.04, 0.06, n, dtype=torch.float64)
    plain = pear_weights(logprobs, behavior)
    assert (plain <= math.exp(-10)).double().mean() > 0.4
    centred = pear_weights(logprobs, behavior, center=True, gamma=1.0)
    assert centred.log().abs().max() < 2.0 and centred[0].item() == pytest.approx(1.0, rel=0.1)
    # in 400 tokens the clip is 1/8 of its width: log G moves as far as it could in 50
    scaled = pear_weights(logprobs, behavior, clip_length=50, gamma=1.0)
    assert scaled[0].log().item() == pytest.approx(-0.08 * 50 * 399 / 400, rel=1e-12)
    for normalize in ("sequence", "batch"):
        assert pear_weights(logprobs, behavior, normalize=normalize).mean().item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("name", OPTIONS)
def test_infinities_are_clipped_and_nan_stays_in_its_sequence(name):
    lengths = (20, 30, 20)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    rng = torch.Generator().manual_seed(2)
    logprobs = -torch.rand(70, generator=rng, dtype=torch.float64)
    behavior = -torch.rand(70, generator=rng, dtype=torch.float64)
    ids = random_blocks(lengths, without=0.0)
    options = dict(OPTIONS[name], level="block", block_ids=ids, cu_seqlens=bounds)
    if options.get("normalize") == "batch":
        options["normalize"] = None  # by which every weight is NaN
    logprobs[35] = -1e3
    clean = pear_weights(logprobs, behavior, **options)
    logprobs[35] = -math.inf
    torch.testing.assert_close(pear_weights(logprobs, behavior, **options), clean, rtol=1e-12, atol=0)
    assert clean.isfinite().all()
    logprobs[35] = math.nan
    spoilt = pear_weights(logprobs, behavior, **options)
    others = torch.ones(70, dtype=torch.bool)
    others[20:50] = False
    torch.testing.assert_close(spoilt[others], clean[others], rtol=1e-12, atol=0)
    assert spoilt[20:32].isnan().all() and (spoilt[20:50].isnan().all() or name not in COUPLED)
    ids[35] = -1  # then nobody looks at it but its own loss
    assert pear_weights(logprobs, behavior, **options).isfinite().all()


def test_neighbours_of_an_unclipped_infinity_are_left_alone():
    logprobs = torch.tensor([-1.0, -2.0, -math.inf, -1.0], dtype=torch.float64)
    behavior = torch.full((4,), -1.5, dtype=torch.float64)
    options = dict(log_ratio_clip=(-math.inf, math.inf), gamma=1.0, cu_seqlens=torch.tensor([0, 2, 4]))
    log_g = pear_weights(logprobs, behavior, **options).log()
    torch.testing.assert_close(log_g, torch.tensor([-0.5, 0.0, 0.5, 0.0], dtype=torch.float64))


# ---- the loss


@pytest.mark.parametrize("level, name", CASES)
@pytest.mark.parametrize("rows", [1, 2, 5, None])  # blocks of up to 8 tokens: over eight chunks, four, and two
def test_chunk_sweep(level, name, rows):
    problem = blocks_problem((9, 1, 0, 17, 5), level=level, longest=8, **OPTIONS[name])
    assert_matches_naive(problem, workspace_bytes=rows and workspace(rows, 37))


@pytest.mark.parametrize("level, name", CASES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "sequence_mean"])
def test_heads_and_reductions(level, name, reduction):
    scale = torch.tensor([0.5, 2.0, 7.0, -1.0, 0.0], dtype=torch.float64)
    problem = blocks_problem(
        level=level, reduction=reduction, sequence_scale=scale, workspace_bytes=workspace(4, 37), bias=True,
        temperature=1.6, softcap=4.0, **OPTIONS[name],
    )  # fmt: skip
    assert_matches_naive(problem)
    assert_matches_naive(problem, denominator=11.0)


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda lengths: sum(lengths) > 0),
    case=st.sampled_from(CASES),
    longest=st.integers(1, 20),
    without=st.sampled_from([0.0, 0.3, 1.0]),
    rows=st.integers(1, 40),
    ignored=st.sampled_from([0.0, 0.4]),
    drift=st.sampled_from([-0.5, 0.0, 0.5]),
    D=st.sampled_from([2, 16]),  # with and without room for a dW of a sequence's own
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_random_losses(lengths, case, longest, without, rows, ignored, drift, D, seed):
    level, name = case
    problem = blocks_problem(
        lengths, level=level, longest=longest, without=without, ignored=ignored, drift=drift, D=D, seed=seed % 10**6,
        **OPTIONS[name],
    )  # fmt: skip
    if (problem.target >= 0).any():
        assert_matches_naive(problem, tolerance=1e-10, workspace_bytes=workspace(rows, 37))


@pytest.mark.parametrize("level, name", CASES)
def test_float32(level, name):
    problem = blocks_problem((40, 3, 120, 50), level=level, V=101, D=32, dtype=torch.float32, **OPTIONS[name])
    out, leaves = problem.ours(workspace_bytes=workspace(30, 101, 4))
    (loss, _, weights), exact_leaves = problem.naive()
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(out.weights.double(), weights, rtol=1e-4, atol=0)
    for ours, exact in zip(gradients(out.loss, leaves), gradients(loss, exact_leaves), strict=True):
        assert relative_error(ours, exact) < 1e-5


@pytest.mark.parametrize("level, name", CASES)
def test_no_gradient_flows_through_the_weights(level, name):
    # finite differences of sum_t G_t(fixed) * nll_t, which autograd through our loss must reproduce
    problem = blocks_problem((6, 5), V=11, D=4, level=level, ignored=0.0, **OPTIONS[name])
    out, leaves = problem.ours(reduction="sum", workspace_bytes=workspace(2, 11))
    step, ours = 1e-6, gradients(out.loss, leaves)
    rng = torch.Generator().manual_seed(1)
    for leaf, gradient in zip(leaves, ours, strict=True):
        direction = torch.randn(leaf.shape, generator=rng, dtype=torch.float64)

        def at(s, leaf=leaf, direction=direction):
            moved = [(x + s * direction if x is leaf else x).detach() for x in leaves]
            nll = F.cross_entropy(moved[0] @ moved[1].T, problem.target, reduction="none")
            return (out.weights * nll).sum().item()

        slope = (at(step) - at(-step)) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-6)


@given(case=st.sampled_from(CASES), order=st.permutations(range(4)), pad=st.integers(0, 3), seed=st.integers(0, 9999))
@settings(max_examples=40, deadline=None)
def test_packing_order_and_padding_change_nothing(case, order, pad, seed):
    level, name = case
    lengths = (7, 4, 12, 5)
    pack = blocks_problem(lengths, level=level, seed=seed, **OPTIONS[name])
    out, leaves = pack.ours(workspace_bytes=workspace(5, 37))
    bounds, rows, T = pack.cu_seqlens.tolist(), [], max(lengths) + pad
    for s in order:  # sequence by sequence into rows, padded on either side
        token, left = torch.arange(bounds[s], bounds[s + 1]), int(s % 2 and T - lengths[s])
        rows.append(F.pad(token, (left, T - left - lengths[s]), value=-1))
    index = torch.stack(rows)  # (4, T), -1 at padding
    padding = index < 0
    target, behavior = pack.target[index].masked_fill(padding, -100), pack.behavior_logprobs[index]
    hidden = pack.hidden[index].masked_fill(padding[..., None], math.nan).requires_grad_()
    weight = pack.weight.clone().requires_grad_()
    options = {**pack.options, "level": level}
    if "block_ids" in options:
        options["block_ids"] = options["block_ids"][index]
    again = linear_pear_loss(hidden, weight, target, behavior.masked_fill(padding, math.nan), **options)
    torch.testing.assert_close(again.loss, out.loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(again.weights[~padding], out.weights[index[~padding]], rtol=1e-12, atol=0)
    of_hidden, of_weight = gradients(again.loss, [hidden, weight])
    expected = gradients(out.loss, leaves)
    assert not of_hidden[padding].any()
    torch.testing.assert_close(of_hidden[~padding], expected[0][index[~padding]], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(of_weight, expected[1], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("level, name", CASES)
@pytest.mark.parametrize("trained", ["xw", "x"])
def test_static_packs_have_the_same_answers(level, name, trained, monkeypatch):
    problem = blocks_problem(level=level, sequence_scale=torch.tensor([0.5, 2.0, 7.0, -1.0, 3.0]), **OPTIONS[name])
    for rows, frozen in itertools.product((3, 12, None), (trained == "x",)):
        results = []
        for static in (False, True):
            monkeypatch.setattr(packing, "capturing", lambda static=static: static)
            if static:  # what stands at ignored tokens matters to nobody
                problem.hidden[problem.target < 0] = math.nan
            hidden, weight = problem.leaves()
            out = linear_pear_loss(
                hidden, weight.requires_grad_(not frozen), problem.target, problem.behavior_logprobs,
                cu_seqlens=problem.cu_seqlens, workspace_bytes=rows and workspace(rows, 37), **problem.options,
            )  # fmt: skip
            grads = gradients(out.loss, [hidden] if frozen else [hidden, weight])
            results.append([out.loss.detach(), out.weights, torch.stack(list(out.stats.values())), *grads])
            problem.hidden.nan_to_num_()
        torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", OPTIONS)
def test_static_packs_keep_nan_from_tokens_that_do_not_count(name, monkeypatch):
    """Those of the sequence that it is in; the loss and dW are NaN, as they must be, and so are all by "batch"."""
    monkeypatch.setattr(packing, "capturing", lambda: True)
    problem = blocks_problem(without=0.0, **OPTIONS[name])
    ignored = problem.target < 0
    problem.hidden[17] = math.nan
    assert not ignored[17] and ignored[8:20].any()
    for rows in (5, None):
        out, leaves = problem.ours(workspace_bytes=rows and workspace(rows, 37))
        of_hidden, _ = gradients(out.loss, leaves)
        assert not out.weights[ignored].any() and out.loss.isnan()
        assert not of_hidden[ignored].any() or OPTIONS[name].get("normalize") == "batch"


@pytest.mark.parametrize("level, name", CASES)
def test_nothing_between_the_kernels_waits_for_the_device(level, name, monkeypatch):
    # launches are recorded, not run: this looks at the host's side of them. (test_objective_ops has the PyTorch path)
    pytest.importorskip("triton")
    from pear_kernels.backends.triton import launch
    from pear_kernels.backends.triton.head import Head

    problem = blocks_problem((40, 3, 0, 60), D=16, V=64, level=level, dtype=torch.float32, **OPTIONS[name])
    ids = problem.options.get("block_ids")
    with NoSync(), monkeypatch.context() as patch:
        as_on_a_device(patch)
        patch.setattr(launch, "recorder", [])
        pack = pack_tokens(problem.target != -100, problem.cu_seqlens, static=True)
        options, behavior = PEAROptions(level=level, **OPTIONS[name]), pack.take(problem.behavior_logprobs)
        ids = None if ids is None else pack.take(ids)
        objective = pear_objective(behavior, pack, options, "sequence_mean", torch.ones(4), ids)
        head = Head(problem.weight, None, 1.0, None, torch.float32)
        walk = Walk(problem.hidden, head, problem.target, pack, Wanted(True, True, False), 40 * 600)
        walk.run(objective)
        objective.finish(walk.logprobs)
        assert launch.recorder


@pytest.mark.parametrize("level, name", CASES)
def test_bitwise_repeatable(level, name):
    problem = blocks_problem((60, 90), V=101, D=32, dtype=torch.float32, level=level, **OPTIONS[name])
    runs = []
    for _ in range(2):
        out, leaves = problem.ours(workspace_bytes=workspace(40, 101, 4))
        runs.append([out.loss.detach(), out.logprobs, out.weights, *gradients(out.loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---- statistics


@pytest.mark.parametrize("name", ["none", "clip_blocks", "clip_length", "normalize batch", "center, normalize"])
def test_statistics_are_what_their_names_say(name):
    options = dict(OPTIONS[name], log_weight_clip=(-3.0, 1.0), log_ratio_clip=(-0.05, 0.1))
    problem = blocks_problem((300, 200), drift=-0.05, longest=3, **options)
    out, _ = problem.ours()
    counts = problem.target >= 0
    ids, w = problem.options["block_ids"], out.weights[counts]
    ratio = (out.logprobs - problem.behavior_logprobs).where(ids >= 0, 0.0)
    low, high = torch.full((500,), -0.05).double(), torch.full((500,), 0.1).double()
    for begin, end in ((0, 300), (300, 500)):
        within = slice(begin, end)
        T = int((counts & (ids >= 0))[within].sum())
        if name == "clip_length":
            low[within], high[within] = -0.05 * 3 / T, 0.1 * 3 / T
        if name == "clip_blocks":
            for block in set(ids[within].tolist()) - {-1, -12345}:
                members = begin + (ids[within] == block).nonzero()[:, 0]
                ratio[members] = ratio[members].mean()
    carries = (counts & (ids >= 0))[counts]
    ratio, low, high = ratio[counts], low[counts], high[counts]
    expected = {
        "log_ratio_mean": ratio.mean(),
        "ratio_clipped_low": (carries & (ratio < low)).double().mean(),
        "ratio_clipped_high": (carries & (ratio > high)).double().mean(),
        "weight_mean": w.mean(),
        "effective_sample_size": w.sum() ** 2 / (len(w) * w.square().sum()),
    }
    for key, value in expected.items():
        assert out.stats[key].item() == pytest.approx(value.item(), rel=1e-10), key
    if "normalize" in options:
        assert out.stats["weight_mean"].item() == pytest.approx(1.0, rel=1e-12)
    assert out.stats["ratio_clipped_low"] > 0 and out.stats["ratio_clipped_high"] > 0


# ---- what it costs


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("train_head", [True, False])
def test_products(name, train_head, monkeypatch):
    """Three, or two with a frozen head. Centred weights of a sequence longer than a chunk need its log-probs first."""
    products = count_products(monkeypatch)
    problem = blocks_problem((30, 100, 15), ignored=0.0, D=64, **OPTIONS[name])
    hidden, weight = problem.leaves()
    linear_pear_loss(
        hidden, weight.requires_grad_(train_head), problem.target, problem.behavior_logprobs,
        cu_seqlens=problem.cu_seqlens, workspace_bytes=workspace(50, 37), **problem.options,
    )  # fmt: skip
    again = 50 if OPTIONS[name].get("center") and train_head else 0  # all of the long one's chunks but the last
    assert products == {"logits": 145 + again, "hidden": 145, "weight": 145 * train_head}


# ---- other losses, faces


@pytest.mark.parametrize("level, name", CASES)
@pytest.mark.parametrize("rows", [4, None])
def test_distillation(level, name, rows):
    problem = make_distill_problem(level=level, nll_coef=0.3, **OPTIONS[name])
    if level != "token":
        problem.options["block_ids"] = random_blocks(LENGTHS, problem.target >= 0)
    assert_matches_naive(problem, tolerance=1e-11, workspace_bytes=rows and workspace(rows, 37) * 2)
    offline = make_distill_problem(level=level, top_k=4, divergence="reverse", **OPTIONS[name])
    offline.options.update({k: v for k, v in problem.options.items() if k == "block_ids"})
    assert_matches_naive(offline, tolerance=1e-11, workspace_bytes=rows and workspace(rows, 37) * 2)


@pytest.mark.parametrize("level, name", [case for case in CASES if "batch" not in case[1] and case[1] != "all"])
@pytest.mark.parametrize("rows, D", [(3, 4), (3, 64), (None, 8)])
def test_beside_wrong_responses(level, name, rows, D):
    labels = torch.tensor([True, False, True, False, True])
    options = {**OPTIONS[name], "sequence_label": labels, "negative_lambda": 0.4, "logprob_floor": -3.0}
    problem = blocks_problem((9, 4, 0, 17, 12), level=level, D=D, bias=True, **options)
    assert_matches_naive(problem, tolerance=1e-11, workspace_bytes=rows and workspace(rows, 37))


def test_modules_are_the_functions():
    ours = {"clip_blocks": True, "center": True, "clip_length": 9, "normalize": "batch", "level": "block"}
    problem = blocks_problem(**ours)
    out, leaves = problem.ours()
    ids, theirs = problem.options["block_ids"], problem.leaves()
    module = LinearPEARLoss(**ours)
    tensors = problem.target, problem.behavior_logprobs
    again = module(*theirs, *tensors, block_ids=ids, cu_seqlens=problem.cu_seqlens)
    assert torch.equal(out.loss, again.loss) and torch.equal(out.weights, again.weights)
    assert "clip_length=9" in repr(module) and "center=True" in repr(module)
    for a, b in zip(gradients(out.loss, leaves), gradients(again.loss, theirs), strict=True):
        assert torch.equal(a, b)
    problem = make_distill_problem(block_ids=random_blocks(LENGTHS), **ours)
    out, _ = problem.ours()
    teacher, ids = problem.options["teacher"], problem.options["block_ids"]
    tensors = *problem.leaves(), teacher, problem.target, problem.behavior_logprobs
    again = LinearDistillLoss(**ours)(*tensors, block_ids=ids, cu_seqlens=problem.cu_seqlens)
    assert torch.equal(out.loss, again.loss) and torch.equal(out.weights, again.weights)


def test_compile_keeps_one_graph():
    problem = blocks_problem(dtype=torch.float32, **OPTIONS["all"])
    ids, bounds = problem.options["block_ids"], problem.cu_seqlens

    def loss(hidden, weight):
        options = dict(OPTIONS["all"], level="block", cu_seqlens=bounds, block_ids=ids)
        out = linear_pear_loss(hidden * 1.5, weight, problem.target, problem.behavior_logprobs, **options)
        g = pear_weights(out.logprobs, problem.behavior_logprobs, problem.target >= 0, **options)
        return out.loss + 0.1 * (g * hidden.sum(-1)).sum()

    torch._dynamo.reset()
    leaves, compiled_leaves = problem.leaves(), problem.leaves()
    value, compiled = loss(*leaves), torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled_leaves)
    torch.testing.assert_close(compiled, value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients(compiled, compiled_leaves), gradients(value, leaves), rtol=1e-5, atol=1e-6)
