"""Where float32 is hard: p near 1 and near 0, and targets so far below the maximum that rows need another anchor."""

import math

import pytest
import torch
from kernel_problems import (
    DEVICE,
    PRODUCTS,
    TOLERANCE,
    Head,
    exact_logodds,
    exact_logprobs,
    hard_problem,
    on_device,
)  # fmt: skip
from problems import Problem, gradients, relative_error

from pear_kernels import linear_logprobs
from pear_kernels.backends.triton import tiles
from pear_kernels.reference import naive_weights

UNWEIGHTED = dict(gamma=1.0, log_ratio_clip=(0.0, 0.0))  # every weight is exactly 1


@pytest.fixture(params=PRODUCTS)
def product(request, monkeypatch):
    monkeypatch.setenv(tiles.VARIABLE, request.param)
    return request.param


def exact_loss(problem, **options):
    """(loss, logprobs, [dX, dW]) in float64, with 1 - p by its own sum."""
    leaves = problem.leaves(torch.float64)
    logprobs = exact_logprobs(*leaves, problem.target)
    bounds = problem.cu_seqlens.tolist()
    weights = [
        naive_weights(logprobs[a:b].detach(), problem.behavior_logprobs[a:b].double(), **options)
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    loss = -(torch.cat(weights) * logprobs).sum() / len(logprobs)
    return loss.detach(), logprobs.detach(), gradients(loss, leaves)


@pytest.mark.parametrize(
    "kind, level", [*[("peaked", 10.0**-k) for k in (3, 5, 8)], ("unlikely", -20), ("unlikely", -60)]
)
def test_float32(kind, level, product):
    problem = hard_problem(kind, level)
    loss, logprobs, grads = exact_loss(problem)
    if kind == "peaked":  # the case is what it says
        assert -logprobs.mean().item() == pytest.approx(level, rel=0.05)
    else:
        assert logprobs.mean().item() == pytest.approx(level, rel=0.05)
    out, leaves = problem.ours()
    assert relative_error(out.loss, loss) < TOLERANCE
    for ours, exact in zip(gradients(out.loss, leaves), grads, strict=True):
        assert relative_error(ours, exact) < TOLERANCE
    assert (out.logprobs <= 0).all()


# ---- another anchor


def mixed_problem(dtype) -> tuple[Problem, torch.Tensor]:
    """Rows with a log p of about -200 among rows of 1 - p = 1e-6 and usual ones; and which are far.

    Of the three row tiles of 16 the first has far rows here and there, the second none, the third nothing else.
    """
    far = torch.zeros(41, dtype=torch.bool, device=DEVICE)
    far[[0, 5, 6, 15]] = True
    far[32:] = True
    peaked, unlikely = (
        hard_problem(kind, level, lengths=(41,)) for kind, level in (("peaked", 1e-6), ("unlikely", -200.0))
    )
    hidden = torch.where(far[:, None], unlikely.hidden, peaked.hidden)
    usual = ~far & (torch.arange(41, device=DEVICE) % 3 == 0)
    rng = torch.Generator().manual_seed(1)
    hidden[usual] = torch.randn(41, hidden.shape[1], generator=rng).to(DEVICE)[usual]
    behavior = torch.where(far, unlikely.behavior_logprobs, peaked.behavior_logprobs)
    problem = Problem(hidden.to(dtype), peaked.weight.to(dtype), peaked.target, behavior, torch.tensor([0, 41]))
    return on_device(problem), far


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_far_and_near_rows_of_one_tile(dtype, product):
    if dtype == torch.float16 and product == "fused":
        pytest.skip("gradients of float16 are always made by the plain variant")
    problem, far = mixed_problem(dtype)
    loss, logprobs, grads = exact_loss(problem, **UNWEIGHTED)
    gap = -exact_logodds(problem.hidden.double(), problem.weight.double(), problem.target)
    assert (gap[far] > 150).all() and (gap[~far] < 30).all()
    out, leaves = problem.ours(**UNWEIGHTED)
    ours = gradients(out.loss, leaves)
    error = (out.logprobs.double() - logprobs).abs()
    assert (error[far] < 5e-5).all()  # the logits themselves are of hundreds, and their sums float32
    assert (error[~far] <= 5e-6 * logprobs[~far].abs() + 1e-12).all()  # neighbours of far rows keep their digits
    tolerance = 4e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for rows in (far, ~far):
        assert relative_error(ours[0][rows], grads[0][rows]) < tolerance
    assert relative_error(ours[1], grads[1]) < tolerance
    if dtype == torch.float32:  # peaked rows have gradients of a millionth, which nothing else may drown
        for row in (~far & (logprobs > -1e-4)).nonzero().flatten().tolist():
            assert relative_error(ours[0][row], grads[0][row]) < TOLERANCE


@pytest.mark.parametrize("gap", [39.5, 40.5, 88.0, 1e4])
def test_around_the_largest_exponent(gap, product):
    """exp(z - a) leaves float32 at 88; another anchor is taken from 40 on."""
    problem = hard_problem("unlikely", -gap, lengths=(9,))
    loss, logprobs, grads = exact_loss(problem, **UNWEIGHTED)
    out, leaves = problem.ours(**UNWEIGHTED)
    assert relative_error(out.loss, loss) < TOLERANCE and relative_error(out.logprobs, logprobs) < TOLERANCE
    for ours, exact in zip(gradients(out.loss, leaves), grads, strict=True):
        assert relative_error(ours, exact) < max(TOLERANCE, 2e-7 * gap)


def test_log_probs_alone_take_another_anchor_too():
    problem, far = mixed_problem(torch.bfloat16)
    logprobs = linear_logprobs(problem.hidden, problem.weight, problem.target, backend="triton")
    exact = exact_logprobs(problem.hidden.double(), problem.weight.double(), problem.target)
    assert ((logprobs.double() - exact).abs() <= 5e-6 * exact.abs() + 1e-12).all()


# ---- log-probs and entropy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_probs_of_half_precision_inputs(dtype):
    """Well under 5e-4, which half-precision logits miss by far."""
    problem = hard_problem("unlikely", -8.0, dtype=dtype, V=203)
    exact = exact_logprobs(problem.hidden.double(), problem.weight.double(), problem.target)
    ours = linear_logprobs(problem.hidden, problem.weight, problem.target, backend="triton")
    assert ours.dtype == torch.float32
    assert (ours.double() - exact).square().mean().sqrt() < 2e-6
    naive = torch.log_softmax(problem.hidden @ problem.weight.T, 1).gather(1, problem.target[:, None])[:, 0]
    assert (naive.double() - exact).square().mean().sqrt() > 1e-4


@pytest.mark.parametrize("kind, level, rtol, atol", [("peaked", 1e-6, 2e-5, 1e-12), ("unlikely", -200.0, 2e-4, 1e-6)])
def test_entropy_of_certain_and_of_unlikely_targets(kind, level, rtol, atol, product):
    problem = hard_problem(kind, level, lengths=(18,))
    leaves, exact_leaves = problem.leaves(), problem.leaves(torch.float64)
    _, entropy = linear_logprobs(*leaves, problem.target, return_entropy=True, backend="triton")
    log_p = torch.log_softmax(exact_leaves[0] @ exact_leaves[1].T, 1)
    exact = -(log_p.exp() * log_p).sum(1)
    torch.testing.assert_close(entropy.double(), exact, rtol=rtol, atol=atol)
    upstream = torch.linspace(-1, 2, 18, device=DEVICE)
    for ours, theirs in zip(
        torch.autograd.grad(entropy, leaves, upstream),
        torch.autograd.grad(exact, exact_leaves, upstream.double()),
        strict=True,
    ):
        assert relative_error(ours, theirs) < (2e-5 if kind == "peaked" else 2e-4)


def test_the_anchor_of_a_row_whose_others_are_all_masked_out():
    """S = 0: p is 1 to the last bit, and nothing divides by it."""
    weight, bias = torch.zeros(4, 8, device=DEVICE), torch.full((4,), -math.inf, device=DEVICE)
    bias[2] = 1.0
    target = torch.full((3,), 2, device=DEVICE)
    for which in (torch.float32, torch.float16):
        head = Head(weight.to(which), bias.to(which), 1.0, None, which)
        head.reserve(3, True)
        x = torch.ones(3, 8, device=DEVICE, dtype=which)
        made = head.softmax(x, target, gradient=True, entropy=True)
        assert made.logprobs.tolist() == [0.0] * 3 and made.entropy.tolist() == [0.0] * 3
        assert made.target_mass.tolist() == [0.0] * 3 and not made.exp.any()
