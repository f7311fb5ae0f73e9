"""The custom ops under torch.compile, checkpointing and autograd's rarer uses."""

import functools

import pytest
import torch
from problems import (
    gradients,
    make_distill_problem,
    make_policy_problem,
    make_problem,
    make_weighted_problem,
    op_arguments,
)
from torch.utils.checkpoint import checkpoint

from pear_kernels import (
    LinearPolicyLoss,
    Teacher,
    linear_distill_loss,
    linear_logprobs,
    linear_pear_loss,
    linear_policy_loss,
    linear_weighted_loss,
    pear_weights,
)
from pear_kernels.engine import packing
from pear_kernels.ops import backends
from pear_kernels.ops import logprobs as logprobs_ops
from pear_kernels.ops import loss as loss_op
from pear_kernels.ops.loss import compute, linear_loss
from pear_kernels.ops.pear_weights import pear_weights as pear_weights_op
from pear_kernels.options import HeadOptions, LabelOptions, PEAROptions, Reduction


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


def changing(problem):
    """Calls by name, in which every number follows from one, `x`."""
    target, behavior, bounds = problem.target, problem.behavior_logprobs, problem.cu_seqlens
    rng = torch.Generator().manual_seed(1)
    advantages, label = torch.randn(len(bounds) - 1, generator=rng), torch.tensor([True, False, True, False, True])
    teacher_hidden, teacher_weight = torch.randn(len(target), 5, generator=rng), torch.randn(37, 5, generator=rng)

    def pear(hidden, weight, x):
        return linear_pear_loss(
            hidden, weight, target, behavior, cu_seqlens=bounds, sequence_label=label, gamma=1 - x, denominator=9 + x,
            log_ratio_clip=(-x, 2 * x), log_weight_clip=[-x, 5.0], negative_lambda=x, logprob_floor=-2 - x,
            temperature=1 + x, softcap=9 + x,
        ).loss  # fmt: skip

    def policy(hidden, weight, x):
        return linear_policy_loss(
            hidden, weight, target, behavior, advantages, cu_seqlens=bounds, ref_logprobs=behavior, beta=x, clip_low=x,
            clip_high=2 * x, dual_clip=2 + x, sampler_logprobs=behavior - 0.1, sampler_clip=1 + x, entropy_coef=-x,
            unbiased_kl=True,
        ).loss + LinearPolicyLoss(objective="sapo", sapo_temperatures=(x, 1.05))(
            hidden, weight, target, behavior, advantages, cu_seqlens=bounds
        ).loss  # fmt: skip

    def weighted(hidden, weight, x):
        options = dict(iw_tau=x, iw_max=1 + x, psft_clip=x, asft_kl=x, idft_clip=(x, 1 + x))
        names = ("iw-sft", "psft", "asft", "idft")
        return sum(
            linear_weighted_loss(hidden, weight, target, name, ref_logprobs=behavior, cu_seqlens=bounds, **options).loss
            for name in names
        )

    def distill(hidden, weight, x):
        teacher = Teacher(teacher_hidden, teacher_weight, None, 1 + x, 9 + x)
        return linear_distill_loss(
            hidden, weight, teacher, target, cu_seqlens=bounds, divergence="js", js_beta=x, distill_temperature=1 + x,
            nll_coef=x,
        ).loss  # fmt: skip

    def logprobs(hidden, weight, x):
        logprobs, entropy = linear_logprobs(
            hidden, weight, target, temperature=1 + x, softcap=9 + x, return_entropy=True
        )
        weights = pear_weights(logprobs, behavior, target >= 0, cu_seqlens=bounds, log_ratio_clip=(-x, x))
        return (weights * logprobs).sum() + entropy.square().sum()

    def integers(hidden, weight, x):
        x = round(100 * x)
        return linear_policy_loss(
            hidden, weight, target, behavior, advantages, cu_seqlens=bounds, ref_logprobs=behavior, beta=x,
            dual_clip=1 + x, sampler_logprobs=behavior - 0.1, sampler_clip=1 + x, entropy_coef=x, temperature=x,
            softcap=9 + x, denominator=x,
        ).loss  # fmt: skip

    calls = (pear, policy, weighted, distill, logprobs, integers)
    return {call.__name__: call for call in calls}


@pytest.mark.parametrize("name", ["pear", "policy", "weighted", "distill", "logprobs", "integers"])
def test_numbers_that_change_between_calls_are_no_reason_to_compile_again(name):
    problem = make_problem(dtype=torch.float32)
    call, compilations = changing(problem)[name], []
    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(
        call, fullgraph=True, backend=lambda graph, inputs: compilations.append(graph) or aot_eager(graph, inputs)
    )
    for step in range(4):
        leaves, compiled_leaves, x = problem.leaves(), problem.leaves(), 0.01 * (step + 1)
        value, found = call(*leaves, x), compiled(*compiled_leaves, x)
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradients(found, compiled_leaves), gradients(value, leaves), rtol=1e-5, atol=1e-6)
    assert len(compilations) == 2  # for the first number, and for any other


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


ONE_OF_EACH = {
    "pear": make_problem,
    "policy": functools.partial(make_policy_problem, entropy_coef=0.1),
    "weighted": functools.partial(make_weighted_problem, weighting="dft"),
    "distill": make_distill_problem,
}


def one_of_each(name):
    """(the loss as a function of hidden and weight, both)."""
    problem = (make_problem if name == "logprobs" else ONE_OF_EACH[name])(dtype=torch.float32)
    options = {**problem.options, "cu_seqlens": problem.cu_seqlens}

    def loss(hidden, weight):
        if name == "logprobs":
            return linear_logprobs(hidden, weight, problem.target).square().sum()
        return problem.loss(hidden, weight, problem.target, problem.behavior_logprobs, **options).loss

    return loss, problem.leaves()


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "logprobs"])
def test_batches_of_upstream_gradients(name):
    loss, leaves = one_of_each(name)
    exact = gradients(loss(*leaves), leaves)
    batch = torch.autograd.grad(loss(*leaves), leaves, torch.tensor([1.0, -2.0]), is_grads_batched=True)
    jacobian = torch.autograd.functional.jacobian(loss, tuple(leaves), vectorize=True)
    for grads, row, grad in zip(batch, jacobian, exact, strict=True):
        torch.testing.assert_close(grads, torch.stack([grad, -2 * grad]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(row, grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "logprobs"])
def test_a_tensor_that_a_hook_holds_stays_as_it_is(name):
    loss, leaves = one_of_each(name)
    exact, held = gradients(5 * loss(*leaves), leaves), []

    def pack(tensor):
        held.append((tensor, tensor.clone()))
        return len(held) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: held[i][0]):
        value = 5 * loss(*leaves)
    for keep in (True, False):
        torch.testing.assert_close(torch.autograd.grad(value, leaves, retain_graph=keep), tuple(exact))
    assert held and all(torch.equal(tensor, copy) for tensor, copy in held)


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "logprobs"])
def test_transforms_of_torch_func_are_refused_by_name(name):
    loss, (hidden, weight) = one_of_each(name)
    message = f"linear_{name}.* does not work under the transforms of torch.func.*loss.backward"
    for call in (
        lambda: torch.func.grad(loss)(hidden, weight),
        lambda: torch.func.vjp(loss, hidden, weight),
        lambda: torch.func.jvp(functools.partial(loss, hidden), (weight,), (weight,)),
        lambda: torch.func.vmap(loss, (0, None))(torch.stack([hidden, hidden]), weight),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_the_backward_pass_keeps_to_the_calls_backend(monkeypatch):
    """On a GPU a weight of another dtype than its gradient is scaled by a kernel, unless the call says "torch"."""
    asked = []
    monkeypatch.setattr(backends, "resolve", lambda chosen, device, dtype: asked.append(chosen) or "torch")
    monkeypatch.setattr(loss_op, "on_gpu", lambda tensor: True)
    for which in ("torch", None):
        problem = make_problem(dtype=torch.bfloat16, backend=which)
        out, leaves = problem.ours()
        asked.clear()
        gradients(out.loss, leaves)
        assert asked == [which]  # of dW, which is float32


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
    columns = {"behavior_logprobs": problem.behavior_logprobs, "cu_seqlens": bounds}
    arguments = op_arguments("linear_pear_loss", columns, PEAROptions(), LabelOptions(), Reduction(), HeadOptions())
    torch.library.opcheck(
        linear_loss,
        (hidden, weight, bias, problem.target, *arguments, None, [True, True, True]),
        test_utils=("test_schema", "test_faketensor"),
    )
    _, *arguments = op_arguments("linear_logprobs", {}, HeadOptions(), return_entropy=True)
    torch.library.opcheck(
        logprobs_ops.linear_logprobs,
        (hidden, weight, bias, problem.target, *arguments, None),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "sequence_mean"])
@pytest.mark.parametrize("level", ["token", "block", "sequence"])
def test_a_captured_pass_reads_no_value(level, reduction, monkeypatch):
    """The whole of each op on tensors of device "meta", which have no values: reading one raises, as in a capture."""
    monkeypatch.setattr(packing, "capturing", lambda: True)
    N, V, D = 40, 37, 16
    head = HeadOptions(temperature=0.7, softcap=3.0, workspace_bytes=9 * V * 4, backend="torch")
    with torch.device("meta"):
        hidden, weight, bias, target = torch.randn(N, D), torch.randn(V, D), torch.randn(V), torch.zeros(N).long()
        pear, behavior, bounds = PEAROptions(level=level), torch.zeros(N), torch.zeros(3, dtype=torch.int32)
        columns = {"behavior_logprobs": behavior, "sequence_scale": torch.ones(2), "cu_seqlens": bounds}
        for divisor in (None, torch.ones(())):
            with torch.device("cpu"):
                arguments = op_arguments(
                    "linear_pear_loss", {**columns, "denominator": divisor}, pear, LabelOptions(),
                    Reduction(reduction=reduction), head,
                )  # fmt: skip
            loss, *_, dx, dw, db = compute(hidden, weight, bias, target, *arguments, None, [True, True, True])
            assert loss.is_meta and (dx.shape, dw.shape, db.shape) == (hidden.shape, weight.shape, bias.shape)
        with torch.device("cpu"):
            _, *of_logprobs = op_arguments("linear_logprobs", {}, head, return_entropy=True)
        both = logprobs_ops.linear_logprobs._init_fn(hidden, weight, bias, target, *of_logprobs, None)
        *both, numbers = both
        logprobs_ops.linear_logprobs_backward._init_fn(
            *both, hidden, weight, bias, target, numbers, of_logprobs[1], None, [True] * 3
        )
        with torch.device("cpu"):
            given = op_arguments("pear_weights", {"behavior_logprobs": both[0], "cu_seqlens": bounds}, pear, head)
        assert pear_weights_op._init_fn(both[0], target == 0, *given).is_meta
        with pytest.raises(RuntimeError, match="meta"):
            loss.item()  # as it would there
