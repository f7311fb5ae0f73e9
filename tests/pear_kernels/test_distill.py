"""linear_distill_loss against the naive float64 loss on full logits, and what must not change it."""

import functools
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
    make_weighted_problem,
    relative_error,
    workspace,
)  # fmt: skip
from test_accuracy import hard_problem

from pear_kernels import (
    Teacher,
    TopKTeacher,
    linear_distill_loss,
    linear_pear_loss,
    linear_topk_logprobs,
)
from pear_kernels.engine import packing
from pear_kernels.objectives.pear import STATS
from pear_kernels.objectives.weighted import WEIGHTED_STATS

DIVERGENCES = ["forward", "reverse", "js"]
LEVELS = ["token", "block", "sequence"]
TOP_K = [None, 5]  # a teacher's own head, or so many of its ids
TOLERANCE = 1e-11  # a divergence is a difference of numbers as large as logits


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 12, 25, None])
def test_chunk_sweep(divergence, top_k, rows):
    problem = make_distill_problem(divergence=divergence, top_k=top_k, nll_coef=0.3)
    assert_matches_naive(problem, TOLERANCE, workspace_bytes=rows and workspace(rows, 37))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [3, 12, None])
def test_levels(divergence, top_k, level, rows):
    problem = make_distill_problem(divergence=divergence, top_k=top_k, level=level, block_size=3)
    for nll_coef in (0.0, 0.7):
        assert_matches_naive(problem, TOLERANCE, workspace_bytes=rows and workspace(rows, 37), nll_coef=nll_coef)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("reduction", ["mean", "sum", "sequence_mean"])
@pytest.mark.parametrize(
    "head",
    [{}, {"bias": True}, {"temperature": 0.7}, {"softcap": 2.5}, {"bias": True, "temperature": 1.6, "softcap": 4.0}],
)
def test_heads_and_reductions(divergence, top_k, reduction, head):
    scale = torch.tensor([0.5, 2.0, 7.0, 1.5, 0.0], dtype=torch.float64)
    problem = make_distill_problem(
        divergence=divergence, top_k=top_k, reduction=reduction, workspace_bytes=workspace(4, 37), **head
    )
    for sequence_scale in (None, scale):
        assert_matches_naive(problem, TOLERANCE, sequence_scale=sequence_scale)
        assert_matches_naive(problem, TOLERANCE, sequence_scale=sequence_scale, denominator=11.0, nll_coef=0.2)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("distill_temperature", [0.5, 2.0])
@pytest.mark.parametrize("weighted", [True, False])
def test_distill_temperature(divergence, top_k, distill_temperature, weighted):
    """It divides both sides' logits in D, on top of `temperature`; log pi and G know nothing of it."""
    problem = make_distill_problem(
        divergence=divergence, top_k=top_k, distill_temperature=distill_temperature, weighted=weighted,
        temperature=0.8, softcap=6.0, bias=True, teacher_bias=True, teacher_head=dict(temperature=1.3, softcap=5.0),
    )  # fmt: skip
    for rows in (4, 40):
        assert_matches_naive(problem, TOLERANCE, workspace_bytes=workspace(rows, 37), nll_coef=0.2)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "teacher",
    [
        {"teacher_bias": True},
        {"teacher_dim": 1},
        {"teacher_dim": 21},
        {"teacher_head": {"temperature": 0.6}},
        {"teacher_head": {"softcap": 3.0}},
        {"teacher_bias": True, "teacher_head": {"temperature": 1.4, "softcap": 3.0}},
    ],
)
def test_teachers_heads(divergence, teacher):
    problem = make_distill_problem(divergence=divergence, **teacher)
    for rows in (4, 40):
        assert_matches_naive(problem, TOLERANCE, workspace_bytes=workspace(rows, 37))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_teacher_of_another_dtype(divergence, teacher_dtype, dtype):
    problem = make_distill_problem(
        divergence=divergence, dtype=dtype, teacher_dtype=teacher_dtype, D=16, teacher_dim=24, teacher_bias=True
    )
    exact = dtype == teacher_dtype == torch.float64  # else one of the two has float32 logits
    assert_matches_naive(problem, TOLERANCE if exact else 2e-5, workspace_bytes=workspace(9, 37))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("logprobs", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_k_of_either_dtype(divergence, ids, logprobs, dtype):
    problem = make_distill_problem(divergence=divergence, top_k=6, dtype=dtype)
    teacher = problem.options["teacher"]
    problem.options["teacher"] = TopKTeacher(teacher.ids.to(ids), teacher.logprobs.to(logprobs))
    assert_matches_naive(problem, TOLERANCE if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", [1, 2, 30, 36])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.7, 2.0)])
def test_numbers_of_ids(divergence, top_k, temperatures):
    temperature, distill_temperature = temperatures
    problem = make_distill_problem(
        divergence=divergence, top_k=top_k, temperature=temperature, distill_temperature=distill_temperature
    )
    # of 30 ids and more the rest is what the sum of the others leaves of 1, which has 16 digits less its own size
    tolerance = TOLERANCE if top_k < 30 or divergence == "forward" else 1e-9
    assert_matches_naive(problem, tolerance, workspace_bytes=workspace(5, 37))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "hidden bias", "weight bias", "hidden weight bias"])
def test_whatever_is_trained(divergence, top_k, level, trained):
    problem = make_distill_problem(
        (0, 40, 1, 49, 10, 0), divergence=divergence, top_k=top_k, level=level, bias=True, D=4, nll_coef=0.1
    )
    names = ("hidden", "weight", "bias")
    (loss, _, _), exact_leaves = problem.naive()
    exact = dict(zip(names, gradients(loss, exact_leaves), strict=True))
    for rows in (1, 20, 60):
        leaves = [x.requires_grad_(name in trained.split()) for name, x in zip(names, problem.leaves(), strict=True)]
        out = problem.loss(
            *leaves[:2], problem.target, problem.behavior_logprobs, cu_seqlens=problem.cu_seqlens,
            workspace_bytes=workspace(rows, 37), **{**problem.options, "bias": leaves[2]},
        )  # fmt: skip
        ours = gradients(out.loss, [x for x in leaves if x.requires_grad])
        for name, gradient in zip(trained.split(), ours, strict=True):
            assert relative_error(gradient, exact[name]) < TOLERANCE, name


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda lengths: sum(lengths) > 0),
    divergence=st.sampled_from(DIVERGENCES),
    js_beta=st.sampled_from([0.1, 0.5, 0.9]),
    top_k=st.sampled_from([None, 1, 4]),
    level=st.sampled_from(LEVELS),
    weighted=st.booleans(),
    nll_coef=st.sampled_from([0.0, 0.5]),
    reduction=st.sampled_from(["mean", "sum", "sequence_mean"]),
    distill_temperature=st.sampled_from([1.0, 1.7]),
    teacher_dim=st.integers(1, 12),
    rows=st.integers(1, 40),
    vocabulary=st.integers(5, 70),
    ignored=st.sampled_from([0.0, 0.4, 0.9]),
    drift=st.sampled_from([-0.5, 0.0, 0.5]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_random_packs(lengths, rows, vocabulary, **options):
    problem = make_distill_problem(lengths, V=vocabulary, **options)
    if (problem.target >= 0).any():
        assert_matches_naive(problem, tolerance=1e-9, workspace_bytes=workspace(rows, vocabulary))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", [None, 16])
@pytest.mark.parametrize("V", [37, 301])
def test_float32(divergence, top_k, V):
    problem = make_distill_problem(
        (40, 3, 200, 90), divergence=divergence, top_k=top_k, V=V, D=32, teacher_dim=20, dtype=torch.float32,
        bias=True, nll_coef=0.1,
    )  # fmt: skip
    out, _ = problem.ours(workspace_bytes=workspace(70, V, 4))
    assert out.loss.dtype == out.logprobs.dtype == out.weights.dtype == torch.float32
    # a reverse KL has the logarithm of what is left beside the ids: 1e-7 of it is lost where it is 1e-2 of all
    assert_matches_naive(problem, 2e-5, workspace_bytes=workspace(70, V, 4))


# ---- what a divergence is


def full_logits(problem, leaves):
    """(n, V) student's and teacher's logits of the tokens that count, by PyTorch alone."""
    counts, teacher = problem.target >= 0, problem.options["teacher"]
    return F.linear(leaves[0][counts], *leaves[1:]), F.linear(teacher.hidden[counts], *teacher[1:3])


def assert_same(out, leaves, exact, exact_leaves, tolerance=TOLERANCE):
    assert out.loss.item() == pytest.approx(exact.item(), rel=tolerance)
    for ours, theirs in zip(gradients(out.loss, leaves), gradients(exact, exact_leaves), strict=True):
        assert relative_error(ours, theirs) < tolerance


def unweighted(**options):
    return make_distill_problem((9, 14), weighted=False, **options)


@pytest.mark.parametrize("distill_temperature", [1.0, 1.7])
def test_forward_and_reverse_are_torchs_kl_div(distill_temperature):
    problem = unweighted(distill_temperature=distill_temperature, teacher_bias=True, bias=True)
    for divergence in ("forward", "reverse"):
        out, leaves = problem.ours(divergence=divergence)
        theirs = problem.leaves()
        log_p, log_q = (F.log_softmax(z / distill_temperature, -1) for z in full_logits(problem, theirs))
        pair = (log_p, log_q) if divergence == "forward" else (log_q, log_p)
        assert_same(out, leaves, F.kl_div(*pair, log_target=True, reduction="batchmean"), theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("distill_temperature", [1.0, 1.7])
@pytest.mark.parametrize("divergence, js_beta", [("forward", 0.0), ("reverse", 1.0), ("js", 0.5), ("js", 0.2)])
def test_divergences_are_trls(divergence, js_beta, distill_temperature):
    """The generalised JSD of TRL's GKDTrainer, whose ends are the forward and the reverse KL themselves."""
    gkd = pytest.importorskip("trl.experimental.gkd")
    problem = unweighted(distill_temperature=distill_temperature, divergence=divergence)
    out, leaves = problem.ours(js_beta=js_beta if divergence == "js" else 0.5)
    theirs = problem.leaves()
    student, teacher = full_logits(problem, theirs)
    exact = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, beta=js_beta, temperature=distill_temperature)
    assert_same(out, leaves, exact, theirs)


def exchanged(problem, divergence, **options):
    """The value with student and teacher in each other's place."""
    teacher, bounds = problem.options["teacher"], problem.cu_seqlens
    student = Teacher(problem.hidden, problem.weight)
    options |= dict(divergence=divergence, cu_seqlens=bounds)
    return linear_distill_loss(teacher.hidden, teacher.weight, student, problem.target, **options).loss.item()


def test_exchanging_student_and_teacher():
    problem = unweighted(ignored=0.0)
    value = {name: problem.ours(divergence=name)[0].loss.item() for name in DIVERGENCES}
    assert value["forward"] == pytest.approx(exchanged(problem, "reverse"), rel=1e-12)
    assert value["reverse"] == pytest.approx(exchanged(problem, "forward"), rel=1e-12)
    assert value["js"] == pytest.approx(exchanged(problem, "js"), rel=1e-12)  # symmetric at js_beta = 0.5
    skewed = problem.ours(divergence="js", js_beta=0.2)[0].loss.item()
    assert skewed == pytest.approx(exchanged(problem, "js", js_beta=0.8), rel=1e-12)
    assert skewed != pytest.approx(exchanged(problem, "js", js_beta=0.2), rel=1e-3)


@pytest.mark.parametrize("top_k", TOP_K)
def test_js_is_at_most_log_two_and_tends_to_both_kls(top_k):
    problem = unweighted(top_k=top_k)
    assert 0 < problem.ours(divergence="js")[0].loss.item() < math.log(2)
    forward, reverse = (problem.ours(divergence=name)[0].loss.item() for name in ("forward", "reverse"))
    small = 1e-8  # below the ratio of any two probabilities here
    assert problem.ours(divergence="js", js_beta=small)[0].loss.item() / small == pytest.approx(forward, rel=0.02)
    assert problem.ours(divergence="js", js_beta=1 - small)[0].loss.item() / small == pytest.approx(reverse, rel=0.02)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", [None, 1, 8, 36])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_student_that_is_its_teacher(divergence, top_k, dtype):
    problem = unweighted(divergence=divergence, dtype=dtype, bias=True, temperature=0.8, softcap=5.0)
    head = dict(bias=problem.options["bias"], temperature=0.8, softcap=5.0)
    teacher = Teacher(problem.hidden, problem.weight, **head)
    if top_k is not None:
        log_p = torch.log_softmax(5 * torch.tanh(F.linear(*problem.leaves()) / 5).detach().double() / 0.8, -1)
        top = log_p.topk(top_k)
        teacher = TopKTeacher(top.indices, top.values.to(dtype))
    out, leaves = problem.ours(teacher=teacher)
    noise = 2e-5 if dtype == torch.float32 else 1e-13
    assert abs(out.loss.item()) < noise
    assert out.stats["divergence"].item() == pytest.approx(out.loss.item(), abs=1e-7)
    (loss, _, _), others = problem.naive()  # gradients with another teacher, for their size
    for ours, usual in zip(gradients(out.loss, leaves), gradients(loss, others), strict=True):
        assert ours.double().norm() < 10 * noise * usual.norm()
    # with an NLL beside it, that is all there is
    both, leaves = problem.ours(teacher=teacher, nll_coef=1.0)
    exact_leaves = problem.leaves(torch.float64)
    logits = 5 * torch.tanh(F.linear(*exact_leaves) / 5) / 0.8
    exact = F.cross_entropy(logits, problem.target)
    assert_same(both, leaves, exact, exact_leaves, tolerance=2e-5 if dtype == torch.float32 else 1e-11)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_all_ids_but_one_are_the_whole_distribution(divergence):
    problem = unweighted(divergence=divergence)
    full, leaves = problem.ours()
    teacher = problem.options["teacher"]
    top = torch.log_softmax(F.linear(teacher.hidden, teacher.weight), -1).nan_to_num().topk(36)
    cut, theirs = problem.ours(teacher=TopKTeacher(top.indices, top.values))
    assert cut.loss.item() == pytest.approx(full.loss.item(), rel=1e-8)
    for ours, exact in zip(gradients(cut.loss, theirs), gradients(full.loss, leaves), strict=True):
        assert relative_error(ours, exact) < 1e-6  # the last id's probability is what a sum leaves of 1


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_more_ids_see_more_of_a_divergence(divergence):
    # merging outcomes can only lower a divergence (data processing)
    problem = unweighted()
    values = [unweighted(top_k=k).ours(divergence=divergence)[0].loss.item() for k in (1, 2, 4, 8, 16, 32)]
    values.append(problem.ours(divergence=divergence)[0].loss.item())
    assert all(a <= b + 1e-12 for a, b in zip(values, values[1:], strict=False))
    assert 0 < values[0] < 0.95 * values[-1]


def test_one_id_is_a_distribution_of_two_outcomes():
    problem = unweighted(top_k=1, ignored=0.0)
    out, leaves = problem.ours()
    theirs = problem.leaves()
    ids, logprobs = problem.options["teacher"]
    p = torch.softmax(F.linear(*theirs), -1).gather(1, ids)
    bernoulli = torch.distributions.Bernoulli
    exact = torch.distributions.kl_divergence(bernoulli(probs=logprobs.exp()), bernoulli(probs=p)).mean()
    assert_same(out, leaves, exact, theirs, tolerance=1e-10)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", [None, 4])
def test_by_finite_differences(divergence, top_k):
    problem = make_distill_problem(
        (6, 5), V=11, D=4, divergence=divergence, top_k=top_k, js_beta=0.3, weighted=False, nll_coef=0.2,
        distill_temperature=1.5, temperature=0.8, softcap=3.0, bias=True,
    )  # fmt: skip
    out, leaves = problem.ours()
    rng, step = torch.Generator().manual_seed(1), 1e-5
    for place, (leaf, gradient) in enumerate(zip(leaves, gradients(out.loss, leaves), strict=True)):
        direction = torch.randn(leaf.shape, generator=rng, dtype=torch.float64)

        def at(s, place=place, direction=direction):
            moved = [x.detach() + (s * direction if i == place else 0) for i, x in enumerate(leaves)]
            options = {**problem.options, "bias": moved[2]}
            return problem.loss(*moved[:2], problem.target, None, cu_seqlens=problem.cu_seqlens, **options).loss.item()

        slope = (at(step) - at(-step)) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-6)


# ---- beside PEAR


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("top_k", TOP_K)
def test_weights_are_pears(level, top_k):
    problem = make_distill_problem(level=level, top_k=top_k, block_size=3, distill_temperature=2.0)
    out, leaves = problem.ours()
    pear = linear_pear_loss(
        *problem.leaves(), problem.target, problem.behavior_logprobs, cu_seqlens=problem.cu_seqlens, level=level,
        block_size=3,
    )  # fmt: skip
    torch.testing.assert_close(out.weights, pear.weights, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.logprobs, pear.logprobs, rtol=1e-12, atol=0)
    # the NLL's part of the loss is PEAR's
    with_nll, theirs = problem.ours(nll_coef=0.5)
    assert (with_nll.loss - out.loss).item() == pytest.approx(0.5 * pear.loss.item(), rel=1e-10)


def test_without_behavior_logprobs_every_weight_is_one():
    problem = unweighted()
    out, _ = problem.ours()
    assert torch.equal(out.weights, (problem.target >= 0).double())


@pytest.mark.parametrize("top_k", TOP_K)
def test_no_gradient_flows_to_the_teacher_or_the_weights(top_k):
    problem = make_distill_problem(top_k=top_k)
    teacher = problem.options["teacher"]
    others = [problem.behavior_logprobs, *(x for x in teacher if isinstance(x, torch.Tensor) and x.is_floating_point())]
    for tensor in others:
        tensor.requires_grad_()
    out, leaves = problem.ours()
    assert torch.autograd.grad(out.loss, others, allow_unused=True, retain_graph=True) == (None,) * len(others)
    (loss, _, _), exact_leaves = problem.naive()
    for ours, exact in zip(gradients(out.loss, leaves), gradients(loss, exact_leaves), strict=True):
        assert relative_error(ours, exact) < TOLERANCE


# ---- the teacher's top ids


@pytest.mark.parametrize("k", [1, 5, 36])
@pytest.mark.parametrize("head", [{}, {"bias": True, "temperature": 1.6, "softcap": 4.0}])
@pytest.mark.parametrize("rows", [3, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_topk_logprobs_are_torchs(k, head, rows, dtype):
    problem = make_distill_problem(dtype=dtype, **head)
    options = {name: problem.options[name] for name in head}
    leaves = problem.leaves()
    ours = linear_topk_logprobs(
        leaves[0], leaves[1], problem.target, k, workspace_bytes=rows and workspace(rows, 37), **options
    )
    assert isinstance(ours, TopKTeacher) and ours.ids.dtype == torch.int64
    assert ours.logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours.ids.shape == ours.logprobs.shape == (25, k) and not ours.logprobs.requires_grad
    logits = F.linear(*(x.detach().double() for x in leaves))
    if head:
        logits = 4.0 * torch.tanh(logits / 4.0) / 1.6
    expected = torch.log_softmax(logits, -1).topk(k)
    counts = problem.target >= 0
    torch.testing.assert_close(ours.logprobs[counts].double(), expected.values[counts], rtol=2e-6, atol=2e-6)
    if dtype != torch.bfloat16:  # where two may be alike
        assert torch.equal(ours.ids[counts], expected.indices[counts])
    assert (ours.logprobs[counts].diff(dim=1) <= 0).all()
    assert torch.equal(ours.ids[~counts], torch.arange(k).expand(int((~counts).sum()), k))
    assert not ours.logprobs[~counts].any()


def test_topk_logprobs_of_padded_rows():
    problem = make_distill_problem((8, 8, 8))
    packed = linear_topk_logprobs(problem.hidden, problem.weight, problem.target, 4)
    rows = linear_topk_logprobs(problem.hidden.view(3, 8, -1), problem.weight, problem.target.view(3, 8), 4)
    assert rows.ids.shape == rows.logprobs.shape == (3, 8, 4)
    assert torch.equal(rows.ids.view(24, 4), packed.ids) and torch.equal(rows.logprobs.view(24, 4), packed.logprobs)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("distill_temperature", [1.0, 2.0])
def test_topk_logprobs_are_a_teacher(divergence, distill_temperature):
    """They are at the temperature they are asked at: at the student's times distill_temperature, for a copy of it."""
    problem = make_distill_problem(divergence=divergence, distill_temperature=distill_temperature, temperature=0.7)
    hidden, weight = problem.options["teacher"][:2]
    top = linear_topk_logprobs(hidden, weight, problem.target, 8, temperature=distill_temperature)
    made = make_distill_problem(
        divergence=divergence, distill_temperature=distill_temperature, temperature=0.7, top_k=8
    )
    ours, leaves = problem.ours(teacher=top)
    theirs, their_leaves = made.ours()
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    for a, b in zip(gradients(ours.loss, leaves), gradients(theirs.loss, their_leaves), strict=True):
        assert relative_error(a, b) < 1e-5


def test_topk_logprobs_where_all_are_ignored():
    problem = make_distill_problem(ignored=1.0)
    top = linear_topk_logprobs(problem.hidden, problem.weight, problem.target, 3)
    assert torch.equal(top.ids, torch.arange(3).expand(25, 3)) and not top.logprobs.any()
    out, leaves = problem.ours(teacher=top)
    assert out.loss.item() == 0.0 and all(not gradient.any() for gradient in gradients(out.loss, leaves))


# ---- layouts and edges


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_columns_that_a_bias_of_minus_infinity_takes_out(divergence):
    """Ids that neither has, as of a vocabulary that is padded to a multiple of 64, add nothing to any divergence."""
    problem = make_distill_problem((9, 14), divergence=divergence, bias=True, teacher_bias=True, ignored=0.0)
    out_of_play = torch.arange(37) % 5 == 0
    out_of_play[problem.target] = False
    assert out_of_play.any()
    problem.options["bias"][out_of_play] = -math.inf
    problem.options["teacher"].bias[out_of_play] = -math.inf
    out, leaves = problem.ours()
    (loss, _, _), exact_leaves = problem.naive()
    assert out.loss.item() == pytest.approx(loss.item(), rel=TOLERANCE)
    grads, kept = gradients(out.loss, leaves), ~out_of_play
    assert not grads[1][out_of_play].any() and not grads[2][out_of_play].any()
    expected = gradients(loss, exact_leaves)
    assert relative_error(grads[0], expected[0]) < TOLERANCE
    assert all(relative_error(grads[i][kept], expected[i][kept]) < TOLERANCE for i in (1, 2))


def test_ids_that_the_student_alone_has_not():
    # their p is 0: the reverse KL and the JSD are finite; the forward KL would be infinite, and is large
    problem = make_distill_problem((9, 14), bias=True, ignored=0.0)
    out_of_play = torch.arange(37) % 5 == 0
    out_of_play[problem.target] = False
    problem.options["bias"][out_of_play] = -math.inf
    for divergence in ("reverse", "js"):
        out, leaves = problem.ours(divergence=divergence)
        (loss, _, _), _ = problem.naive(divergence=divergence)
        assert out.loss.item() == pytest.approx(loss.item(), rel=TOLERANCE)
        assert all(gradient.isfinite().all() for gradient in gradients(out.loss, leaves))
    assert 1e3 < problem.ours(divergence="forward")[0].loss.item() < math.inf


@pytest.mark.parametrize("divergence", ["forward", "js"])
@pytest.mark.parametrize("above", [0.0, 5e-5])
def test_ids_that_are_all_the_teacher_has(divergence, above):
    # what is left beside them is 0, or by rounding a little less than that
    problem = make_distill_problem((9, 14), divergence=divergence, top_k=3, dtype=torch.float32)
    ids = problem.options["teacher"].ids
    logprobs = torch.tensor([0.7, 0.2, 0.1 + above]).log().expand(23, 3).contiguous()
    problem.options["teacher"] = TopKTeacher(ids, logprobs)
    assert_matches_naive(problem, 2e-5)


# ---- precision


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind, level", [("random", 0.0), ("peaked", 1e-3), ("peaked", 1e-6), ("unlikely", -40.0)])
@pytest.mark.parametrize("top_k", [None, 20])
def test_float32_where_the_student_is_hard(divergence, kind, level, top_k):
    hidden, weight, target, _ = hard_problem(kind, level)
    rng = torch.Generator().manual_seed(5)
    teacher = Teacher(torch.randn(len(target), 24, generator=rng), torch.randn(len(weight), 24, generator=rng) / 3)
    if top_k is not None:
        teacher = linear_topk_logprobs(*teacher[:2], target, top_k)
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        theirs = teacher if top_k is not None else Teacher(*(x.to(dtype) for x in teacher[:2]))
        options = dict(divergence=divergence, workspace_bytes=workspace(80, len(weight), dtype.itemsize))
        out = linear_distill_loss(*leaves, theirs, target, **options)
        found.append([out.loss, *gradients(out.loss, leaves)])
    for ours, exact in zip(*found, strict=True):
        assert relative_error(ours, exact) < 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("size", [80.0, 1e4])
@pytest.mark.parametrize("top_k", TOP_K)
def test_logits_far_apart_overflow_nothing(divergence, size, top_k):
    """exp of them is 0 or infinite. A log-prob counts as no less than -1e4."""
    problem = make_distill_problem(
        (9, 14), divergence=divergence, top_k=top_k, dtype=torch.float32, ignored=0.0, weighted=False
    )
    problem.hidden.mul_(size)
    if top_k is None:
        problem.options["teacher"].hidden.mul_(size)
    out, leaves = problem.ours()
    (loss, _, _), exact_leaves = problem.naive()
    grads = gradients(out.loss, leaves)
    assert out.loss.isfinite() and all(gradient.isfinite().all() for gradient in grads)
    if size == 80.0:
        assert out.loss.item() == pytest.approx(loss.item(), rel=2e-5)
        for ours, exact in zip(grads, gradients(loss, exact_leaves), strict=True):
            # those of a JSD vanish where both are certain; and log-probs of several hundreds have fewer digits left
            assert (ours - exact).norm() < 1e-3 * max(exact.norm(), 1.0)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)])
@pytest.mark.parametrize("make", [make_distill_problem, functools.partial(make_weighted_problem, weighting="anchored")])
def test_autocast_rounds_the_teacher_as_the_student(make, dtypes):
    """What F.linear would do to either: the same bits as of a teacher that is in autocast's dtype already."""
    problem = make((7, 5), dtype=torch.float32)
    name = "teacher" if "teacher" in problem.options else "reference"
    hidden, weight, *rest = problem.options[name]
    found = []
    for of_hidden, of_weight in (dtypes, (torch.bfloat16, torch.bfloat16)):
        problem.options[name] = Teacher(hidden.to(of_hidden), weight.to(of_weight), *rest)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, leaves = problem.ours()
        found.append([out.loss.detach(), *gradients(out.loss, leaves)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


# ---- what it costs, statistics, faces


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("trained", ["both", "hidden", "neither"])
def test_products(divergence, top_k, trained, monkeypatch):
    """Three of the student's own; and the teacher's logits, where it comes with a head."""
    problem = make_distill_problem((50, 60), divergence=divergence, top_k=top_k, nll_coef=0.1)
    n = int((problem.target >= 0).sum())
    hidden = problem.hidden.requires_grad_(trained != "neither")
    weight = problem.weight.requires_grad_(trained == "both")
    products = count_products(monkeypatch)
    problem.loss(
        hidden, weight, problem.target, problem.behavior_logprobs, cu_seqlens=problem.cu_seqlens,
        workspace_bytes=workspace(20, 37), **problem.options,
    )  # fmt: skip
    logits = 2 * n if top_k is None else n
    assert products == {"logits": logits, "hidden": n * (trained != "neither"), "weight": n * (trained == "both")}


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("top_k", TOP_K)
def test_statistics_are_what_their_names_say(weighted, top_k):
    problem = make_distill_problem((30, 1, 0, 70), weighted=weighted, top_k=top_k, drift=0.05, nll_coef=0.4)
    out, _ = problem.ours(workspace_bytes=workspace(20, 37))
    assert set(out.stats) == {"divergence", *(STATS if weighted else WEIGHTED_STATS), "token_accuracy"}
    assert all(value.dim() == 0 and not value.requires_grad for value in out.stats.values())
    plain = make_distill_problem((30, 1, 0, 70), weighted=False, top_k=top_k, drift=0.05)
    (divergence, _, _), _ = plain.naive()
    valid = problem.target >= 0
    p, w = out.logprobs[valid], out.weights[valid]
    expected = {
        "divergence": divergence,
        "nll": -p.mean(),
        "weight_mean": w.mean(),
        "effective_sample_size": w.sum() ** 2 / (len(w) * (w**2).sum()),
        "tokens": valid.sum(),
    }
    if weighted:
        log_ratio = p - problem.behavior_logprobs[valid]
        expected["log_ratio_mean"] = log_ratio.mean()
        expected["ratio_clipped_low"] = (log_ratio < -0.08).double().mean()
    else:
        expected |= {"weight_max": w.max(), "weight_zero": torch.tensor(0), "ref_log_ratio_mean": torch.tensor(0)}
    for name, value in expected.items():
        assert out.stats[name].item() == pytest.approx(value.item(), rel=1e-11), name


@pytest.mark.parametrize("top_k", TOP_K)
def test_double_backward_is_refused(top_k):
    out, leaves = make_distill_problem(top_k=top_k).ours()
    with pytest.raises(RuntimeError, match="no second derivative.*create_graph=True"):
        torch.autograd.grad(out.loss, leaves, create_graph=True)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("trained", ["xw", "x", ""])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_static_packs_give_the_same_answers(divergence, top_k, trained, level, monkeypatch):
    problem = make_distill_problem(divergence=divergence, top_k=top_k, level=level, nll_coef=0.1)
    ignored = problem.target < 0
    problem.hidden[ignored] = math.nan
    problem.behavior_logprobs[ignored] = math.nan
    for rows in (3, 40):
        found = []
        for static in (False, True):
            monkeypatch.setattr(packing, "capturing", lambda static=static: static)
            leaves = [x.requires_grad_(n in trained) for n, x in zip("xw", problem.leaves(), strict=True)]
            out = problem.loss(
                *leaves, problem.target, problem.behavior_logprobs, cu_seqlens=problem.cu_seqlens,
                workspace_bytes=workspace(rows, 37), **problem.options,
            )  # fmt: skip
            grads = gradients(2 * out.loss, [x for x in leaves if x.requires_grad]) if trained else []
            found.append([out.loss.detach(), out.logprobs, out.weights, *out.stats.values(), *grads])
        torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-14)
