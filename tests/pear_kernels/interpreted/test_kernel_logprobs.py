"""linear_logprobs on the kernels against Categorical in float64, and what it does not hold."""

import pytest
import torch
from kernel_problems import (
    DEVICE,
    HEADS,
    PRODUCTS,
    TOLERANCE,
    Head,
    chunk_bytes,
    exact_logprobs,
    kernel_problem,
)  # fmt: skip
from problems import categorical, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from pear_kernels import linear_logprobs
from pear_kernels.backends.triton import tiles
from pear_kernels.engine.packing import pack_tokens
from pear_kernels.engine.schedule import Wanted
from pear_kernels.engine.walk import Walk
from pear_kernels.objectives.base import FixedCoefficients


@pytest.fixture(params=PRODUCTS)
def product(request, monkeypatch):
    monkeypatch.setenv(tiles.VARIABLE, request.param)
    return request.param


@pytest.mark.parametrize("head", HEADS)
def test_values_and_gradients_of_both(head, product):
    problem = kernel_problem((9, 8), **HEADS[head])
    options = {name: problem.options[name] for name in ("temperature", "softcap") if name in problem.options}
    leaves, exact_leaves = problem.leaves(), problem.leaves(torch.float64)
    ours = linear_logprobs(
        *leaves[:2], problem.target, bias=leaves[2] if len(leaves) > 2 else None, return_entropy=True,
        backend="triton", workspace_bytes=chunk_bytes(problem, 7), **options,
    )  # fmt: skip
    exact = categorical(exact_leaves, problem.target, **options)
    for values, exact_values in zip(ours, exact, strict=True):
        assert values.dtype == torch.float32 and relative_error(values, exact_values) < TOLERANCE
    # upstream gradients that differ from token to token, of either output alone and of both
    rng = torch.Generator().manual_seed(0)
    upstream = torch.randn(2, 17, generator=rng).to(DEVICE)
    for which in ((0,), (1,), (0, 1)):
        grads = torch.autograd.grad([ours[i] for i in which], leaves, [upstream[i] for i in which], retain_graph=True)
        expected = torch.autograd.grad(
            [exact[i] for i in which], exact_leaves, [upstream[i].double() for i in which], retain_graph=True
        )
        for gradient, exact_gradient in zip(grads, expected, strict=True):
            assert relative_error(gradient, exact_gradient) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_entropy_gradients_in_half_precision(dtype):
    """At most twice the error of full logits in the same dtype."""
    problem = kernel_problem((9, 8), dtype=dtype, bias=True)
    problem.weight.mul_(0.4)
    upstream = torch.linspace(-1, 2, 17, device=DEVICE)
    leaves, naive_leaves, exact_leaves = problem.leaves(), problem.leaves(), problem.leaves(torch.float64)
    ours = linear_logprobs(
        *leaves[:2], problem.target, bias=leaves[2], return_entropy=True, backend="triton",
        workspace_bytes=chunk_bytes(problem, 7),
    )  # fmt: skip
    naive, exact = categorical(naive_leaves, problem.target), categorical(exact_leaves, problem.target)
    assert relative_error(ours[0], exact[0]) < TOLERANCE and relative_error(ours[1], exact[1]) < TOLERANCE

    def grads(outputs, inputs):
        return torch.autograd.grad(sum((upstream.to(value.dtype) * value).sum() for value in outputs), inputs)

    three = grads(ours, leaves), grads(naive, naive_leaves), grads(exact, exact_leaves)
    for gradient, naive_gradient, exact_gradient in zip(*three, strict=True):
        assert gradient.dtype == dtype
        assert relative_error(gradient, exact_gradient) <= 2 * relative_error(naive_gradient, exact_gradient)


@pytest.mark.parametrize("V", [2, 31, 33, 64])
def test_vocabulary_tails_raise_no_log_prob_above_zero(V):
    problem = kernel_problem((10,), V=V, D=8, ignored=0.0)
    problem.target[:] = V - 1
    leaves = problem.leaves()
    logprobs, entropy = linear_logprobs(*leaves, problem.target, return_entropy=True, backend="triton")
    distribution = torch.distributions.Categorical(logits=problem.hidden.double() @ problem.weight.double().T)
    assert (logprobs <= 0).all()
    assert relative_error(logprobs, distribution.log_prob(problem.target)) < TOLERANCE
    assert relative_error(entropy, distribution.entropy()) < TOLERANCE


# ---- memory


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any op returned."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype, entropy", [(torch.float32, True), (torch.bfloat16, False)])
def test_without_a_gradient_nothing_of_the_vocabularys_size_is_held(dtype, entropy):
    N, D, V = 24, 8, 400
    problem = kernel_problem((N,), D=D, V=V, dtype=dtype, ignored=0.0)
    pack = pack_tokens(problem.target >= 0, problem.cu_seqlens)
    head = dict(bias=None, temperature=1.0, softcap=None, compute_dtype=dtype)
    nothing, of_hidden = (
        Walk(problem.hidden, Head(problem.weight, **head), problem.target, pack, wanted, None, entropy=entropy)
        for wanted in (Wanted(False, False, False), Wanted(True, False, False))
    )
    with Largest() as largest:  # around the walk: it would not see into a custom op
        nothing.score_all(FixedCoefficients())
    assert nothing.head.workspace is None
    assert largest.nbytes <= V * D * dtype.itemsize  # the weight, which the interpreter copies
    exact = exact_logprobs(problem.hidden.double(), problem.weight.double(), problem.target)
    assert relative_error(nothing.logprobs, exact) < TOLERANCE
    with Largest() as largest:  # and the measure does see a workspace where there is one
        of_hidden.run(FixedCoefficients(torch.ones(N, dtype=torch.float64, device=DEVICE)))
    assert largest.nbytes >= N * V * dtype.itemsize


def test_bitwise_repeatable():
    problem = kernel_problem((10, 9), bias=True)
    runs = []
    for _ in range(2):
        leaves = problem.leaves()
        both = linear_logprobs(
            *leaves[:2], problem.target, bias=leaves[2], return_entropy=True, backend="triton",
            workspace_bytes=chunk_bytes(problem, 7),
        )  # fmt: skip
        runs.append([*both, *torch.autograd.grad((both[0] * both[1]).sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_all_ignored():
    problem = kernel_problem((5,), ignored=1.0)
    problem.hidden.fill_(torch.nan)
    leaves = problem.leaves()
    both = linear_logprobs(*leaves, problem.target, return_entropy=True, backend="triton")
    assert not both[0].any() and not both[1].any()
    assert all(not gradient.any() for gradient in torch.autograd.grad(both[0].sum() + both[1].sum(), leaves))
