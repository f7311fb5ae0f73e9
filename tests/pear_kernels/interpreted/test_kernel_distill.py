"""linear_distill_loss on the kernels against the naive float64 loss on full logits."""

import math

import pytest
import torch
from kernel_problems import (
    DEVICE,
    HEADS,
    LEVELS,
    PRODUCTS,
    TOLERANCE,
    assert_matches_naive,
    hard_problem,
    naive,
    on_device,
)  # fmt: skip
from problems import gradients, make_distill_problem, relative_error
from torch import Tensor

from pear_kernels import Teacher, TopKTeacher, linear_topk_logprobs
from pear_kernels.backends.triton import tiles
from pear_kernels.backends.triton.logits_head import LogitsHead

DIVERGENCES = ["forward", "reverse", "js"]
TOP_K = [None, 5]
LENGTHS = (9, 1, 0, 13)
CLOSE = 2e-5  # divergences are differences of log-probs


@pytest.fixture(params=PRODUCTS)
def product(request, monkeypatch):
    monkeypatch.setenv(tiles.VARIABLE, request.param)
    return request.param


def moved(teacher):
    return type(teacher)(*(x.to(DEVICE) if isinstance(x, Tensor) else x for x in teacher))


def distill_problem(lengths=LENGTHS, *, D: int = 24, V: int = 75, dtype=torch.float32, **options):
    problem = on_device(make_distill_problem(lengths, D=D, V=V, dtype=dtype, **options))
    problem.weight.mul_(0.5)
    problem.options["teacher"] = moved(problem.options["teacher"])
    return problem


def chunk_bytes(problem, rows: int) -> int:
    """The workspace_bytes of chunks of that many rows, more or less: a teacher's rows are beside them."""
    return rows * 2 * LogitsHead(problem.weight, None, 1.0, None, problem.hidden.dtype).row_bytes(True)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("rows", [6, 40])
def test_divergences_over_chunks(divergence, top_k, rows):
    problem = distill_problem(divergence=divergence, top_k=top_k, js_beta=0.3)
    assert_matches_naive(problem, CLOSE, workspace_bytes=chunk_bytes(problem, rows))


@pytest.mark.parametrize("top_k", TOP_K)
def test_chunks_of_one_row(top_k):
    problem = distill_problem((4, 1, 0, 5), divergence="js", top_k=top_k, nll_coef=0.1)
    assert_matches_naive(problem, CLOSE, workspace_bytes=1)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("head", HEADS)
def test_heads(divergence, top_k, head):
    problem = distill_problem(divergence=divergence, top_k=top_k, reduction="sequence_mean", **HEADS[head])
    assert_matches_naive(problem, CLOSE, workspace_bytes=chunk_bytes(problem, 6), nll_coef=0.3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("level", LEVELS)
def test_levels(divergence, top_k, level, product):
    problem = distill_problem((14, 15, 3), divergence=divergence, top_k=top_k, level=level, block_size=3, V=40)
    assert_matches_naive(problem, CLOSE, workspace_bytes=chunk_bytes(problem, 5), nll_coef=0.2)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", TOP_K)
def test_temperatures(divergence, top_k):
    problem = distill_problem(
        divergence=divergence, top_k=top_k, distill_temperature=2.0, temperature=0.8, softcap=6.0, bias=True,
        teacher_bias=True, teacher_head=dict(temperature=1.3, softcap=5.0),
    )  # fmt: skip
    assert_matches_naive(problem, CLOSE, workspace_bytes=chunk_bytes(problem, 6), nll_coef=0.3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher_dim", [3, 40])
def test_a_teacher_of_another_size_and_dtype(divergence, teacher_dtype, teacher_dim):
    problem = distill_problem(
        divergence=divergence, teacher_dtype=teacher_dtype, teacher_dim=teacher_dim, teacher_bias=True
    )
    assert_matches_naive(problem, CLOSE, workspace_bytes=chunk_bytes(problem, 6))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("V", [2, 37, 301, 1025])
@pytest.mark.parametrize("top_k", [None, 1])
def test_vocabularies_of_any_remainder(divergence, V, top_k):
    problem = distill_problem((5, 3), V=V, D=16, divergence=divergence, top_k=top_k, bias=True, ignored=0.0)
    problem.target[0], problem.target[-1] = 0, V - 1
    problem.behavior_logprobs = (naive(problem)[0][1] - 0.05).float()
    assert_matches_naive(problem, CLOSE, nll_coef=0.3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", [1, 20, 70])
def test_numbers_of_ids(divergence, top_k):
    problem = distill_problem(divergence=divergence, top_k=top_k)
    assert_matches_naive(problem, CLOSE, workspace_bytes=chunk_bytes(problem, 6))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(divergence, top_k, dtype):
    problem = distill_problem(divergence=divergence, top_k=top_k, dtype=dtype, bias=True, nll_coef=0.2)
    out, leaves = problem.ours(workspace_bytes=chunk_bytes(problem, 8))
    (loss, logprobs, weights), exact_leaves = naive(problem)
    assert relative_error(out.loss, loss) < CLOSE
    assert relative_error(out.logprobs, logprobs) < TOLERANCE and relative_error(out.weights, weights) < 1e-4
    for ours, exact in zip(gradients(out.loss, leaves), gradients(loss, exact_leaves), strict=True):
        assert ours.dtype == dtype and relative_error(ours, exact) < torch.finfo(dtype).eps


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", TOP_K)
def test_float16_gradients_are_not_rounded_before_the_upstream_gradient(divergence, top_k):
    problem = distill_problem((10, 9), dtype=torch.float16, divergence=divergence, top_k=top_k, nll_coef=0.2)
    out, leaves = problem.ours(denominator=1e7)
    (loss, _, _), exact_leaves = naive(problem, denominator=1e7)
    scale = 2.0**18  # without it these gradients are below float16's range
    grads, expected = gradients(out.loss * scale, leaves), gradients(loss * scale, exact_leaves)
    for ours, exact in zip(grads, expected, strict=True):
        assert ours.dtype == torch.float16 and relative_error(ours, exact) < 2e-3


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("whose", ["student", "student of top-k", "teacher"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_nan_stays_in_its_sequence(divergence, whose, level):
    top_k = 5 if "top-k" in whose else None
    problem = distill_problem((6, 5, 4), V=40, ignored=0.0, divergence=divergence, top_k=top_k)
    options = dict(level=level, workspace_bytes=chunk_bytes(problem, 4))
    clean, leaves = problem.ours(**options)
    expected = gradients(clean.loss, leaves)[0]
    (problem.options["teacher"] if whose == "teacher" else problem).hidden[8] = math.nan
    out, leaves = problem.ours(**options)
    gradient = gradients(out.loss, leaves)[0]
    assert out.loss.isnan() and gradient[8].isnan().all()
    for others in (slice(0, 6), slice(11, 15)):
        torch.testing.assert_close(gradient[others], expected[others], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "divergence, both", [*((name, True) for name in DIVERGENCES), ("reverse", False), ("js", False)]
)
def test_columns_that_a_bias_of_minus_infinity_takes_out(divergence, both):
    problem = distill_problem((9, 14), divergence=divergence, bias=True, teacher_bias=True, ignored=0.0)
    out_of_play = torch.arange(75, device=DEVICE) % 5 == 0
    out_of_play[problem.target] = False
    problem.options["bias"][out_of_play] = -math.inf
    if both:
        problem.options["teacher"].bias[out_of_play] = -math.inf
    out, leaves = problem.ours()
    (loss, _, _), exact_leaves = naive(problem)
    assert relative_error(out.loss, loss) < CLOSE
    grads, expected, kept = gradients(out.loss, leaves), gradients(loss, exact_leaves), ~out_of_play
    assert not grads[1][out_of_play].any() and not grads[2][out_of_play].any()
    assert relative_error(grads[0], expected[0]) < CLOSE
    assert all(relative_error(grads[i][kept], expected[i][kept]) < CLOSE for i in (1, 2))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_whatever_is_trained(divergence, top_k, trained):
    problem = distill_problem(divergence=divergence, top_k=top_k, bias=True)
    names = ("hidden", "weight", "bias")
    leaves = [x.requires_grad_(name == trained) for name, x in zip(names, problem.leaves(), strict=True)]
    out = problem.loss(
        *leaves[:2], problem.target, problem.behavior_logprobs, cu_seqlens=problem.cu_seqlens,
        workspace_bytes=chunk_bytes(problem, 6), **{**problem.options, "bias": leaves[2]},
    )  # fmt: skip
    (loss, _, _), exact_leaves = naive(problem)
    place = names.index(trained)
    (ours,), exact = gradients(out.loss, [leaves[place]]), gradients(loss, exact_leaves)[place]
    assert relative_error(ours, exact) < CLOSE


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", [None, 8])
def test_a_student_that_is_its_teacher(divergence, top_k):
    problem = distill_problem(divergence=divergence, bias=True, temperature=0.8, softcap=5.0)
    head = dict(bias=problem.options["bias"], temperature=0.8, softcap=5.0)
    teacher = Teacher(problem.hidden, problem.weight, **head)
    if top_k is not None:
        teacher = linear_topk_logprobs(problem.hidden, problem.weight, problem.target, top_k, **head)
    out, leaves = problem.ours(teacher=teacher)
    (loss, _, _), others = naive(problem)
    assert abs(out.loss.item()) < 1e-5 * loss.item()
    for ours, usual in zip(gradients(out.loss, leaves), gradients(loss, others), strict=True):
        assert ours.norm() < 1e-5 * usual.norm()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind, level", [("peaked", 1e-4), ("peaked", 1e-9), ("unlikely", -20.0)])
@pytest.mark.parametrize("top_k", [None, 10])
def test_where_the_target_is_certain_or_unlikely(divergence, kind, level, top_k):
    plain = hard_problem(kind, level, lengths=(12, 9))
    problem = distill_problem((12, 9), D=40, V=101, divergence=divergence, ignored=0.0, weighted=False, top_k=top_k)
    problem.hidden, problem.weight, problem.target = plain.hidden, plain.weight, plain.target
    out, leaves = problem.ours()
    (loss, _, _), exact_leaves = naive(problem)
    assert relative_error(out.loss, loss) < CLOSE
    for ours, exact in zip(gradients(out.loss, leaves), gradients(loss, exact_leaves), strict=True):
        assert relative_error(ours, exact) < CLOSE


@pytest.mark.parametrize("k", [1, 7, 74])
@pytest.mark.parametrize("head", ["plain", "all"])
def test_topk_logprobs(k, head, product):
    problem = distill_problem(**HEADS[head])
    options = {name: problem.options[name] for name in ("bias", "temperature", "softcap") if name in problem.options}
    ours = linear_topk_logprobs(
        problem.hidden, problem.weight, problem.target, k, backend="triton", workspace_bytes=chunk_bytes(problem, 6),
        **options,
    )  # fmt: skip
    theirs = linear_topk_logprobs(
        problem.hidden.double(), problem.weight.double(), problem.target, k,
        **{name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()},
    )  # fmt: skip
    assert isinstance(ours, TopKTeacher) and torch.equal(ours.ids, theirs.ids) and ours.logprobs.dtype == torch.float32
    torch.testing.assert_close(ours.logprobs.double(), theirs.logprobs, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("weighted", [True, False])
def test_statistics(top_k, weighted):
    """Those of both backends: what they are is tested on the other one."""
    problem = distill_problem(top_k=top_k, weighted=weighted, **HEADS["all"])
    out, _ = problem.ours(workspace_bytes=chunk_bytes(problem, 6))
    expected, _ = problem.ours(backend="torch")
    assert set(out.stats) == set(expected.stats) and "divergence" in out.stats
    for name in expected.stats:
        assert out.stats[name].item() == pytest.approx(expected.stats[name].item(), rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", TOP_K)
def test_bitwise_repeatable(divergence, top_k):
    problem = distill_problem(divergence=divergence, top_k=top_k, bias=True, ignored=0.0, nll_coef=0.1)
    problem.target[::3] = 5  # many tokens share a row of dW
    runs = []
    for _ in range(2):
        out, leaves = problem.ours(workspace_bytes=chunk_bytes(problem, 8))
        runs.append([out.loss.detach(), out.logprobs, out.weights, *gradients(out.loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", TOP_K)
def test_all_ignored(divergence, top_k):
    problem = distill_problem(divergence=divergence, top_k=top_k, ignored=1.0)
    problem.hidden.fill_(torch.nan)
    out, leaves = problem.ours()
    assert out.loss.item() == 0.0 and all(value.isfinite() for value in out.stats.values())
    assert all(not gradient.any() for gradient in gradients(out.loss, leaves))
    assert out.logprobs.device == DEVICE


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", TOP_K)
def test_autocast_rounds_operands_and_keeps_float32_gradients(divergence, top_k):
    # a teacher in bfloat16, which that rounding leaves as it is
    problem = distill_problem(divergence=divergence, top_k=top_k, bias=True, teacher_dtype=torch.bfloat16)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out, leaves = problem.ours(workspace_bytes=chunk_bytes(problem, 6))
    grads = gradients(out.loss, leaves)
    assert out.loss.dtype == torch.float32 and all(grad.dtype == torch.float32 for grad in grads)
    problem.hidden, problem.weight, problem.options["bias"] = [leaf.detach().bfloat16() for leaf in leaves]
    (loss, _, _), exact_leaves = naive(problem)
    assert relative_error(out.loss, loss) < CLOSE
    for ours, exact in zip(grads, gradients(loss, exact_leaves), strict=True):
        assert relative_error(ours, exact) < 4e-3  # dL/dz and the scaled rows of product 3 are rounded


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", TOP_K)
def test_one_token(divergence, top_k):
    assert_matches_naive(distill_problem((1,), divergence=divergence, top_k=top_k, ignored=0.0), CLOSE)
