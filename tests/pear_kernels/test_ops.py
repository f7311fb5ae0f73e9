"""The custom ops under torch.compile, checkpointing and autograd's rarer uses."""

import pytest
import torch
from problems import gradients, make_problem
from torch.utils.checkpoint import checkpoint

from pear_kernels import linear_logprobs, linear_pear_loss, ops, packing, pear_weights
from pear_kernels.weights import DEFAULTS, PEAROptions
from pear_kernels.weights import _pear_weights_op as pear_weights_op


def pear(problem):
    def loss(hidden, weight, bias):
        out = linear_pear_loss(
            hidden * 1.5, weight, problem.target, problem.behavior_logprobs, bias=bias, cu_seqlens=problem.cu_seqlens,
            denominator=17.0,
        )  # fmt: skip
        return out.loss * 2 + 0 * out.stats["nll"] + 0 * out.weights.sum()

    return loss


def own_loss(problem):
    def loss(hidden, weight, bias):
        logprobs, entropy = linear_logprobs(hidden * 1.5, weight, problem.target, bias=bias, return_entropy=True)
        weights = pear_weights(logprobs, problem.behavior_logprobs, problem.target >= 0, cu_seqlens=problem.cu_seqlens)
        return -(weights * logprobs).sum() - 0.1 * entropy.square().sum()

    return loss


@pytest.fixture
def problem():
    return make_problem(dtype=torch.float32, bias=True)


@pytest.mark.parametrize("make", [pear, own_loss])
def test_compile_keeps_one_graph(problem, make):
    loss = make(problem)
    leaves, compiled_leaves = problem.leaves(), problem.leaves()
    value = loss(*leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled_leaves)
    torch.testing.assert_close(compiled, value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients(compiled, compiled_leaves), gradients(value, leaves), rtol=1e-5, atol=1e-6)


def test_compile_with_options_that_change_between_calls():
    torch._dynamo.reset()
    step = torch.compile(
        lambda hidden, weight, target, behavior, denominator, temperature: (
            linear_pear_loss(hidden, weight, target, behavior, denominator=denominator, temperature=temperature).loss
        ),
        fullgraph=True,
        backend="aot_eager",
    )
    for tokens, denominator, temperature in [(9, 3.0, 1.0), (9, 4.0, 1.5), (12, 5.5, 1.25), (7, 6.0, 0.5)]:
        problem = make_problem((tokens,), dtype=torch.float32, ignored=0.0)
        hidden, weight = problem.leaves()
        loss = step(hidden, weight, problem.target, problem.behavior_logprobs, denominator, temperature)
        (exact, _, _), _ = problem.naive(denominator=denominator, temperature=temperature)
        assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("make", [pear, own_loss])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(problem, make, use_reentrant):
    loss = make(problem)
    leaves, again = problem.leaves(), problem.leaves()
    value = loss(*leaves)
    value.backward()
    recomputed = checkpoint(loss, *again, use_reentrant=use_reentrant)
    recomputed.backward()
    assert torch.equal(value, recomputed)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, again, strict=True))


@pytest.mark.parametrize("make", [pear, own_loss])
def test_double_backward_is_refused(problem, make):
    leaves = problem.leaves()
    with pytest.raises(RuntimeError, match="no second derivative.*create_graph=True"):
        torch.autograd.grad(make(problem)(*leaves), leaves, create_graph=True)


@pytest.mark.parametrize("make", [pear, own_loss])
def test_a_kept_graph_may_be_walked_twice(problem, make):
    leaves = problem.leaves()
    value = make(problem)(*leaves)
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    second = torch.autograd.grad(5 * value, leaves)
    torch.testing.assert_close(second, tuple(5 * grad for grad in first), rtol=1e-5, atol=1e-6)


def test_gradients_accumulate_over_calls(problem):
    leaves = problem.leaves()
    for _ in range(2):
        pear(problem)(*leaves).backward()
    once = gradients(pear(problem)(*leaves), leaves)
    for leaf, grad in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * grad)


def test_torch_library_opcheck(problem):
    hidden, weight, bias = problem.leaves()
    bounds = problem.cu_seqlens
    torch.library.opcheck(
        ops.linear_pear_loss,
        (hidden, weight, bias, problem.target, None, problem.behavior_logprobs, None, bounds, None, None, 0.1, -5.0,
         *DEFAULTS.arguments(), "mean", 1.0, None, -100, None, None, None, False, torch.float32, [True, True, True]),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    torch.library.opcheck(
        ops.linear_logprobs,
        (hidden, weight, bias, problem.target, 1.0, None, -100, True, None, None, None, torch.float32),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "sequence_mean"])
@pytest.mark.parametrize("level", ["token", "block", "sequence"])
def test_a_captured_pass_reads_no_value(level, reduction, monkeypatch):
    """The whole of each op on tensors of device "meta", which have no values: reading one raises, as in a capture."""
    monkeypatch.setattr(packing, "capturing", lambda: True)
    N, V, D = 40, 37, 16
    head_options = 0.7, 3.0, -100
    how = 9 * V * 4, "torch", None, torch.float32
    with torch.device("meta"):
        hidden, weight, bias, target = torch.randn(N, D), torch.randn(V, D), torch.randn(V), torch.zeros(N).long()
        bounds, scale, denominator = torch.zeros(3, dtype=torch.int32), torch.ones(2), torch.ones(())
        pear = PEAROptions(level).arguments()
        for divisor in (None, denominator):
            loss, *_, dx, dw, db = ops.linear_pear_loss._init_fn(
                hidden, weight, bias, target, None, torch.zeros(N), None, bounds, scale, divisor, 0.1, -5.0, *pear,
                reduction, *head_options, *how[:-1], False, how[-1], [True, True, True],
            )  # fmt: skip
            assert loss.is_meta and (dx.shape, dw.shape, db.shape) == (hidden.shape, weight.shape, bias.shape)
        both = ops.linear_logprobs._init_fn(hidden, weight, bias, target, *head_options, True, *how)
        ops.linear_logprobs_backward._init_fn(*both, hidden, weight, bias, target, *head_options, *how, [True] * 3)
        assert pear_weights_op._init_fn(both[0], both[0], None, target == 0, bounds, *pear, "torch").is_meta
        with pytest.raises(RuntimeError, match="meta"):
            loss.item()  # as it would there
