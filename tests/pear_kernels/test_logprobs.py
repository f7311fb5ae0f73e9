"""linear_logprobs against PyTorch's own log_softmax and Categorical."""

import gc
import weakref

import pytest
import torch
from problems import categorical, gradients, make_problem, workspace

from pear_kernels import linear_logprobs
from pear_kernels.backends.torch.head import Head

HEADS = [{}, {"bias": True}, {"temperature": 0.7}, {"softcap": 2.5}, {"bias": True, "temperature": 1.6, "softcap": 4.0}]


@pytest.mark.parametrize("rows", [1, 7, None])
@pytest.mark.parametrize("head", HEADS)
def test_values_and_gradients_of_both(head, rows):
    problem = make_problem(**head)
    options = {name: value for name, value in problem.options.items() if name != "bias"}
    leaves, exact_leaves = problem.leaves(), problem.leaves()
    ours = linear_logprobs(
        *leaves[:2], problem.target, bias=leaves[2] if len(leaves) > 2 else None, return_entropy=True,
        workspace_bytes=rows and workspace(rows, 37), **options,
    )  # fmt: skip
    exact = categorical(exact_leaves, problem.target, **options)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-13)
    # non-uniform upstream gradients of either output alone, and of both
    rng = torch.Generator().manual_seed(0)
    g = torch.randn(2, len(problem.target), generator=rng, dtype=torch.float64)
    for loss, exact_loss in [
        ((g[0] * ours[0]).sum(), (g[0] * exact[0]).sum()),
        ((g[1] * ours[1]).sum(), (g[1] * exact[1]).sum()),
        ((g[0] * ours[0] + g[1] * ours[1]).sum(), (g[0] * exact[0] + g[1] * exact[1]).sum()),
    ]:
        grads = torch.autograd.grad(loss, leaves, retain_graph=True)
        expected = torch.autograd.grad(exact_loss, exact_leaves, retain_graph=True)
        torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-12)


def test_tokens_that_a_bias_rules_out_add_nothing_to_the_entropy():
    """0 log 0 is 0, in the values and in the gradients."""
    problem = make_problem()
    V = len(problem.weight)
    allowed = torch.ones(V, dtype=torch.bool)
    allowed[(torch.arange(V) % 3 == 1) & ~torch.isin(torch.arange(V), problem.target)] = False
    assert not allowed.all()
    bias = torch.zeros(V, dtype=problem.weight.dtype).masked_fill(~allowed, -torch.inf)
    leaves, exact_leaves = problem.leaves(), problem.leaves()
    _, ours = linear_logprobs(*leaves, problem.target, bias=bias, return_entropy=True)
    exact = torch.distributions.Categorical(logits=exact_leaves[0] @ exact_leaves[1][allowed].t()).entropy()
    exact = exact.masked_fill(problem.target == -100, 0.0)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-13)
    grads, expected = (torch.autograd.grad(of.sum(), to) for of, to in ((ours, leaves), (exact, exact_leaves)))
    torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-12)


def test_gradcheck():
    problem = make_problem((4, 3), V=7, D=3, bias=True)
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: linear_logprobs(
            hidden, weight, problem.target, bias=bias, softcap=3.0, temperature=0.7, return_entropy=True
        ),
        problem.leaves(),
    )


def test_padded_shape_and_frozen_head():
    problem = make_problem((6, 6), ignored=0.3)
    hidden = problem.hidden.view(2, 6, -1).requires_grad_()
    logprobs = linear_logprobs(hidden, problem.weight, problem.target.view(2, 6))
    expected_hidden = problem.hidden.clone().requires_grad_()
    expected, _ = categorical([expected_hidden, problem.weight], problem.target)
    assert logprobs.shape == (2, 6)
    torch.testing.assert_close(logprobs.flatten(), expected, rtol=1e-12, atol=1e-13)
    (grad,) = gradients(logprobs.square().sum(), [hidden])
    (expected_grad,) = gradients(expected.square().sum(), [expected_hidden])
    torch.testing.assert_close(grad.view(12, -1), expected_grad, rtol=1e-10, atol=1e-13)


def test_all_ignored():
    problem = make_problem(ignored=1.0)
    leaves = problem.leaves()
    logprobs, entropy = linear_logprobs(*leaves, problem.target, return_entropy=True)
    assert not logprobs.any() and not entropy.any()
    assert all(not grad.any() for grad in gradients((logprobs + entropy).sum(), leaves))


def test_the_workspace_dies_with_the_call(monkeypatch):
    seen = []
    reserve = Head.reserve

    def watched(self, *args):
        reserve(self, *args)
        seen.append(weakref.ref(self.workspace))

    monkeypatch.setattr(Head, "reserve", watched)
    problem = make_problem()
    result = linear_logprobs(problem.hidden, problem.weight, problem.target)
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None and not result.requires_grad


def test_bitwise_repeatable():
    problem = make_problem((60, 90), V=501, D=32, dtype=torch.float32)
    runs = []
    for _ in range(2):
        leaves = problem.leaves()
        both = linear_logprobs(*leaves, problem.target, return_entropy=True)
        runs.append([*both, *gradients((both[0] * both[1]).sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
