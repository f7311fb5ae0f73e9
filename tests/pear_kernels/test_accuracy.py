"""Relative error in float32 and in half precision against float64, where it is hard: p near 1, and p near 0."""

import pytest
import torch
import torch.nn.functional as F
from problems import relative_error, workspace

from pear_kernels import linear_logprobs, linear_pear_loss
from pear_kernels.reference import naive_weights

N, D, V = 192, 256, 3001
BOUNDS = torch.tensor([0, 64, 128, N])  # sequences of 64 tokens
UNWEIGHTED = dict(gamma=1.0, log_ratio_clip=(0.0, 0.0))  # every weight is exactly 1


def hard_problem(kind: str, level: float = 0.0, dtype=torch.float32):
    """Hidden states whose targets are random, `peaked` (1 - p near `level`) or `unlikely` (log p near `level`)."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=rng) / D**0.5
    target = torch.randint(V, (N,), generator=rng)
    toward = weight[target] / weight[target].square().sum(1, keepdim=True)  # moves z_y by 1
    noise = torch.randn(N, D, generator=rng)
    wanted = None  # log(p / (1 - p)) of each target
    if kind == "peaked":
        wanted = torch.logit(torch.tensor(level, dtype=torch.float64)).neg()
    elif kind == "unlikely":
        wanted = level
    hidden = noise.double()
    for _ in range(20 if wanted is not None else 0):  # the push moves the other logits too, so it is found step by step
        logits = hidden @ weight.double().T
        z_y = logits.gather(1, target[:, None])[:, 0]
        others = torch.logsumexp(logits.scatter(1, target[:, None], -torch.inf), 1)
        hidden = hidden + (wanted - (z_y - others))[:, None] * toward
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    # ratios mostly inside their clip, so that every error in a log-prob reaches the weights along the suffix
    behavior = exact_logprobs(hidden.double(), weight.double(), target) + 0.05 * torch.randn(N, generator=rng) + 0.01
    return hidden, weight, target, behavior.clamp(max=0).float()


def exact_logprobs(hidden, weight, target):
    """float64; 1 - p by its own sum, or 8 of the 16 digits would be lost at 1 - p = 1e-8."""
    logits = hidden @ weight.T
    z_y = logits.gather(1, target[:, None])
    others = torch.logsumexp(logits.scatter(1, target[:, None], -torch.inf), 1)
    return -torch.logaddexp(torch.zeros_like(others), others - z_y[:, 0])


def run(hidden, weight, target, behavior, loss, **options):
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    value, logprobs = loss(*leaves, target, behavior, **options)
    return value.detach(), logprobs.detach(), *torch.autograd.grad(value, leaves)


def ours(hidden, weight, target, behavior, **options):
    out = linear_pear_loss(
        hidden, weight, target, behavior, cu_seqlens=BOUNDS, workspace_bytes=workspace(80, V, 4), **options
    )
    return out.loss, out.logprobs


def exact(hidden, weight, target, behavior, **options):
    """float64 throughout, the weights too."""
    logprobs = exact_logprobs(hidden, weight, target)
    edges = zip(BOUNDS[:-1], BOUNDS[1:], strict=True)
    weights = torch.cat([naive_weights(logprobs[a:b].detach(), behavior[a:b], **options) for a, b in edges])
    return -(weights * logprobs).sum() / N, logprobs


CASES = [
    ("random", 0.0),
    *[("peaked", 10.0**-k) for k in range(3, 9)],
    *[("unlikely", -float(k)) for k in (20, 42, 60)],
]


@pytest.mark.parametrize("kind, level", CASES)
def test_float32(kind, level):
    problem = hard_problem(kind, level)
    loss, logprobs, grad_hidden, grad_weight = run(*problem, ours)
    wide = [t.double() if t.is_floating_point() else t for t in problem]
    exact_loss, exact_logprobs, exact_hidden, exact_weight = run(*wide, exact)
    if kind == "peaked":
        assert -exact_logprobs.mean().item() == pytest.approx(level, rel=0.05)  # the case is what it says
    if kind == "unlikely":
        assert exact_logprobs.mean().item() == pytest.approx(level, rel=0.05)
    assert relative_error(loss, exact_loss) < 5e-6
    assert relative_error(grad_hidden, exact_hidden) < 5e-6
    assert relative_error(grad_weight, exact_weight) < 5e-6
    assert (logprobs <= 0).all()


@pytest.mark.parametrize("gap", [80.0, 200.0, 1e4])
def test_a_target_far_below_the_maximum(gap):
    hidden, weight, target, behavior = hard_problem("unlikely", -gap)
    loss, logprobs, grad_hidden, grad_weight = run(hidden, weight, target, behavior, ours, **UNWEIGHTED)
    wide = [hidden.double(), weight.double(), target, behavior.double()]
    exact_loss, exact_logprobs, exact_hidden, exact_weight = run(*wide, exact, **UNWEIGHTED)
    assert loss.isfinite() and grad_hidden.isfinite().all() and grad_weight.isfinite().all()
    # the logits themselves are as large as the gap, so their float32 rounding is what is left
    assert relative_error(logprobs, exact_logprobs) < 1e-6
    assert relative_error(loss, exact_loss) < 5e-6
    assert relative_error(grad_hidden, exact_hidden) < max(5e-6, 2e-7 * gap)
    assert relative_error(grad_weight, exact_weight) < max(5e-6, 2e-7 * gap)


def test_entropy_where_the_target_is_unlikely_or_certain():
    # anchored on the target nothing cancels; anchored on the maximum, a low entropy is right to float32's last digit
    for kind, level, atol in [("peaked", 1e-6, 1e-12), ("unlikely", -200.0, 1e-6)]:
        hidden, weight, target, _ = hard_problem(kind, level)
        _, entropy = linear_logprobs(hidden, weight, target, return_entropy=True)
        expected = torch.distributions.Categorical(logits=hidden.double() @ weight.double().T).entropy()
        torch.testing.assert_close(entropy.double(), expected, rtol=2e-4, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype):
    problem = hard_problem("random", dtype=dtype)
    wide = [t.double() if t.is_floating_point() else t for t in problem]  # the same rounded numbers
    loss, logprobs, grad_hidden, grad_weight = run(*problem, ours)
    exact_loss, exact_logprobs, exact_hidden, exact_weight = run(*wide, exact)
    assert logprobs.dtype == loss.dtype == torch.float32 and grad_hidden.dtype == grad_weight.dtype == dtype
    assert (logprobs.double() - exact_logprobs).square().mean().sqrt() < 5e-4
    assert relative_error(loss, exact_loss) < 5e-6
    unit = torch.finfo(dtype).eps / 2  # gradients are rounded once, to the dtype of their tensors
    assert relative_error(grad_hidden, exact_hidden) < unit
    assert relative_error(grad_weight, exact_weight) < unit


def test_float16_gradients_survive_until_the_loss_scale():
    # 1 / N = 1e-6 is below float16's range: gradients made in the forward pass must not be rounded to it there
    hidden, weight, target, behavior = hard_problem("random", dtype=torch.float16)
    hidden.requires_grad_(), weight.requires_grad_()
    scale, denominator = 2.0**16, 1e6
    out = linear_pear_loss(hidden, weight, target, behavior, denominator=denominator)
    grads = torch.autograd.grad(out.loss * scale, [hidden, weight])
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact_loss = linear_pear_loss(*wide, target, behavior.double(), denominator=denominator).loss
    for ours_, exact_ in zip(grads, torch.autograd.grad(exact_loss * scale, wide), strict=True):
        assert relative_error(ours_, exact_) < 1e-3


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_operands_and_keeps_float32_gradients(hidden_dtype):
    hidden, weight, target, behavior = hard_problem("random")
    hidden = hidden.to(hidden_dtype)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_pear_loss(*leaves, target, behavior)
    grads = torch.autograd.grad(out.loss, leaves)
    assert out.loss.dtype == torch.float32 and [g.dtype for g in grads] == [hidden_dtype, torch.float32]
    # what autocast does to F.linear: operands rounded to bfloat16
    rounded = [t.detach().bfloat16().double().requires_grad_() for t in leaves]
    exact_out = linear_pear_loss(*rounded, target, behavior.double())
    assert relative_error(out.loss, exact_out.loss) < 5e-6
    exact_grads = torch.autograd.grad(exact_out.loss, rounded)
    assert relative_error(grads[0], exact_grads[0]) < (5e-6 if hidden_dtype == torch.float32 else 4e-3)
    assert relative_error(grads[1], exact_grads[1]) < 5e-6
    # and PyTorch's own loss in the same region agrees to bfloat16
    theirs = [t.detach().clone().requires_grad_() for t in leaves]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nll = F.cross_entropy(F.linear(*theirs), target, reduction="none")
        loss = (out.weights * nll).mean()
    assert loss.dtype == torch.float32
    their_grads = torch.autograd.grad(loss, theirs)
    assert [g.dtype for g in their_grads] == [g.dtype for g in grads]
    for a, b in zip(grads, their_grads, strict=True):
        assert relative_error(a, b) < 2e-2
