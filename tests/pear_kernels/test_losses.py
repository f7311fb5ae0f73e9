"""linear_pear_loss against the naive float64 loss on full logits, and what must not change it."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import count_products, gradients, make_distill_problem, make_problem, relative_error, workspace

from pear_kernels import linear_pear_loss
from pear_kernels.engine.packing import cut
from pear_kernels.objectives.pear import STATS

LEVELS = ["token", "block", "sequence"]
UPSTREAM = 3.7  # the loss is one term of many, so its upstream gradient is not 1


def assert_matches_naive(problem, tolerance=1e-12, **overrides):
    out, leaves = problem.ours(**overrides)
    (loss, logprobs, weights), exact_leaves = problem.naive(**overrides)
    torch.testing.assert_close(out.loss.double(), loss, rtol=tolerance, atol=0)
    torch.testing.assert_close(out.logprobs.double(), logprobs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out.weights.double(), weights, rtol=10 * tolerance, atol=0)
    pairs = zip(gradients(out.loss * UPSTREAM, leaves), gradients(loss * UPSTREAM, exact_leaves), strict=True)
    for ours, exact in pairs:
        assert relative_error(ours, exact) < tolerance


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 12, 25, None])
def test_chunk_sweep(level, rows):
    problem = make_problem(level=level, block_size=3, V=37)
    assert_matches_naive(problem, workspace_bytes=rows and workspace(rows, 37))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "sequence_mean"])
@pytest.mark.parametrize(
    "head",
    [{}, {"bias": True}, {"temperature": 0.7}, {"softcap": 2.5}, {"bias": True, "temperature": 1.6, "softcap": 4.0}],
)
def test_heads_and_reductions(level, reduction, head):
    scale = torch.tensor([0.5, 2.0, 7.0, -1.0, 0.0], dtype=torch.float64)
    problem = make_problem(
        level=level, reduction=reduction, sequence_scale=scale, workspace_bytes=workspace(4, 37), **head
    )
    assert_matches_naive(problem)
    assert_matches_naive(problem, denominator=11.0)


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda lengths: sum(lengths) > 0),
    level=st.sampled_from(LEVELS),
    block_size=st.integers(1, 20),
    rows=st.integers(1, 40),
    vocabulary=st.integers(2, 70),
    ignored=st.sampled_from([0.0, 0.4, 0.9]),
    drift=st.sampled_from([-0.5, 0.0, 0.5]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_random_packs(lengths, level, block_size, rows, vocabulary, ignored, drift, seed):
    problem = make_problem(
        lengths, V=vocabulary, ignored=ignored, drift=drift, seed=seed, level=level, block_size=block_size
    )
    if (problem.target >= 0).any():
        assert_matches_naive(problem, tolerance=1e-10, workspace_bytes=workspace(rows, vocabulary))


@pytest.mark.parametrize("level", LEVELS)
def test_float32(level):
    problem = make_problem((40, 3, 200, 90), V=301, D=32, dtype=torch.float32, level=level, bias=True)
    out, leaves = problem.ours(workspace_bytes=workspace(70, 301, 4))
    assert out.loss.dtype == out.logprobs.dtype == out.weights.dtype == torch.float32
    (loss, _, weights), exact_leaves = problem.naive()
    assert out.loss.item() == pytest.approx(loss.item(), rel=5e-6)
    torch.testing.assert_close(out.weights.double(), weights, rtol=1e-4, atol=0)
    for ours, exact in zip(gradients(out.loss, leaves), gradients(loss, exact_leaves), strict=True):
        assert relative_error(ours, exact) < 5e-6


@pytest.mark.parametrize("level", LEVELS)
def test_packing_order_changes_nothing(level):
    lengths = (7, 4, 12, 5)
    pack = make_problem(lengths, level=level)
    bounds = pack.cu_seqlens.tolist()
    order = [2, 0, 3, 1]
    index = torch.cat([torch.arange(bounds[s], bounds[s + 1]) for s in order])
    shuffled = make_problem(tuple(lengths[s] for s in order), level=level)
    shuffled.hidden, shuffled.target = pack.hidden[index], pack.target[index]
    shuffled.behavior_logprobs, shuffled.weight = pack.behavior_logprobs[index], pack.weight
    (a, leaves), (b, shuffled_leaves) = pack.ours(), shuffled.ours()
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(a.weights[index], b.weights, rtol=1e-13, atol=0)
    grads, shuffled_grads = gradients(a.loss, leaves), gradients(b.loss, shuffled_leaves)
    torch.testing.assert_close(grads[0][index], shuffled_grads[0], rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(grads[1], shuffled_grads[1], rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("kind", ["equal policies", "one block"])
def test_reduces_to_cross_entropy(kind):
    problem = make_problem((9, 14), ignored=0.2)
    if kind == "one block":
        options = {"level": "block", "block_size": 14}
    else:
        options = {"gamma": 1.0}
        logits = problem.hidden @ problem.weight.T
        problem.behavior_logprobs = -F.cross_entropy(logits, problem.target, reduction="none")
    out, leaves = problem.ours(**options)
    exact_leaves = problem.leaves()
    exact = F.cross_entropy(exact_leaves[0] @ exact_leaves[1].T, problem.target)
    torch.testing.assert_close(out.loss, exact, rtol=1e-12, atol=0)
    for ours, theirs in zip(gradients(out.loss, leaves), gradients(exact, exact_leaves), strict=True):
        assert relative_error(ours, theirs) < 1e-12


@pytest.mark.parametrize("level", LEVELS)
def test_no_gradient_flows_through_the_weights(level):
    # finite differences of sum_t G_t(fixed) * nll_t, which autograd through our loss must reproduce
    problem = make_problem((6, 5), V=11, D=4, level=level, ignored=0.0)
    out, leaves = problem.ours(reduction="sum")
    frozen = out.weights
    step, ours = 1e-6, gradients(out.loss, leaves)
    rng = torch.Generator().manual_seed(1)
    for leaf, gradient in zip(leaves, ours, strict=True):
        direction = torch.randn(leaf.shape, generator=rng, dtype=torch.float64)

        def at(s, leaf=leaf, direction=direction):
            moved = [(x + s * direction if x is leaf else x).detach() for x in leaves]
            nll = F.cross_entropy(moved[0] @ moved[1].T, problem.target, reduction="none")
            return (frozen * nll).sum().item()

        slope = (at(step) - at(-step)) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-6)
    behavior = problem.behavior_logprobs.requires_grad_()
    out = linear_pear_loss(leaves[0], leaves[1], problem.target, behavior, cu_seqlens=problem.cu_seqlens, level=level)
    assert torch.autograd.grad(out.loss, behavior, allow_unused=True) == (None,)


# ---- edges


@pytest.mark.parametrize("make", [make_problem, make_distill_problem])
@pytest.mark.parametrize("normalize", ["sequence", "batch"])
def test_nothing_to_normalize(make, normalize):
    """Loss and gradients are 0 without a token that counts, in the reference too."""
    problem = make((4, 0, 3), ignored=1.0, normalize=normalize)
    (loss, _, weights), exact_leaves = problem.naive()
    out, leaves = problem.ours()
    for value in (loss, weights, out.loss, *gradients(loss, exact_leaves), *gradients(out.loss, leaves)):
        assert (value == 0).all()


@pytest.mark.parametrize("level", LEVELS)
def test_sequences_that_end_on_a_chunk_edge_and_span_several(level):
    problem = make_problem((4, 4, 16, 8, 5), level=level, ignored=0.0)
    assert_matches_naive(problem, workspace_bytes=workspace(4, 37))


@pytest.mark.parametrize("level", LEVELS)
def test_nan_stays_in_its_sequence(level):
    problem = make_problem((20, 30, 20), ignored=0.0, level=level)
    clean, _ = problem.ours(workspace_bytes=workspace(16, 37))
    problem.hidden[35] = math.nan
    out, _ = problem.ours(workspace_bytes=workspace(16, 37))
    assert out.loss.isnan()
    others = torch.ones(70, dtype=torch.bool)
    others[20:50] = False
    torch.testing.assert_close(out.weights[others], clean.weights[others], rtol=1e-13, atol=0)
    assert out.weights[20:32].isnan().all()  # tokens before it look at it, but for those of its own block


# ---- what it costs: rows that go through each product


@pytest.fixture
def products(monkeypatch):
    return count_products(monkeypatch)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("trained", ["both", "hidden", "weight", "neither"])
def test_products_of_valid_tokens_only(products, level, trained):
    problem = make_problem((30, 40, 30), level=level)
    n = int((problem.target >= 0).sum())
    hidden = problem.hidden.requires_grad_(trained in ("both", "hidden"))
    weight = problem.weight.requires_grad_(trained in ("both", "weight"))
    out = linear_pear_loss(
        hidden, weight, problem.target, problem.behavior_logprobs, cu_seqlens=problem.cu_seqlens, level=level,
        workspace_bytes=workspace(20, 37),
    )  # fmt: skip
    assert n < 100
    twice = 0
    if level == "sequence" and trained in ("both", "weight"):
        # of each sequence longer than a chunk but the first, all chunks are made once more but the last one
        counts = [int((part >= 0).sum()) for part in problem.target.tensor_split(problem.cu_seqlens[1:-1].tolist())]
        twice = sum(cut(0, count, 20)[-1][0] for count in [count for count in counts if count > 20][1:])
    assert products == {"logits": n + twice, "hidden": n * hidden.requires_grad, "weight": n * weight.requires_grad}
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    if leaves:
        (exact, _, _), exact_leaves = problem.naive()
        exact_grads = dict(zip(("hidden", "weight"), gradients(exact, exact_leaves), strict=True))
        for leaf, ours in zip(leaves, gradients(out.loss, leaves), strict=True):
            assert relative_error(ours, exact_grads["hidden" if leaf is hidden else "weight"]) < 1e-12


@pytest.mark.parametrize(
    "lengths, rows, passes", [((10, 100, 5), 20, 1), ((100, 100, 100), 20, 2), ((100, 100, 100), 400, 1)]
)
def test_sequence_level_is_three_products_unless_memory_forbids(products, lengths, rows, passes):
    # with 400 rows no sequence is longer than a chunk
    problem = make_problem(lengths, ignored=0.0, level="sequence", D=64)
    n = sum(lengths)
    out, leaves = problem.ours(workspace_bytes=workspace(rows, 37))
    # of each long sequence but the first, all chunks are seen once more but that of 20 rows which completes it
    twice = n if passes == 1 else n + sum(length - 20 for length in lengths[1:])
    assert products == {"logits": twice, "hidden": n, "weight": n}
    (loss, _, _), exact_leaves = problem.naive()
    for ours, exact in zip(gradients(out.loss, leaves), gradients(loss, exact_leaves), strict=True):
        assert relative_error(ours, exact) < 1e-12


@pytest.mark.parametrize("trained", ["weight", "bias", "hidden bias", "weight bias", "hidden weight bias"])
@pytest.mark.parametrize("rows", [1, 20, 60])
def test_sequence_level_whatever_is_trained(trained, rows):
    problem = make_problem((0, 40, 1, 49, 10, 0), level="sequence", bias=True, D=4)
    names = ("hidden", "weight", "bias")
    leaves = [leaf.requires_grad_(name in trained.split()) for name, leaf in zip(names, problem.leaves(), strict=True)]
    out = linear_pear_loss(
        leaves[0], leaves[1], problem.target, problem.behavior_logprobs, bias=leaves[2], cu_seqlens=problem.cu_seqlens,
        level="sequence", workspace_bytes=workspace(rows, 37),
    )  # fmt: skip
    (loss, _, _), exact_leaves = problem.naive()
    exact = dict(zip(names, gradients(loss, exact_leaves), strict=True))
    ours = dict(zip(trained.split(), gradients(out.loss, [x for x in leaves if x.requires_grad]), strict=True))
    for name, gradient in ours.items():
        assert relative_error(gradient, exact[name]) < 1e-12, name


def test_chunks_without_weight_skip_their_gradient_products(products):
    scale = torch.tensor([1.0, 0.0], dtype=torch.float64)
    problem = make_problem((32, 64), ignored=0.0, sequence_scale=scale)
    out, leaves = problem.ours(workspace_bytes=workspace(32, 37))
    assert products == {"logits": 96, "hidden": 32, "weight": 32}
    assert not gradients(out.loss, leaves)[0][32:].any()
    assert_matches_naive(problem, workspace_bytes=workspace(32, 37))


# ---- accumulation, statistics, faces


def test_denominator_makes_accumulation_equal_one_batch():
    problem = make_problem((20, 30, 10), reduction="mean")
    whole, leaves = problem.ours()
    expected = gradients(whole.loss, leaves)
    n = int((problem.target >= 0).sum())
    leaves, total = problem.leaves(), 0.0
    for begin, end in [(0, 20), (20, 60)]:
        bounds = torch.tensor([0, 20] if begin == 0 else [0, 30, 40])
        out = linear_pear_loss(
            leaves[0][begin:end], leaves[1], problem.target[begin:end], problem.behavior_logprobs[begin:end],
            cu_seqlens=bounds, denominator=torch.tensor(n),
        )  # fmt: skip
        out.loss.backward()
        total += out.loss.item()
    assert total == pytest.approx(whole.loss.item(), rel=1e-12)
    for leaf, exact in zip(leaves, expected, strict=True):
        assert relative_error(leaf.grad, exact) < 1e-12


def test_statistics_are_what_their_names_say():
    problem = make_problem((300, 200), drift=-0.2, ignored=0.2, log_weight_clip=(-3.0, 1.0))
    out, _ = problem.ours()
    assert tuple(out.stats) == (*STATS, "token_accuracy")
    valid = problem.target >= 0
    p, q, w = out.logprobs[valid].numpy(), problem.behavior_logprobs[valid].numpy(), out.weights[valid].numpy()
    expected = {
        "nll": -p.mean(),
        "log_ratio_mean": (p - q).mean(),
        "ratio_clipped_low": (p - q < -0.08).mean(),
        "ratio_clipped_high": (p - q > 0.3).mean(),
        "weight_mean": w.mean(),
        "weight_floor": (abs(w - math.exp(-3)) < 1e-12).mean(),
        "weight_ceiling": (abs(w - math.exp(1)) < 1e-12).mean(),
        "effective_sample_size": w.sum() ** 2 / (w.size * (w**2).sum()),
        "tokens": w.size,
    }
    assert 0 < expected["weight_floor"] < 1
    for name, value in expected.items():
        assert not out.stats[name].requires_grad and out.stats[name].dim() == 0
        assert out.stats[name].item() == pytest.approx(value, rel=1e-12), name
