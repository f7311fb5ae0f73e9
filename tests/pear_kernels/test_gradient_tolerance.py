"""`gradient_tolerance`: what is left out is what is reported, within the bound, and nothing else changes."""

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pear_kernels import (
    LinearPEARLoss,
    Objective,
    TopKTeacher,
    linear_distill_loss,
    linear_logprobs,
    linear_objective_loss,
    linear_pear_loss,
    linear_policy_loss,
    linear_weighted_loss,
)
from pear_kernels.engine.sparsify import Sparsifier

N, V, D = 96, 400, 24
ONE_CHUNK_OF = 8 * V  # bytes of a row of float64 logits


def problem(seed: int = 0, tokens: int = N, vocabulary: int = V, sharp: float = 1.5, dtype=torch.float64):
    """hidden, weight, target, behaviour log-probs; a vocabulary in the order of Zipf, so few columns have most mass."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = sharp * normal(tokens, D), normal(vocabulary, D) / D**0.5
    hidden[:, 0], weight[:, 0] = (
        1.0,
        -sharp * torch.arange(1, vocabulary + 1).log()[torch.randperm(vocabulary, generator=generator)],
    )
    logits = hidden @ weight.T
    target = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    behavior = (logits.log_softmax(1).gather(1, target[:, None])[:, 0] + 0.3 * normal(tokens)).clamp(max=0)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target, behavior


@contextlib.contextmanager
def chosen():
    """A list of the (row_scale, Choice or None) of each chunk, in the order of the walk."""
    found, choose = [], Sparsifier.choose

    def recorded(self, head, softmax, row_scale, may_choose):
        kept = choose(self, head, softmax, row_scale, may_choose)
        found.append((row_scale.clone(), kept))
        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sparsifier, "choose", recorded)
        yield found


def dense_gradient(hidden: Tensor, weight: Tensor, target: Tensor, coefficients: Tensor) -> Tensor:
    """(N, V) |dL/dlogits| without the target's, from full float64 logits."""
    p = (hidden.detach().double() @ weight.detach().double().T).softmax(1)
    return p.scatter(1, target[:, None], 0.0) * coefficients.abs()[:, None]


def gradients(loss: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.autograd.grad(loss, (hidden, weight))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 80),
    vocabulary=st.sampled_from([2, 3, 37, 400]),
    sharp=st.sampled_from([0.1, 2.0, 6.0, 40.0]),
    tolerance=st.floats(1e-6, 0.95),
    rows=st.sampled_from([1, 7, 64, 1000]),
    some_zero=st.booleans(),
)
def test_what_is_reported_is_what_was_left_out(seed, tokens, vocabulary, sharp, tolerance, rows, some_zero):
    """Policy-gradient weights of both signs: the share left out, the loss, and both bounds, against float64 logits."""
    hidden, weight, target, behavior = problem(seed, tokens, vocabulary, sharp)
    advantages = torch.randn(tokens, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) ** 3
    if some_zero:
        advantages[::2] = 0
    options = {"objective": "reinforce", "workspace_bytes": rows * 8 * vocabulary}
    exact = linear_policy_loss(hidden, weight, target, behavior, advantages, **options)
    with chosen() as chunks:
        found = linear_policy_loss(
            hidden, weight, target, behavior, advantages, **options, gradient_tolerance=tolerance
        )
    assert torch.equal(found.loss, exact.loss) and torch.equal(found.logprobs, exact.logprobs)
    mass = dense_gradient(hidden, weight, target, exact.weights / tokens)
    left_out, stop = torch.zeros_like(mass), tokens
    for row_scale, kept in chunks:  # from right to left; a chunk of weights 0 is skipped
        begin = stop - len(row_scale)
        if kept is not None:
            out = torch.ones_like(left_out[begin:stop], dtype=torch.bool)
            every = torch.arange(len(row_scale)) if kept.rows is None else kept.rows
            out[every[:, None], kept.columns] = False
            left_out[begin:stop] = torch.where(out, mass[begin:stop], 0.0)
        stop = begin
    if len(chunks) == -(-tokens // rows):
        share = (left_out.sum() / mass.sum()).item() if mass.sum() > 0 else 0.0
        assert found.stats["gradient_left_out"].item() == pytest.approx(share, rel=1e-6, abs=1e-12)
    assert 0 <= found.stats["gradient_left_out"] <= tolerance
    assert 0 <= found.stats["gradient_kept"] <= 1
    dX, dW = gradients(found.loss, hidden, weight)
    exact_dX, exact_dW = gradients(exact.loss, hidden, weight)
    m = tolerance * mass.sum()
    rounding = 1e-9 * (1 + mass.sum())
    assert (dX - exact_dX).norm(dim=1).sum() <= 2 * m * weight.norm(dim=1).max() + rounding
    assert (dW - exact_dW).norm(dim=1).sum() <= m * hidden.norm(dim=1).max() + rounding


CASES = {
    "pear token": (linear_pear_loss, {}),
    "pear block": (linear_pear_loss, {"level": "block", "block_size": 5}),
    "pear sequence": (linear_pear_loss, {"level": "sequence"}),
    "pear normalised": (linear_pear_loss, {"normalize": "sequence"}),
    "pear of a batch": (linear_pear_loss, {"normalize": "batch"}),
    "dft": (linear_weighted_loss, {"weighting": "dft"}),
    "iw-sft": (linear_weighted_loss, {"weighting": "iw-sft"}),
    "gspo": (linear_policy_loss, {"objective": "gspo"}),
    "grpo": (linear_policy_loss, {"objective": "grpo"}),
}


def call(name: str, hidden: Tensor, weight: Tensor, target: Tensor, behavior: Tensor, **options):
    function, own = CASES[name]
    options = {"cu_seqlens": torch.tensor([0, 50, 60, len(target)], dtype=torch.int32), **own, **options}
    if function is linear_pear_loss:
        return function(hidden, weight, target, behavior, **options)
    if function is linear_weighted_loss:
        return function(hidden, weight, target, ref_logprobs=behavior if "iw" in name else None, **options)
    advantages = torch.linspace(-1, 1, len(target), dtype=torch.float64) if name == "grpo" else torch.ones(len(target))
    return function(hidden, weight, target, behavior, advantages, **options)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", (20, N))
def test_every_loss(name, rows):
    """Sequences of one chunk and of several: exact values, gradients within the bound, the same bits again."""
    inputs = problem()
    options = {"workspace_bytes": rows * ONE_CHUNK_OF}
    exact = call(name, *inputs, **options)
    assert set(exact.stats).isdisjoint({"gradient_kept", "gradient_left_out"})
    found, again = (call(name, *inputs, **options, gradient_tolerance=0.05) for _ in range(2))
    assert torch.equal(found.loss, exact.loss) and torch.equal(found.weights, exact.weights)
    assert 0 < found.stats["gradient_left_out"] <= 0.05 and found.stats["gradient_kept"] < 0.6
    hidden, weight, target, _ = inputs
    mass = dense_gradient(hidden, weight, target, exact.weights / N).sum()
    pairs = zip(*(gradients(each.loss, hidden, weight) for each in (found, exact, again)), strict=True)
    limits = 2 * weight.norm(dim=1).max(), hidden.norm(dim=1).max()
    for (mine, right, repeated), limit in zip(pairs, limits, strict=True):
        assert torch.equal(mine, repeated)
        off = (mine - right).norm(dim=1).sum()
        assert 0 < off <= 0.05 * mass * limit


def test_the_correction_makes_dx_better():
    inputs = problem(tokens=64)
    hidden, weight, *_ = inputs
    with torch.no_grad():
        weight += 3.0  # a mean embedding, which the correction restores
    (right,) = torch.autograd.grad(linear_weighted_loss(*inputs[:3], weighting="none").loss, hidden)
    (found,) = torch.autograd.grad(
        linear_weighted_loss(*inputs[:3], weighting="none", gradient_tolerance=0.1).loss, hidden
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pear_kernels.backends.torch.head.Head.mean_row", lambda self, mass: torch.zeros_like(weight[0]))
        (without,) = torch.autograd.grad(
            linear_weighted_loss(*inputs[:3], weighting="none", gradient_tolerance=0.1).loss, hidden
        )
    assert (found - right).norm() < 0.3 * (without - right).norm()


def test_zero_is_the_exact_pass():
    """Bit for bit, whether it is given or not."""
    inputs = problem(dtype=torch.float32)
    first, second = (linear_pear_loss(*inputs, **options) for options in ({}, {"gradient_tolerance": 0.0}))
    assert first.stats.keys() == second.stats.keys()
    for one, other in zip(*(gradients(each.loss, *inputs[:2]) for each in (first, second)), strict=True):
        assert torch.equal(one, other)


def test_logits_without_light_columns_take_the_dense_products():
    inputs = problem(sharp=0.1)
    found = linear_pear_loss(*inputs, gradient_tolerance=0.02)
    assert found.stats["gradient_kept"] == 1 and found.stats["gradient_left_out"] == 0
    for one, other in zip(
        gradients(found.loss, *inputs[:2]), gradients(linear_pear_loss(*inputs).loss, *inputs[:2]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_factors_that_differ_within_a_sequence_leave_nothing_out():
    """A frozen head, gspo_token: rows are rescaled one by one when the sequence ends, which would break the bound."""
    hidden, weight, target, behavior = problem()
    advantages = torch.linspace(-1, 1, N, dtype=torch.float64)
    options = {"objective": "gspo_token", "workspace_bytes": 20 * ONE_CHUNK_OF}
    frozen = weight.detach()
    exact = linear_policy_loss(hidden, frozen, target, behavior, advantages, **options)
    found = linear_policy_loss(hidden, frozen, target, behavior, advantages, **options, gradient_tolerance=0.3)
    assert found.stats["gradient_left_out"] <= 0.3
    one, other = (torch.autograd.grad(each.loss, hidden)[0] for each in (found, exact))
    mass = dense_gradient(hidden, weight, target, exact.weights / N).sum()
    assert (one - other).norm(dim=1).sum() <= 2 * 0.3 * mass * weight.norm(dim=1).max()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("options", ({}, {"temperature": 0.7}, {"softcap": 5.0, "temperature": 1.3}))
def test_heads(dtype, options):
    """Bias, temperature, softcap and half precision: no worse than the exact pass in this dtype, but for the bound."""
    hidden, weight, target, behavior = problem()
    bias = torch.randn(V, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    exact = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    low = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    right = torch.autograd.grad(linear_pear_loss(*exact[:2], target, behavior, bias=exact[2], **options).loss, exact)
    dense = torch.autograd.grad(linear_pear_loss(*low[:2], target, behavior, bias=low[2], **options).loss, low)
    loss = linear_pear_loss(*low[:2], target, behavior, bias=low[2], **options, gradient_tolerance=0.02)
    assert loss.stats["gradient_left_out"] <= 0.02
    found = torch.autograd.grad(loss.loss, low)
    for mine, exactly, full in zip(found, right, dense, strict=True):
        assert (mine - exactly).norm() <= (full - exactly).norm() * 1.5 + 0.03 * exactly.norm()
    torch.testing.assert_close(found[2], dense[2])  # the bias takes no product: nothing is left out


def test_autocast():
    """Sums of the products stay float32 under autocast, whose operands are bfloat16."""
    hidden, weight, target, behavior = problem(dtype=torch.float32)
    behavior = behavior.float()
    with torch.autocast("cpu", torch.bfloat16):
        dense = gradients(linear_pear_loss(hidden, weight, target, behavior).loss, hidden, weight)
        loss = linear_pear_loss(hidden, weight, target, behavior, gradient_tolerance=0.02)
        found = gradients(loss.loss, hidden, weight)
        linear_logprobs(hidden, weight, target, gradient_tolerance=0.02).sum().backward()
    assert 0 < loss.stats["gradient_left_out"] <= 0.02
    for mine, full in zip(found, dense, strict=True):
        assert mine.dtype == torch.float32 and (mine - full).norm() < 0.03 * full.norm()


@pytest.mark.parametrize("size", (1e-43, 1e-41, 1e-30, 1e30, 3e38))
def test_the_share_does_not_depend_on_the_size_of_the_weights(size):
    """Of float32, from its denormal numbers to its largest ones."""
    inputs = problem(dtype=torch.float32)[:3]
    shares = [
        linear_weighted_loss(
            *inputs, torch.full((N,), each, dtype=torch.float64), reduction="sum", gradient_tolerance=0.05
        ).stats["gradient_left_out"]
        for each in (1.0, size)
    ]
    assert shares[1] <= 0.05
    torch.testing.assert_close(shares[1], shares[0], rtol=0.02 if size < 1e-40 else 1e-4, atol=0)


def test_only_what_has_a_product_leaves_something_out():
    hidden, weight, target, _ = problem()
    bias = torch.zeros(V, dtype=torch.float64, requires_grad=True)
    frozen = hidden.detach(), weight.detach()
    with chosen() as chunks:
        found = linear_weighted_loss(*frozen, target, bias=bias, weighting="none", gradient_tolerance=0.1)
    assert not chunks and found.stats["gradient_left_out"] == 0
    with chosen() as chunks:
        linear_weighted_loss(frozen[0], weight, target, weighting="none", gradient_tolerance=0.1)
    assert all(kept is not None for _, kept in chunks)


def test_backward_of_logprobs():
    hidden, weight, target, _ = problem()
    upstream = torch.linspace(-1, 2, N, dtype=torch.float64)
    right = torch.autograd.grad(linear_logprobs(hidden, weight, target), (hidden, weight), upstream)
    found = linear_logprobs(hidden, weight, target, gradient_tolerance=0.05)
    assert torch.equal(found, linear_logprobs(hidden, weight, target))
    mass = dense_gradient(hidden, weight, target, upstream).sum()
    limits = 2 * weight.norm(dim=1).max(), hidden.norm(dim=1).max()
    for mine, exactly, limit in zip(torch.autograd.grad(found, (hidden, weight), upstream), right, limits, strict=True):
        assert 0 < (mine - exactly).norm(dim=1).sum() <= 0.05 * mass * limit


def test_a_tied_row_and_a_module():
    hidden, weight, target, behavior = problem()
    module = LinearPEARLoss(gradient_tolerance=0.05)
    found = module(hidden, weight, target, behavior)
    assert torch.equal(found.stats["gradient_kept"], linear_pear_loss(
        hidden, weight, target, behavior, gradient_tolerance=0.05
    ).stats["gradient_kept"])  # fmt: skip


# ---- edges


def test_one_token_two_columns_and_a_row_of_one_column():
    """With a vocabulary of 2 the one column beside the target has all of the mass, so it is kept."""
    hidden, weight, target, behavior = problem(tokens=1, vocabulary=2)
    found = linear_pear_loss(hidden, weight, target, behavior, gradient_tolerance=0.9)
    assert found.stats["gradient_left_out"] == 0
    one, other = (
        gradients(each.loss, hidden, weight) for each in (found, linear_pear_loss(hidden, weight, target, behavior))
    )
    for mine, right in zip(one, other, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-300)


def test_a_certain_token_and_no_weight_at_all():
    """1 - p underflows float64: no mass, nothing to leave out. The same for weights that are all 0."""
    hidden = torch.full((3, 4), 1000.0, dtype=torch.float64, requires_grad=True)
    weight = torch.stack([torch.ones(4), -torch.ones(4), torch.zeros(4)]).double().requires_grad_()
    target = torch.zeros(3, dtype=torch.int64)
    found = linear_weighted_loss(hidden, weight, target, weighting="none", gradient_tolerance=0.5)
    assert found.stats["gradient_left_out"] == 0
    assert all(grad.count_nonzero() == 0 for grad in gradients(found.loss, hidden, weight))
    inputs = problem()
    advantages = torch.zeros(N, dtype=torch.float64)
    found = linear_policy_loss(*inputs, advantages, gradient_tolerance=0.5)
    assert found.stats["gradient_left_out"] == 0
    assert all(grad.count_nonzero() == 0 for grad in gradients(found.loss, *inputs[:2]))


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_a_coefficient_that_is_not_finite_is_not_hidden(value):
    class Given(Objective):
        def coefficients(self, begin, end):
            return torch.full((end - begin,), value, dtype=torch.float64)

    found = linear_objective_loss(*problem()[:3], Given, gradient_tolerance=0.05)
    assert found.stats["gradient_left_out"].isnan()


@pytest.mark.parametrize("value", (-0.1, 1.0, 2.0, math.nan, math.inf, "0.1", True, None))
def test_bad_values(value):
    with pytest.raises(ValueError, match=r"gradient_tolerance must be .*0.*below 1, got"):
        linear_pear_loss(*problem(tokens=2), gradient_tolerance=value)


def test_gradients_in_every_logit_are_refused_by_name():
    hidden, weight, target, behavior = problem(tokens=8)
    with pytest.raises(ValueError, match="gradient_tolerance must be 0 .*entropy_coef"):
        linear_policy_loss(hidden, weight, target, behavior, torch.ones(8), entropy_coef=0.1, gradient_tolerance=0.1)
    logits = (hidden @ weight.T).detach()
    top = logits.log_softmax(1).topk(4)
    with pytest.raises(ValueError, match="gradient_tolerance must be 0 .*linear_distill_loss"):
        linear_distill_loss(hidden, weight, TopKTeacher(top.indices, top.values), target, gradient_tolerance=0.1)
    logprobs, entropy = linear_logprobs(hidden, weight, target, return_entropy=True, gradient_tolerance=0.1)
    torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)
    with pytest.raises(ValueError, match="gradient_tolerance must be 0 .*entropy"):
        torch.autograd.grad(entropy.sum(), hidden)
