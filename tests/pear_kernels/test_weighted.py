"""linear_weighted_loss against the naive float64 loss on full logits, and what must not change it."""

import functools
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    WeightedProblem,
    assert_matches_naive,
    count_products,
    gradients,
    make_problem,
    make_weighted_problem,
    relative_error,
    workspace,
)  # fmt: skip
from test_accuracy import hard_problem

from pear_kernels import (
    LinearWeightedLoss,
    linear_distill_loss,
    linear_logprobs,
    linear_weighted_loss,
    pear_weights,
)
from pear_kernels.engine import packing  # fmt: skip
from pear_kernels.objectives.weighted import WEIGHTED_STATS

NAMES = ["none", "dft", "iw-sft", "psft", "asft", "idft"]
WEIGHTINGS = ["tensor", *NAMES]


def function_problem(function, *arguments, **options) -> WeightedProblem:
    """Weights that a function makes."""
    problem = make_weighted_problem(*arguments, **options)
    problem.options["weights"] = function
    return problem


def of_logprobs(logprobs):
    return torch.sin(3 * logprobs)


def of_logprobs_and_places(logprobs, index):
    return torch.cos(logprobs) * (index % 5 - 2)


FUNCTIONS = [of_logprobs, of_logprobs_and_places]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 12, 25, None])
def test_chunk_sweep(weighting, rows):
    problem = make_weighted_problem(weighting=weighting)
    assert_matches_naive(problem, workspace_bytes=rows and workspace(rows, 37))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 12, 25, None])
def test_functions_of_a_chunk(function, rows):
    assert_matches_naive(function_problem(function), workspace_bytes=rows and workspace(rows, 37))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "sequence_mean"])
@pytest.mark.parametrize(
    "head",
    [{}, {"bias": True}, {"temperature": 0.7}, {"softcap": 2.5}, {"bias": True, "temperature": 1.6, "softcap": 4.0}],
)
def test_heads_and_reductions(weighting, reduction, head):
    scale = torch.tensor([0.5, 2.0, 7.0, -1.0, 0.0], dtype=torch.float64)
    problem = make_weighted_problem(
        weighting=weighting, reduction=reduction, sequence_scale=scale, workspace_bytes=workspace(4, 37), **head
    )
    assert_matches_naive(problem)
    assert_matches_naive(problem, denominator=11.0)
    assert_matches_naive(problem, sequence_scale=None)


@pytest.mark.parametrize(
    "weighting, options",
    [
        ("iw-sft", {"iw_tau": 0.3}),
        ("iw-sft", {"iw_tau": -2.0}),
        ("iw-sft", {"iw_max": 1.0}),
        ("psft", {"psft_clip": 0.0}),
        ("psft", {"psft_clip": 0.1}),
        ("psft", {"psft_clip": 9.0}),
        ("asft", {"asft_kl": 0.0}),
        ("asft", {"asft_kl": 3.0}),
        ("idft", {"idft_clip": (0.5, 0.5)}),
        ("idft", {"idft_clip": (0.0, 30.0)}),
    ],
)
def test_options(weighting, options):
    problem = make_weighted_problem(weighting=weighting, **options)
    for rows in (3, 40):
        assert_matches_naive(problem, workspace_bytes=workspace(rows, 37))
    default, _ = make_weighted_problem(weighting=weighting).ours()
    assert not torch.equal(problem.ours()[0].weights, default.weights)  # it does something


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "hidden bias", "weight bias", "hidden weight bias"])
@pytest.mark.parametrize("rows", [1, 20, 60])
def test_whatever_is_trained(weighting, trained, rows):
    problem = make_weighted_problem((0, 40, 1, 49, 10, 0), weighting=weighting, bias=True, D=4)
    names = ("hidden", "weight", "bias")
    leaves = [x.requires_grad_(name in trained.split()) for name, x in zip(names, problem.leaves(), strict=True)]
    out = linear_weighted_loss(
        *leaves[:2], problem.target, cu_seqlens=problem.cu_seqlens, workspace_bytes=workspace(rows, 37),
        **{**problem.options, "bias": leaves[2]},
    )  # fmt: skip
    (loss, _, _), exact_leaves = problem.naive()
    exact = dict(zip(names, gradients(loss, exact_leaves), strict=True))
    ours = dict(zip(trained.split(), gradients(out.loss, [x for x in leaves if x.requires_grad]), strict=True))
    for name, gradient in ours.items():
        assert relative_error(gradient, exact[name]) < 1e-12, name


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda lengths: sum(lengths) > 0),
    weighting=st.sampled_from(WEIGHTINGS),
    rows=st.integers(1, 40),
    vocabulary=st.integers(2, 70),
    ignored=st.sampled_from([0.0, 0.4, 0.9]),
    drift=st.sampled_from([-0.5, 0.0, 0.5]),
    reduction=st.sampled_from(["mean", "sum", "sequence_mean"]),
    temperature=st.sampled_from([1.0, 0.6]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_random_packs(lengths, rows, vocabulary, **options):
    problem = make_weighted_problem(lengths, V=vocabulary, **options)
    if (problem.target >= 0).any():
        assert_matches_naive(problem, tolerance=1e-10, workspace_bytes=workspace(rows, vocabulary))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("V", [37, 301])
def test_float32(weighting, V):
    problem = make_weighted_problem((40, 3, 200, 90), V=V, D=32, dtype=torch.float32, weighting=weighting, bias=True)
    out, _ = problem.ours(workspace_bytes=workspace(70, V, 4))
    assert out.loss.dtype == out.logprobs.dtype == out.weights.dtype == torch.float32
    # exp(mean) and p ** a multiply an error of the log-probs, which are as large as 60 here
    assert_matches_naive(problem, tolerance=2e-5, workspace_bytes=workspace(70, V, 4))


@pytest.mark.parametrize("weighting", ["tensor", "psft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_may_be_of_the_other_dtype(weighting, dtype):
    problem = make_weighted_problem(weighting=weighting, dtype=dtype)
    name = "weights" if weighting == "tensor" else "ref_logprobs"
    other = {torch.float32: torch.float64, torch.float64: torch.float32}[dtype]
    problem.options[name] = problem.options[name].to(other)
    assert_matches_naive(problem, tolerance=1e-5 if dtype == torch.float32 else 1e-12)


# ---- what each weighting is


def as_leaves(problem):
    """Leaves and their log-probs (N,) by PyTorch alone; 0 at ignored tokens."""
    leaves = problem.leaves()
    logits = F.linear(*leaves)
    return leaves, -F.cross_entropy(logits, problem.target, reduction="none")


def assert_same(loss, leaves, exact, exact_leaves, tolerance=1e-12):
    torch.testing.assert_close(loss, exact, rtol=tolerance, atol=0)
    for ours, theirs in zip(gradients(loss, leaves), gradients(exact, exact_leaves), strict=True):
        assert relative_error(ours, theirs) < tolerance


@pytest.mark.parametrize("how", [{"weighting": "none"}, {"weights": "none"}, {"weights": torch.ones_like}])
def test_none_is_cross_entropy(how):
    problem = make_problem((9, 14), bias=True)
    leaves, theirs = problem.leaves(), problem.leaves()
    out = linear_weighted_loss(*leaves[:2], problem.target, bias=leaves[2], **how)
    assert_same(out.loss, leaves, F.cross_entropy(F.linear(*theirs), problem.target), theirs)
    assert torch.equal(out.weights, (problem.target >= 0).double())


def test_dft_is_trls():
    problem = make_weighted_problem((9, 14), weighting="dft")
    out, leaves = problem.ours()
    theirs, logprobs = as_leaves(problem)
    # SFTTrainer: per_token_loss = -outputs.log_probs * outputs.log_probs.exp().detach(), over the tokens that count
    exact = (-logprobs * logprobs.exp().detach()).sum() / (problem.target >= 0).sum()
    assert_same(out.loss, leaves, exact, theirs)


def test_iw_sft_weighs_a_sequence():
    problem = make_weighted_problem((9, 14, 3), weighting="iw-sft", iw_tau=2.0, ignored=0.0, drift=0.1)
    out, _ = problem.ours()
    _, logprobs = as_leaves(problem)
    for begin, end in ((0, 9), (9, 23), (23, 26)):
        mean = (logprobs - problem.options["ref_logprobs"])[begin:end].mean()
        expected = torch.exp(2 * mean).clamp(max=16).detach()
        torch.testing.assert_close(out.weights[begin:end], expected.expand(end - begin), rtol=1e-12, atol=0)


def test_iw_sft_is_capped():
    problem = make_weighted_problem((9, 14), weighting="iw-sft", drift=5.0)
    assert (problem.ours()[0].weights[problem.target >= 0] == 16).all()
    assert_matches_naive(problem)


def test_a_far_reference_overflows_nothing():
    problem = make_weighted_problem((9, 14), ignored=0.0, weighting="iw-sft")
    problem.options["ref_logprobs"][:9] = -2000.0  # e^2000 is more than a float64 holds
    for weighting, expected in (("iw-sft", 16), ("psft", 0)):
        out, leaves = problem.ours(weighting=weighting)
        assert (out.weights[:9] == expected).all() and out.loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients(out.loss, leaves))


def test_psft_is_ppos_clip_with_an_advantage_of_one():
    problem = make_weighted_problem((30, 41), weighting="psft", reduction="sum")
    out, leaves = problem.ours()
    theirs, logprobs = as_leaves(problem)
    counts = problem.target >= 0
    ratio = (logprobs - problem.options["ref_logprobs"])[counts].exp()
    surrogate = torch.minimum(ratio, ratio.clamp(max=1.28)).sum()  # of which ours has the gradient, not the value
    for ours, exact in zip(gradients(out.loss, leaves), gradients(-surrogate, theirs), strict=True):
        assert relative_error(ours, exact) < 1e-12
    assert 0 < (out.weights[counts] == 0).sum() < counts.sum()


def test_asft_adds_the_kl_of_two_outcomes():
    problem = make_weighted_problem((9, 14), weighting="asft", asft_kl=0.7, reduction="sum")
    out, leaves = problem.ours()
    theirs, logprobs = as_leaves(problem)
    counts = problem.target >= 0
    p, q = logprobs[counts].exp(), problem.options["ref_logprobs"][counts].exp()
    bernoulli = torch.distributions.Bernoulli
    kl = torch.distributions.kl_divergence(bernoulli(probs=q), bernoulli(probs=p))
    assert_same(out.loss, leaves, (-p.detach() * logprobs[counts] + 0.7 * kl).sum(), theirs, tolerance=1e-11)


@pytest.mark.parametrize("at", [0.0, 5e-5, -800.0])
def test_asft_where_the_reference_is_certain(at):
    # q = 1, just above 1 by rounding, or 0: the outcome of probability 0 has no term
    problem = make_weighted_problem((9, 14), weighting="asft")
    problem.options["ref_logprobs"][problem.target >= 0] = at
    assert_matches_naive(problem, tolerance=2 * at if at > 0 else 1e-12)


def test_idft_by_torchs_entropy():
    problem = make_weighted_problem((9, 14), weighting="idft")
    out, _ = problem.ours()
    leaves, logprobs = as_leaves(problem)
    entropy = torch.distributions.Categorical(logits=F.linear(*leaves)).entropy()
    exponent = torch.exp(-(logprobs + entropy)).clamp(0.1, 2)
    expected = torch.exp(exponent * logprobs).where(problem.target >= 0, 0.0)
    torch.testing.assert_close(out.weights, expected.detach(), rtol=1e-11, atol=0)


@pytest.mark.parametrize("level", ["token", "block", "sequence"])
def test_pear_by_weights_made_before(level):
    """A caller's own two steps: log-probs, weights from them, and a loss with these."""
    problem = make_problem((7, 1, 0, 12, 5), level=level, block_size=3, bias=True, temperature=0.8)
    fused, leaves = problem.ours()
    theirs = problem.leaves()
    head = dict(bias=theirs[2], temperature=0.8)
    logprobs = linear_logprobs(*theirs[:2], problem.target, **head).detach()
    pack = dict(cu_seqlens=problem.cu_seqlens)
    counts = problem.target >= 0
    weights = pear_weights(logprobs, problem.behavior_logprobs, counts, level=level, block_size=3, **pack)
    out = linear_weighted_loss(*theirs[:2], problem.target, weights, **head, **pack)
    assert_same(out.loss, theirs, fused.loss, leaves)
    torch.testing.assert_close(out.weights, fused.weights, rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_no_gradient_flows_through_the_weights(weighting):
    # sum_t weights_t * scale_t * -log p_t, the weights fixed, has the loss's gradient
    problem = make_weighted_problem(weighting=weighting, reduction="sum")
    name = "weights" if weighting == "tensor" else "ref_logprobs"
    problem.options[name].requires_grad_()
    out, leaves = problem.ours(workspace_bytes=workspace(5, 37))
    assert not out.weights.requires_grad and not out.logprobs.requires_grad
    theirs, logprobs = as_leaves(problem)
    pairs = zip(gradients(out.loss, leaves), gradients(-(out.weights * logprobs).sum(), theirs), strict=True)
    for ours, exact in pairs:
        assert relative_error(ours, exact) < 1e-12
    out, _ = problem.ours()
    assert torch.autograd.grad(out.loss, problem.options[name], allow_unused=True) == (None,)


# ---- ASFT with the initial model in memory


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 12, 25, None])
@pytest.mark.parametrize("lengths", [(7, 1, 0, 12, 5), (4, 4, 16, 8, 5), (1,)])
def test_chunk_sweep_with_a_reference(rows, lengths):
    problem = make_weighted_problem(lengths, weighting="anchored", ignored=0.3 if 0 in lengths else 0.0)
    assert_matches_naive(problem, 1e-11, workspace_bytes=rows and workspace(rows, 37))


@pytest.mark.parametrize("reduction", ["mean", "sum", "sequence_mean"])
@pytest.mark.parametrize(
    "head",
    [{}, {"bias": True}, {"temperature": 0.7}, {"softcap": 2.5}, {"bias": True, "temperature": 1.6, "softcap": 4.0}],
)
def test_heads_and_reductions_with_a_reference(reduction, head):
    scale = torch.tensor([0.5, 2.0, 7.0, -1.0, 0.0], dtype=torch.float64)
    problem = make_weighted_problem(weighting="anchored", reduction=reduction, asft_kl=0.4, **head)
    reference = problem.options["reference"]
    problem.options["reference"] = reference._replace(temperature=1.3, softcap=6.0)  # of its own head
    for sequence_scale in (None, scale):
        options = dict(sequence_scale=sequence_scale, workspace_bytes=workspace(4, 37))
        assert_matches_naive(problem, 1e-11, **options)
        assert_matches_naive(problem, 1e-11, **options, denominator=11.0)


@pytest.mark.parametrize("bias", [True, False])
def test_a_reference_is_dft_and_a_forward_kl(bias):
    problem = make_weighted_problem(weighting="anchored", asft_kl=0.7, temperature=0.8, bias=bias)
    reference = problem.options.pop("reference")
    problem.options |= {"weighting": "dft"}
    both, leaves = problem.ours(weighting="asft", reference=reference)
    theirs = problem.leaves()
    head = dict(temperature=0.8, cu_seqlens=problem.cu_seqlens, bias=theirs[2] if bias else None)
    dft = linear_weighted_loss(*theirs[:2], problem.target, weighting="dft", **head)
    kl = linear_distill_loss(*theirs[:2], reference, problem.target, **head)
    assert_same(both.loss, leaves, dft.loss + 0.7 * kl.loss, theirs, tolerance=1e-11)
    torch.testing.assert_close(both.weights, dft.weights, rtol=1e-12, atol=0)
    torch.testing.assert_close(both.stats, dft.stats, rtol=1e-12, atol=0)


def test_the_kl_of_two_outcomes_is_below_that_of_a_reference():
    problem = make_weighted_problem(weighting="anchored", asft_kl=1.0)
    reference = problem.options["reference"]
    at = torch.log_softmax(F.linear(*reference[:2]), -1).gather(1, problem.target.clamp(min=0)[:, None])[:, 0]
    whole = problem.ours()[0].loss
    two = problem.ours(reference=None, ref_logprobs=at)[0].loss
    assert two < whole


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "hidden bias"])
@pytest.mark.parametrize("rows", [1, 20, 60])
def test_whatever_is_trained_with_a_reference(trained, rows):
    problem = make_weighted_problem((0, 40, 1, 49, 10, 0), weighting="anchored", bias=True, D=4)
    names = ("hidden", "weight", "bias")
    leaves = [x.requires_grad_(name in trained.split()) for name, x in zip(names, problem.leaves(), strict=True)]
    out = linear_weighted_loss(
        *leaves[:2], problem.target, cu_seqlens=problem.cu_seqlens, workspace_bytes=workspace(rows, 37),
        **{**problem.options, "bias": leaves[2]},
    )  # fmt: skip
    (loss, _, _), exact_leaves = problem.naive()
    exact = dict(zip(names, gradients(loss, exact_leaves), strict=True))
    ours = dict(zip(trained.split(), gradients(out.loss, [x for x in leaves if x.requires_grad]), strict=True))
    for name, gradient in ours.items():
        assert relative_error(gradient, exact[name]) < 1e-11, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [37, 301])
def test_a_reference_in_lower_precision(dtype, V):
    problem = make_weighted_problem((40, 30), weighting="anchored", dtype=dtype, V=V, D=32, reduction="sum")
    problem.weight.mul_(0.3)
    out, leaves = problem.ours(workspace_bytes=workspace(16, V, 4))
    (loss, _, _), exact_leaves = problem.naive()
    assert out.loss.item() == pytest.approx(loss.item(), rel=2e-5)
    for ours, exact in zip(gradients(out.loss, leaves), gradients(loss, exact_leaves), strict=True):
        assert ours.dtype == dtype and relative_error(ours, exact) < (2e-5 if dtype == torch.float32 else 4e-3)


def test_no_gradient_flows_to_a_reference():
    problem = make_weighted_problem(weighting="anchored", ignored=0.0)
    others = [x.requires_grad_() for x in problem.options["reference"][:2]]
    out, _ = problem.ours()
    assert torch.autograd.grad(out.loss, others, allow_unused=True) == (None, None)


def test_products_with_a_reference(products):
    """The reference's logits are one more."""
    problem = make_weighted_problem((50, 60), weighting="anchored")
    problem.ours(workspace_bytes=workspace(20, 37))
    n = int((problem.target >= 0).sum())
    assert products == {"logits": 2 * n, "hidden": n, "weight": n}


def test_module_compile_and_static_packs_with_a_reference(monkeypatch):
    torch._dynamo.reset()
    problem = make_weighted_problem(weighting="anchored", dtype=torch.float32)
    module = LinearWeightedLoss(weighting="asft")

    def loss(hidden, weight):
        columns = dict(reference=problem.options["reference"], cu_seqlens=problem.cu_seqlens)
        return module(hidden * 1.5, weight, problem.target, **columns).loss * 2

    leaves = problem.leaves()
    value = loss(*leaves)
    expected = gradients(value, leaves)
    leaves = problem.leaves()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients(compiled, leaves), expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(packing, "capturing", lambda: True)
    leaves = problem.leaves()
    static = loss(*leaves)
    torch.testing.assert_close(static, value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients(static, leaves), expected, rtol=1e-5, atol=1e-6)


# ---- functions


@pytest.mark.parametrize("padded", [False, True])
def test_what_a_function_is_given(padded):
    problem = make_problem((8, 8, 8), ignored=0.3)
    shape = (3, 8) if padded else (24,)
    target = problem.target.view(shape)
    counted = (target.reshape(-1) >= 0).nonzero()[:, 0]
    seen = {}

    def function(logprobs, index):
        assert not logprobs.requires_grad and logprobs.dtype == torch.float64 and index.dtype == torch.int64
        assert logprobs.shape == index.shape == (len(index),) and len(index) <= 5
        seen.update(zip(index.tolist(), logprobs.tolist(), strict=True))
        return index.double()

    leaves = problem.leaves()
    hidden = leaves[0].view(*shape, -1)
    bounds = {} if padded else {"cu_seqlens": problem.cu_seqlens}
    out = linear_weighted_loss(hidden, leaves[1], target, function, workspace_bytes=workspace(5, 37), **bounds)
    assert sorted(seen) == counted.tolist()
    assert [seen[i] for i in counted.tolist()] == pytest.approx(out.logprobs.reshape(-1)[counted].tolist(), rel=1e-12)
    assert torch.equal(out.weights.reshape(-1)[counted], counted.double()) and out.weights.shape == shape
    assert (out.weights.reshape(-1)[problem.target < 0] == 0).all()


def test_a_function_sees_half_precision_log_probs_in_float64():
    problem = make_problem(dtype=torch.bfloat16)

    def function(logprobs):
        assert logprobs.dtype == torch.float64
        return logprobs.exp()

    leaves = problem.leaves()
    ours = linear_weighted_loss(*leaves, problem.target, function)
    dft = linear_weighted_loss(*leaves, problem.target, weighting="dft")
    torch.testing.assert_close(ours.loss, dft.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients(ours.loss, leaves), gradients(dft.loss, leaves), rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_function_may_answer_in_either_dtype(dtype):
    problem = function_problem(lambda logprobs: of_logprobs(logprobs).to(dtype))
    assert_matches_naive(problem, workspace_bytes=workspace(5, 37))


class AsModule(torch.nn.Module):
    def forward(self, logprobs):
        return of_logprobs(logprobs)


class OfPlaces(torch.nn.Module):
    def forward(self, logprobs, where):
        return of_logprobs_and_places(logprobs, where)

    def method(self, logprobs, *, index, sign=1):
        return sign * of_logprobs_and_places(logprobs, index)


def scaled_sine(logprobs, factor, index=None):
    return torch.sin(factor * logprobs)


def overwriting(logprobs):
    return logprobs.mul_(3).sin_()


def overwriting_both(logprobs, index):
    weights = of_logprobs_and_places(logprobs, index)
    logprobs.zero_(), index.zero_()
    return weights


@functools.wraps(of_logprobs)
def decorated(*arguments, **named):
    return of_logprobs(*arguments, **named)


WAYS = {  # of writing each of FUNCTIONS
    "a default argument": (of_logprobs, lambda logprobs, factor=3: torch.sin(factor * logprobs)),
    "a partial": (of_logprobs, functools.partial(scaled_sine, factor=3)),
    "a partial that binds index": (of_logprobs, functools.partial(scaled_sine, factor=3, index=0)),
    "any arguments": (of_logprobs, lambda *arguments, **named: torch.sin(3 * arguments[0])),
    "a decorator": (of_logprobs, decorated),
    "in place": (of_logprobs, overwriting),
    "a module": (of_logprobs, AsModule()),
    "a module under torch.compile": (of_logprobs, torch.compile(AsModule(), backend="eager")),
    "an expanded answer": (torch.ones_like, lambda logprobs: torch.ones(()).expand(logprobs.shape)),
    "an answer of bools": (torch.ones_like, lambda logprobs: logprobs < 1),
    "a builtin": (lambda logprobs: logprobs.exp(), torch.exp),
    "a module of places": (of_logprobs_and_places, OfPlaces()),
    "a method with index by name": (of_logprobs_and_places, OfPlaces().method),
    "index with a default": (of_logprobs_and_places, lambda lp, index=None: of_logprobs_and_places(lp, index)),
    "index with a default, by name alone": (
        of_logprobs_and_places,
        lambda lp, *, index=None: of_logprobs_and_places(lp, index),
    ),
    "places, in place": (of_logprobs_and_places, overwriting_both),
}


@pytest.mark.parametrize("plain, function", WAYS.values(), ids=WAYS.keys())
def test_ways_to_write_a_function(plain, function):
    """What a function may look like, and what it does to its arguments, changes no loss and no gradient."""
    (expected, leaves), (found, same_leaves) = function_problem(plain).ours(), function_problem(function).ours()
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.logprobs, expected.logprobs)
    for ours, exact in zip(gradients(found.loss, same_leaves), gradients(expected.loss, leaves), strict=True):
        assert torch.equal(ours, exact)
    assert_matches_naive(function_problem(plain), workspace_bytes=workspace(5, 37))


def test_a_function_may_call_the_loss_itself():
    """With a function of its own, a named weighting, or one that fails: the outer call keeps its function."""
    problem = make_weighted_problem(dtype=torch.float32)
    arguments = problem.hidden, problem.weight, problem.target

    def fails(logprobs):
        raise KeyError("mine")

    def within(inner):
        def function(logprobs):
            try:
                linear_weighted_loss(*arguments, inner)
            except KeyError:
                pass
            return of_logprobs(logprobs)

        return function

    expected = linear_weighted_loss(*arguments, of_logprobs)
    for inner in (torch.exp, "dft", fails):
        found = linear_weighted_loss(*arguments, within(inner), workspace_bytes=5 * 37 * 4)  # several chunks
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    with pytest.raises(KeyError, match="mine"):
        linear_weighted_loss(*arguments, fails)
    assert torch.equal(linear_weighted_loss(*arguments, of_logprobs).loss, expected.loss)


def test_threads_have_their_own_functions():
    problem = make_weighted_problem(dtype=torch.float32)
    arguments, at_once = (problem.hidden, problem.weight, problem.target), threading.Barrier(4)

    def call(factor):
        at_once.wait(timeout=60)
        return [linear_weighted_loss(*arguments, lambda lp: factor * lp.exp()).loss.item() for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(call, range(1, 5)))
    once = linear_weighted_loss(*arguments, torch.exp).loss.item()
    for factor, losses in enumerate(found, 1):
        assert losses == pytest.approx([factor * once] * 20, rel=1e-5)


# ---- layouts and edges


@pytest.mark.parametrize("lead", [10.0, 60.0, 90.0, 120.0, 500.0])
def test_asft_of_a_token_that_is_certain(lead):
    """1 - p is below float32's smallest number from a lead of 104 on; the gradient p - q in the logit is kept to 69."""
    hidden, weight = torch.tensor([[lead]], requires_grad=True), torch.tensor([[1.0], [0.0]], requires_grad=True)
    out = linear_weighted_loss(hidden, weight, torch.tensor([0]), "asft", ref_logprobs=torch.tensor([-1.0]))
    of_logit, of_weight = gradients(out.loss, [hidden, weight])
    assert out.loss.isfinite() and out.weights.isfinite().all() and of_weight.isfinite().all()
    p = math.exp(-math.log1p(math.exp(-lead)))
    exact = 0.1 * (p - math.exp(-1)) - p * math.exp(-lead)
    assert of_logit.item() == pytest.approx(exact if lead < 69 else 0.0, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_where_all_are_ignored(function):
    out, leaves = function_problem(function, ignored=1.0).ours()
    assert out.loss.item() == 0.0 and all(not grad.any() for grad in gradients(out.loss, leaves))


# ---- precision: p near 1, and p near 0


def exact_logodds(hidden, weight, target):
    """log(p / (1 - p)) of the targets, 1 - p by its own sum."""
    logits = hidden @ weight.T
    others = torch.logsumexp(logits.scatter(1, target[:, None], -torch.inf), 1)
    return logits.gather(1, target[:, None])[:, 0] - others


def exact_loss(name, leaves, target, ref, bounds, **options):
    """float64, to its last digits where p is near 1, where `log_softmax` has lost half of them."""
    logodds = exact_logodds(*leaves, target)
    logprobs, log_not = -F.softplus(-logodds), -F.softplus(logodds)
    lp, extra = logprobs.detach(), 0.0
    if name == "none":
        w = torch.ones_like(lp)
    elif name == "dft":
        w = lp.exp()
    elif name == "iw-sft":
        w = torch.cat([(lp - ref)[a:b].mean().exp().expand(b - a) for a, b in zip(bounds, bounds[1:], strict=False)])
    elif name == "psft":
        w = (lp - ref).exp().where((lp - ref).exp() <= 1.28, 0.0)
    elif name == "asft":
        log_not_q = torch.log(-torch.expm1(ref))
        w = lp.exp()
        extra = 0.1 * (ref.exp() * (ref - logprobs) + log_not_q.exp() * (log_not_q - log_not))
    else:
        log_p = torch.log_softmax(leaves[0] @ leaves[1].T, 1).detach().scatter(1, target[:, None], lp[:, None])
        w = torch.exp(torch.exp((log_p.exp() * log_p).sum(1) - lp).clamp(0.1, 2) * lp)
    return (w * -logprobs + extra).mean(), logprobs


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind, level", [("peaked", 1e-4), ("peaked", 1e-9), ("unlikely", -30.0), ("unlikely", -60.0)])
def test_float32_where_it_is_hard(name, kind, level):
    hidden, weight, target, _ = hard_problem(kind, level)
    rng = torch.Generator().manual_seed(2)
    logprobs = -F.softplus(-exact_logodds(hidden.double(), weight.double(), target))
    # a reference near the student: as far from 1 by a factor, or as unlikely by one
    nudge = (0.2 * torch.randn(len(target), generator=rng)).double()
    ref = (logprobs * nudge.exp() if kind == "peaked" else logprobs + nudge).float()
    bounds = [0, 64, 128, 192]
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    out = linear_weighted_loss(
        *leaves, target, weighting=name, ref_logprobs=ref, cu_seqlens=torch.tensor(bounds),
        workspace_bytes=workspace(80, len(weight), 4),
    )  # fmt: skip
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    loss, logprobs = exact_loss(name, exact_leaves, target, ref.double(), bounds)
    assert logprobs.mean().item() == pytest.approx(-level if kind == "peaked" else level, rel=0.05)
    # an error of the log-prob is one of the weight, too; and weights of 1e-16 of a usual one need no digits
    tolerance, nothing = (1e-5, 0.0) if kind == "peaked" else (3e-5, 1e-16)
    assert relative_error(out.logprobs, logprobs) < 5e-6
    assert abs(out.loss.item() - loss.item()) < tolerance * loss.item() + nothing
    unweighted = torch.autograd.grad(-logprobs.mean(), exact_leaves, retain_graph=True)
    for ours, exact, usual in zip(gradients(out.loss, leaves), gradients(loss, exact_leaves), unweighted, strict=True):
        assert (ours - exact).norm() < tolerance * exact.norm() + nothing * usual.norm()


# ---- what it costs: rows that go through each product


@pytest.fixture
def products(monkeypatch):
    return count_products(monkeypatch)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("trained", ["both", "hidden", "weight", "neither"])
def test_products_of_valid_tokens_only(products, weighting, trained):
    # "iw-sft" weighs a sequence by all of it: none here is longer than a chunk
    problem = make_weighted_problem((19, 20, 11, 17), weighting=weighting)
    n = int((problem.target >= 0).sum())
    hidden = problem.hidden.requires_grad_(trained in ("both", "hidden"))
    weight = problem.weight.requires_grad_(trained in ("both", "weight"))
    linear_weighted_loss(
        hidden, weight, problem.target, cu_seqlens=problem.cu_seqlens, workspace_bytes=workspace(20, 37),
        **problem.options,
    )  # fmt: skip
    assert n < 67
    assert products == {"logits": n, "hidden": n * hidden.requires_grad, "weight": n * weight.requires_grad}


def test_chunks_without_weight_skip_their_gradient_products(products):
    problem = make_weighted_problem((32, 64), ignored=0.0)
    problem.options["weights"][32:] = 0.0
    out, leaves = problem.ours(workspace_bytes=workspace(32, 37))
    assert products == {"logits": 96, "hidden": 32, "weight": 32}
    assert not gradients(out.loss, leaves)[0][32:].any()
    assert_matches_naive(problem, workspace_bytes=workspace(32, 37))


@pytest.mark.parametrize("weighting", [name for name in WEIGHTINGS if name != "iw-sft"])
def test_sequences_longer_than_a_chunk_are_three_products(products, weighting):
    problem = make_weighted_problem((50, 60), weighting=weighting, ignored=0.0)
    problem.ours(workspace_bytes=workspace(20, 37))
    assert products == {"logits": 110, "hidden": 110, "weight": 110}


def test_one_long_sequence_of_iw_sft_is_three_products(products):
    problem = make_weighted_problem((10, 60, 5), weighting="iw-sft", ignored=0.0)
    out, leaves = problem.ours(workspace_bytes=workspace(20, 37))
    assert products == {"logits": 75, "hidden": 75, "weight": 75}
    (loss, _, _), exact_leaves = problem.naive()
    for ours, exact in zip(gradients(out.loss, leaves), gradients(loss, exact_leaves), strict=True):
        assert relative_error(ours, exact) < 1e-12


@pytest.mark.parametrize("rows", [20, 60])
def test_several_long_sequences_of_iw_sft(rows):
    for D in (4, 64):  # with and without room for a second buffer
        problem = make_weighted_problem((100, 90, 3, 80), weighting="iw-sft", D=D, bias=True, reduction="sequence_mean")
        assert_matches_naive(problem, tolerance=1e-11, workspace_bytes=workspace(rows, 37))


# ---- accumulation, statistics, faces


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_denominator_makes_accumulation_equal_one_batch(weighting):
    problem = make_weighted_problem((20, 30, 10), weighting=weighting)
    whole, leaves = problem.ours()
    expected = gradients(whole.loss, leaves)
    n = int((problem.target >= 0).sum())
    leaves, total = problem.leaves(), 0.0
    for begin, end, bounds in [(0, 20, [0, 20]), (20, 60, [0, 30, 40])]:
        options = {k: v[begin:end] if isinstance(v, torch.Tensor) else v for k, v in problem.options.items()}
        out = linear_weighted_loss(
            leaves[0][begin:end], leaves[1], problem.target[begin:end], cu_seqlens=torch.tensor(bounds),
            denominator=torch.tensor(n), **options,
        )  # fmt: skip
        out.loss.backward()
        total += out.loss.item()
    assert total == pytest.approx(whole.loss.item(), rel=1e-12)
    for leaf, exact in zip(leaves, expected, strict=True):
        assert relative_error(leaf.grad, exact) < 1e-12


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_statistics_are_what_their_names_say(weighting):
    problem = make_weighted_problem((30, 1, 0, 70), weighting=weighting, ignored=0.2, drift=0.1)
    if weighting == "tensor":
        problem.options["weights"][:20] = 0.0
    out, _ = problem.ours(workspace_bytes=workspace(20, 37))
    assert tuple(out.stats) == (*WEIGHTED_STATS, "token_accuracy")
    valid = problem.target >= 0
    _, logprobs = as_leaves(problem)
    p, w = logprobs.detach()[valid].numpy(), out.weights[valid].numpy()
    ref = problem.options.get("ref_logprobs")
    expected = {
        "nll": -p.mean(),
        "ref_log_ratio_mean": 0.0 if ref is None else (p - ref[valid].numpy()).mean(),
        "weight_mean": w.mean(),
        "weight_max": w.max(),
        "weight_zero": (w == 0).mean(),
        "effective_sample_size": w.sum() ** 2 / (w.size * (w**2).sum()),
        "tokens": w.size,
    }
    assert expected["weight_zero"] > 0 or weighting not in ("tensor", "psft")
    for name, value in expected.items():
        assert not out.stats[name].requires_grad and out.stats[name].dim() == 0
        assert out.stats[name].item() == pytest.approx(value, rel=1e-11), name


def test_module_with_weights_of_each_call():
    problem = make_weighted_problem()
    out, _ = problem.ours(reduction="sum")
    module = LinearWeightedLoss(reduction="sum")
    again = module(*problem.leaves(), problem.target, problem.options["weights"], cu_seqlens=problem.cu_seqlens)
    assert torch.equal(out.loss, again.loss)


def test_compile_breaks_the_graph_at_a_function_and_makes_it_no_constant():
    """A function's number changes from call to call."""
    torch._dynamo.reset()
    problem = make_weighted_problem(dtype=torch.float32)

    def loss(hidden, weight, power):
        return linear_weighted_loss(hidden * 1.5, weight, problem.target, lambda lp: (power * lp).exp()).loss * 2

    graphs, counts = [], set()
    compiled = torch.compile(loss, backend=lambda graph, _: graphs.append(graph) or graph)
    for power in (0.5, 2.0, 3.0, 4.0):
        leaves, compiled_leaves = problem.leaves(), problem.leaves()
        value, found = (run(*at, torch.tensor(power)) for run, at in ((loss, leaves), (compiled, compiled_leaves)))
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradients(found, compiled_leaves), gradients(value, leaves), rtol=1e-5, atol=1e-6)
        counts.add(len(graphs))
    assert len(counts) == 1  # all were made in the first call


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_double_backward_is_refused(weighting):
    out, leaves = make_weighted_problem(weighting=weighting).ours()
    with pytest.raises(RuntimeError, match="no second derivative.*create_graph=True"):
        torch.autograd.grad(out.loss, leaves, create_graph=True)
